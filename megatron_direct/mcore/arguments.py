"""The arguments that a checkpoint carries, as our settings name them.

Those of a checkpoint that Megatron-LM wrote are read as it reads them itself
(``--use-checkpoint-args``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False,),
    "moe_latent_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
    "moe_router_force_biased": (None,),
    "moe_shared_expert_glu_interleave_size": (None,),
    "mtp_num_layers": (None, 0),
    "no_rope_freq": (None,),
    "openai_gelu": (False,),
    "position_embedding_type": ("rope", "learned_absolute", "none"),
    "qk_l2_norm": (False,),
    "quick_geglu": (False,),
    "rotary_interleaved": (False,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "softmax_type": ("vanilla",),
    "spec": (None,),
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
        if args.get(name, described[0]) not in described:
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
        "norm_epsilon": args.get("norm_epsilon", args.get("layernorm_epsilon", 1e-5)),
    }
    tokenizer = args.get("tokenizer_model")
    if tokenizer and os.path.isfile(tokenizer):
        of_model["tokenizer_digest"] = digests.file_digest(tokenizer)
    return {**args, **of_model}
