"""The arguments that a checkpoint carries, as our settings name them.

Those of a checkpoint that Megatron-LM wrote are read as it reads them itself
(``--use-checkpoint-args``). :mod:`megatron_direct.mcore.bridge_arguments` has those of
Megatron-Bridge.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_direct import hybrid_pattern
from megatron_direct.errors import UserError
from megatron_direct.runtime import digests
from megatron_direct.settings import flag_name

# Arguments of Megatron-LM that change what a model computes, with the values under which it is
# one that ModelConfig can describe. An argument that a version does not have is at the first.
DESCRIBED: dict[str, tuple] = {
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
    require_described(args, DESCRIBED, checkpoint)
    frequency = args.get("moe_layer_freq", 1)
    of_model = {
        # The number of groups says nothing unless the switch beside it is on.
        "num_query_groups": args["num_query_groups"] if args["group_query_attention"] else None,
        # Its padding depends on the layout it was trained in. The rows behind the tokenizer's
        # entries are part of the model: their logits count in the softmax.
        "vocab_size": args["padded_vocab_size"],
        "make_vocab_size_divisible_by": args["padded_vocab_size"],
        "moe_layer_freq": str(frequency).replace(" ", ""),
        "bias_gelu_fusion": computes_fused_gelu(
            args.get("bias_gelu_fusion"), args.get("add_bias_linear"), args.get("swiglu")),
        "norm_epsilon": args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
    }
    of_model.update(of_hybrid(args, checkpoint))
    if args.get("lr_decay_style") != "WSD":  # a default, which shaped nothing
        args = {name: value for name, value in args.items() if name != "lr_wsd_decay_style"}
    return {**args, **of_model, **of_tokenizer(args.get("tokenizer_model"))}


def computes_fused_gelu(fusion: bool | None, bias: bool | None, gated: bool | None) -> bool:
    """Whether the kernel computes GELU, in its tanh form: without biases, or for another function,
    the switch says nothing."""
    return bool(fusion and bias and not gated)


def require_described(settings: Mapping[str, Any], described: Mapping[str, tuple], checkpoint: Path,
                      shown: Callable[[str], str] = flag_name) -> None:
    """Raises UserError for a setting of a model that ModelConfig cannot describe.

    described: by name, the values that it can; a setting that is not there has the first.
    shown: the name that whoever trained the model knows.
    """
    for name, values in described.items():
        found = settings.get(name, values[0])
        # Several at once, which newer versions allow.
        several = name == "moe_router_load_balancing_type" and isinstance(found, list)
        if any(one not in values for one in (found if several else [found])):
            raise UserError(
                f"{checkpoint} was trained with {shown(name)} {found}: this is "
                f"not supported (only {' or '.join(map(str, values))} is).")


def require_given(given: Mapping[str, Any], checkpoint: Path) -> None:
    """For a checkpoint without arguments. Raises UserError unless those flags of the model were
    given that its tensors do not show: the defaults, which are a small model's, would be taken
    for them, and nothing would fail."""
    missing = [flag_name(name) for name in _not_shown_by_tensors(given) if name not in given]
    if missing:
        raise UserError(
            f"{checkpoint} carries no arguments: expected those of Megatron-LM, or the "
            "run_config.yaml of Megatron-Bridge beside its tensors. Copy that file there, or "
            "describe the model by flags. Those that its tensors do not show are all needed: "
            f"{' '.join(missing)} are missing.")


def _not_shown_by_tensors(given: Mapping[str, Any]) -> Iterator[str]:
    """Flags that change what a model computes, but neither a name nor a shape."""
    # One shape has room for few wide heads and for many narrow ones, and embeddings are cut or
    # padded as they are loaded.
    yield from ("num_attention_heads", "seq_length", "norm_epsilon", "position_embedding_type",
                "make_vocab_size_divisible_by")
    if given.get("add_bias_linear") and not given.get("swiglu", True):
        yield "bias_gelu_fusion"
    if given.get("position_embedding_type", "rope") == "rope":
        yield from ("rotary_base", "rotary_percent", "use_rope_scaling")
    if given.get("use_rope_scaling"):
        yield "rope_scaling_factor"
    if given.get("multi_latent_attention"):
        yield from ("rope_type", "rotary_scaling_factor", "mscale", "mscale_all_dim")
    if given.get("num_experts"):  # 1 group of 1 is none
        yield from ("moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax",
                    "moe_router_topk_scaling_factor", "moe_router_num_groups",
                    "moe_router_group_topk")
    if hybrid_pattern.MAMBA in (given.get("hybrid_layer_pattern") or ""):
        yield from ("mamba_state_dim", "mamba_num_groups")  # shapes have their product


def of_tokenizer(file: str | None) -> dict[str, Any]:
    """The digest of a tokenizer's file, if it is there."""
    return {"tokenizer_digest": digests.file_digest(file)} if file and os.path.isfile(file) else {}


def of_hybrid(args: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
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
