"""Megatron-LM's layer patterns of hybrid models (``--hybrid-layer-pattern``): one letter a layer.

A block of a GPT is two layers of a hybrid model, ``*-``. What stands after each ``/`` in a pattern
are the layers of a head for multi-token prediction. ``|`` divides pipeline stages, and is left out
here: stages are of equal size in any layout.
"""

from __future__ import annotations

from typing import Any

from megatron_direct.errors import UserError
from megatron_direct.settings import require_defaults

ATTENTION, LATENT_ATTENTION, MLP, EXPERTS, MAMBA = "*", "+", "-", "E", "M"
_NAMES = {
    ATTENTION: "attention",
    LATENT_ATTENTION: "latent attention",
    MLP: "an MLP",
    EXPERTS: "experts",
    MAMBA: "a Mamba layer",
}
_UNSUPPORTED = {"G": "a gated delta net", "D": "sparse attention (DeepSeek)"}
_STAGE, _HEAD = "|", "/"


def layers(pattern: str) -> str:
    """The model's layers, without pipeline stages and prediction heads."""
    return pattern.split(_HEAD)[0].replace(_STAGE, "")


def heads(pattern: str) -> list[str]:
    """The layers of each prediction head."""
    return [head for head in pattern.split(_HEAD)[1:] if head]


def without_stages(pattern: str) -> str:
    return _HEAD.join([layers(pattern), *heads(pattern)])


def in_stages(pattern: str, num_stages: int, *, with_heads: bool) -> str:
    """The layers divided into stages of equal size, and the heads if asked for."""
    plain = layers(pattern)
    size = len(plain) // num_stages
    stages = _STAGE.join(plain[first:first + size] for first in range(0, len(plain), size))
    return _HEAD.join([stages, *(heads(pattern) if with_heads else [])])


def mamba_heads(model: Any) -> int:
    """Of a Mamba layer of a ModelConfig."""
    return model.mamba_num_heads or 2 * model.hidden_size // model.mamba_head_dim


def check(model: Any) -> None:
    """Raises UserError for a ModelConfig whose pattern, or what belongs to it, cannot be."""
    pattern = model.hybrid_layer_pattern
    if pattern is None:
        require_defaults(model, "hybrid_layer_pattern", (
            "mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads"))
        return
    given = f"--hybrid-layer-pattern {pattern}"
    _require_supported(pattern)
    _check_heads(given, heads(pattern), model.mtp_num_layers)
    count = len(layers(pattern))
    if count != model.num_layers:
        raise UserError(f"{given} has {count} layers, but --num-layers is {model.num_layers}. "
                        f"Give --num-layers {count}.")
    for symbol, switch, is_on in (
            (EXPERTS, "--num-experts", model.num_experts is not None),
            (LATENT_ATTENTION, "--multi-latent-attention", model.multi_latent_attention)):
        if (symbol in layers(pattern)) != is_on:
            raise UserError(f"{switch} and {symbol} in {given} need each other, but only one of "
                            "the two is there. Correct either.")
    if LATENT_ATTENTION in layers(pattern) and ATTENTION in layers(pattern):
        raise UserError(f"{given} has both * and +. Megatron builds a model with one kind of "
                        "attention: with --multi-latent-attention it is +.")
    if model.use_rope_scaling:
        raise UserError("--use-rope-scaling has no effect in Megatron's HybridModel. Leave it out, "
                        "or leave out --hybrid-layer-pattern.")
    if MAMBA in layers(pattern):
        _check_mamba(model)


def _check_heads(given: str, heads_of_pattern: list[str], count: int | None) -> None:
    if count not in (0, len(heads_of_pattern) or None):
        raise UserError(f"{given} has {len(heads_of_pattern)} prediction heads, but "
                        f"--mtp-num-layers is {count}. Write the layers of each head behind a "
                        f"{_HEAD} of its own, or leave the heads out with --mtp-num-layers 0.")
    if len(set(heads_of_pattern)) > 1:
        raise UserError(f"{given} has prediction heads of different layers, which Megatron does "
                        "not build. Give all of them the same.")


def _check_mamba(model: Any) -> None:
    if model.mamba_num_heads is None and 2 * model.hidden_size % model.mamba_head_dim:
        raise UserError(f"--mamba-head-dim {model.mamba_head_dim} does not divide twice the "
                        f"--hidden-size {model.hidden_size}. Change either, or give "
                        "--mamba-num-heads.")
    if mamba_heads(model) % model.mamba_num_groups:
        raise UserError(f"--mamba-num-groups {model.mamba_num_groups} does not divide the "
                        f"{mamba_heads(model)} heads of a Mamba layer. Change it, or "
                        "--mamba-num-heads.")


def _require_supported(pattern: str) -> None:
    """Raises UserError, with the layer's number and name, for a layer that cannot be built."""
    for number, symbol in enumerate(layers(pattern) + "".join(heads(pattern))):
        if symbol not in _NAMES:
            known = ", ".join(f"{letter} ({name})" for letter, name in _NAMES.items())
            raise UserError(
                f"--hybrid-layer-pattern {pattern}: layer {number} is {symbol}, "
                f"{_UNSUPPORTED.get(symbol, 'no kind of layer')}, which is not supported. "
                f"Supported are {known}.")
