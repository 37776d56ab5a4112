"""The arguments that a checkpoint carries, as our settings name them.

Those of a checkpoint that Megatron-LM wrote are read as it reads them itself
(``--use-checkpoint-args``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_direct import hybrid_pattern
from megatron_direct.errors import UserError
from megatron_direct.runtime import digests
from megatron_direct.settings import flag_name

# Arguments of Megatron-LM that change what a model computes, with the values under which it is
# one that ModelConfig can describe. An argument that a version does not have is at the first.
_DESCRIBED = {
    "activation_func_clamp_value": (None,),
    "apply_layernorm_1p": (False,),
    "apply_residual_connection_post_layernorm": (False,),
    "attention_output_gate": (False,),
    "experimental_attention_variant": (None,),
    "glu_linear_offset": (0.0,),
    "heterogeneous_layers_config_path": (None,),
    "moe_apply_probs_on_input": (False,),
    "moe_expert_capacity_factor": (None,),
    "moe_latent_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_router_force_biased": (None,),
    # Those that do not choose the experts themselves, as sinkhorn does.
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "moe_shared_expert_glu_interleave_size": (None,),
    "no_rope_freq": (None,),
    "openai_gelu": (False,),
    "position_embedding_type": ("rope", "learned_absolute", "none"),
    "qk_l2_norm": (False,),
    "quick_geglu": (False,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "softmax_type": ("vanilla",),
    "spec": (None, ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"],
             ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]),
    "squared_relu": (False,),
    "use_legacy_models": (False,),
    "use_mup": (False,),
    "window_size": (None,),
}


def translated(args: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """Those of the model as ModelConfig has them; the others as they are.

    Raises UserError for a model that ModelConfig cannot describe.
    """
    is_of_megatron_lm = "padded_vocab_size" in args
    return _of_megatron_lm(args, checkpoint) if is_of_megatron_lm else dict(args)


def _of_megatron_lm(args: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    for name, described in _DESCRIBED.items():
        value = args.get(name, described[0])
        # Several at once, which newer versions allow.
        several = name == "moe_router_load_balancing_type" and isinstance(value, list)
        if any(one not in described for one in (value if several else [value])):
            raise UserError(
                f"{checkpoint} was trained with {flag_name(name)} {args[name]}: this is "
                f"not supported (only {' or '.join(map(str, described))} is).")
    frequency = args.get("moe_layer_freq", 1)
    of_model = {
        # The number of groups says nothing unless the switch beside it is on.
        "num_query_groups": args["num_query_groups"] if args["group_query_attention"] else None,
        # Its padding depends on the layout it was trained in. The rows behind the tokenizer's
        # entries are part of the model: their logits count in the softmax.
        "vocab_size": args["padded_vocab_size"],
        "make_vocab_size_divisible_by": args["padded_vocab_size"],
        "moe_layer_freq": str(frequency).replace(" ", ""),
        # It has no effect elsewhere. In the kernel GELU has its tanh form.
        "bias_gelu_fusion": bool(args.get("bias_gelu_fusion") and args.get("add_bias_linear")
                                 and not args.get("swiglu")),
        "norm_epsilon": args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
    }
    of_model.update(_of_hybrid(args, checkpoint))
    if args.get("lr_decay_style") != "WSD":  # a default, which shaped nothing
        args = {name: value for name, value in args.items() if name != "lr_wsd_decay_style"}
    tokenizer = args.get("tokenizer_model")
    if tokenizer and os.path.isfile(tokenizer):
        of_model["tokenizer_digest"] = digests.file_digest(tokenizer)
    return {**args, **of_model}


def _of_hybrid(args: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    """What a hybrid model's pattern says; until 0.16 it is called --hybrid-override-pattern."""
    pattern = args.get("hybrid_layer_pattern") or args.get("hybrid_override_pattern")
    if pattern is None:
        if args.get("is_hybrid_model"):
            raise UserError(
                f"{checkpoint} is of a hybrid model without a pattern of layers "
                "(--hybrid-attention-ratio, --hybrid-mlp-ratio): this is not supported. Save it "
                "with --hybrid-override-pattern.")
        return {}
    layers = hybrid_pattern.layers(pattern)
    heads = len(hybrid_pattern.heads(pattern)) or args.get("mtp_num_layers")
    return {"hybrid_layer_pattern": hybrid_pattern.without_stages(pattern),
            "num_layers": len(layers), "mtp_num_layers": heads}
