"""Settings under which exact second-order products are impossible or would be silently wrong.

A fused kernel, a recomputed activation or a low precision has a first derivative only, or a second
one that is off without a word. Products run on Megatron's local layer spec in single or double
precision, whatever the training used; checkpoints load into it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_direct.errors import UserError
from megatron_direct.mcore import specs

# (field of TransformerConfig, the value it must have, the flag that gives it)
_REQUIRED = (
    ("hidden_dropout", 0.0, "--hidden-dropout 0"),
    ("attention_dropout", 0.0, "--attention-dropout 0"),
    ("masked_softmax_fusion", False, "--no-masked-softmax-fusion"),
    ("bias_dropout_fusion", False, "--no-bias-dropout-fusion"),
    ("bias_activation_fusion", False, "--no-bias-gelu-fusion and --no-bias-swiglu-fusion"),
    ("apply_rope_fusion", False, "--no-rope-fusion"),
    ("gradient_accumulation_fusion", False, "--no-gradient-accumulation-fusion"),
    ("cross_entropy_loss_fusion", False, "no --cross-entropy-loss-fusion"),
    ("recompute_granularity", None, "no --recompute-granularity and no --recompute-activations"),
    ("defer_embedding_wgrad_compute", False, "no --defer-embedding-wgrad-compute"),
    ("cpu_offloading", False, "no --cpu-offloading-num-layers"),
    ("fp8", None, "no --fp8-format"),
    ("fp4", None, "no --fp4-format"),
    ("softmax_type", "vanilla", "--softmax-type vanilla"),
    ("window_size", None, "no --window-size"),
    ("num_moe_experts", None, "no --num-experts"),
    ("mtp_num_layers", None, "no --mtp-num-layers"),
    ("context_parallel_size", 1, "--context-parallel-size 1"),
)
# Packages of kernels with first derivatives only; the first also names Megatron's wrappers of them.
_FOREIGN = ("transformer_engine", "transformer_engine_torch", "apex")


def require_exact_products(chunks: Sequence[torch.nn.Module]) -> None:
    """Raises UserError with the flag to change if products over these chunks cannot be exact."""
    config = chunks[0].config
    for field, required, flag in _REQUIRED:
        found = getattr(config, field)
        if found != required:
            raise UserError(
                f"exact curvature products need {field} = {required}, but it is {found}. "
                f"Build the model for curvature with {flag} (Megatron-LM's flag), or use "
                "--curvature fisher.")
    parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
    dtypes = {parameter.dtype for parameter in parameters} - {torch.float32, torch.float64}
    if dtypes:
        raise UserError(
            f"exact curvature products need weights in float32, but some are {dtypes.pop()}. Build "
            "the model for curvature without --bf16 and --fp16 (Megatron-LM's flags), or use "
            "--curvature fisher.")
    if not all(parameter.requires_grad for parameter in parameters):
        raise UserError("exact curvature products need every parameter to be trainable, but some "
                        "are frozen. Set requires_grad on them for as long as products are taken.")
    if parameters[0].is_cuda and torch.get_float32_matmul_precision() != "highest":
        raise UserError(
            "exact curvature products need full float32 matrix products, but TF32 is on. Call "
            'torch.set_float32_matmul_precision("highest").')
    _require_exact_layers(chunks)


def _require_exact_layers(chunks: Sequence[torch.nn.Module]) -> None:
    """By what the layer spec says of itself; of a model that others built, by its layers' origin.

    Both, since a layer of a model may have been replaced after it was built.
    """
    spec = specs.built_from(chunks[0])
    foreign = sorted({name for chunk in chunks for layer in chunk.modules()
                      for name in _FOREIGN if name in type(layer).__module__.split(".")})
    if (spec is None or spec.exact_products) and not foreign:
        return
    found = f"has layers of {', '.join(foreign)}" if foreign else \
        "was built from a spec without exact second derivatives"
    raise UserError(
        f"exact curvature products need Megatron's local layer spec, but the model {found}. Build "
        "the model for curvature with --transformer-impl local (Megatron-LM's flag; it loads the "
        "same checkpoint), or use --curvature fisher.")
