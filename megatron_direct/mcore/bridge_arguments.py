"""The settings of a checkpoint that Megatron-Bridge (NeMo) wrote, as our settings name them.

Bridge keeps no arguments among the tensors, but writes ``run_config.yaml`` beside them: a section
for each group of settings, in which a dictionary with ``_target_`` stands for an object of that
class, or for the function of that name. Nothing that the file names is imported or called.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megatron_direct.architecture import ModelConfig
from megatron_direct.config import BatchConfig, OptimizerConfig
from megatron_direct.errors import UserError
from megatron_direct.mcore import arguments

RUN_CONFIG = "run_config.yaml"

_MODELS = "megatron.bridge.models."
_HYBRID_MODELS = (_MODELS + "hybrid.hybrid_provider.HybridModelProvider",
                  _MODELS + "mamba.mamba_provider.MambaModelProvider")
# Classes whose fields say all of the model. Others build parts in their code, or, as GPTModelConfig
# does, write their fields without the activation function.
_CLASSES = (_MODELS + "gpt_provider.GPTModelProvider",
            _MODELS + "mla_provider.MLAModelProvider",
            _MODELS + "mistral.mistral_provider.MistralModelProvider", *_HYBRID_MODELS)
_GELU = ("gelu", "torch.nn.functional.gelu", "torch._C._nn.gelu")
_SILU = ("silu", "torch.nn.functional.silu")
# As arguments.DESCRIBED, of what Bridge names otherwise than Megatron-LM or has beyond it.
_DESCRIBED: dict[str, tuple] = {
    "transformer_layer_spec": (
        _MODELS + "gpt_provider.default_layer_spec",
        _MODELS + "gpt_provider.transformer_engine_layer_spec",
        _MODELS + "gpt_provider.transformer_engine_full_layer_spec",
        _MODELS + "gpt_provider.local_layer_spec",
        "megatron.core.models.gpt.gpt_layer_specs.get_gpt_decoder_block_spec"),
    "hybrid_stack_spec": (
        None,
        _MODELS + "hybrid.hybrid_provider.get_default_hybrid_stack_spec",
        _MODELS + "hybrid.hybrid_provider.transformer_engine_hybrid_stack_spec",
        _MODELS + "mamba.mamba_provider.get_default_mamba_stack_spec",
        _MODELS + "mamba.mamba_provider.transformer_engine_mamba_stack_spec"),
    "activation_func": (*_GELU, *_SILU),
    "heterogeneous_block_specs": (False,),
    "layernorm_zero_centered_gamma": (False,),
    "moe_input_jitter_eps": (None,),
    "moe_router_force_load_balancing": (False,),
    "moe_router_topk_limited_devices": (None,),
    "restore_modelopt_state": (False,),
    "seq_len_interpolation_factor": (None, 1),
    "softmax_scale": (None,),
}
# Of yarn, in latent attention: at other values than ours the model is another one.
_YARN = {"original_max_position_embeddings": (4096,), "beta_fast": (32,), "beta_slow": (1,)}
_NEEDED = ("_target_", "num_layers", "hidden_size", "num_attention_heads", "seq_length",
           "vocab_size", "should_pad_vocab", "make_vocab_size_divisible_by",
           "tensor_model_parallel_size", "normalization", "layernorm_epsilon", "activation_func",
           "gated_linear_unit", "position_embedding_type", "rotary_base", "rotary_percent",
           "share_embeddings_and_output_weights")
_OF_LATENT_ATTENTION = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim",
                        "v_head_dim", "rope_type", "rotary_scaling_factor", "mscale",
                        "mscale_all_dim")


def read(checkpoint: Path) -> dict[str, Any]:
    """{name: value} of our settings; {} where there is no ``run_config.yaml``.

    Raises UserError for a file that is damaged or incomplete, and for a model that ModelConfig
    cannot describe.
    """
    path = checkpoint / RUN_CONFIG
    if not path.is_file():
        return {}
    run = _load(path)
    arguments.require_described(run, {"peft": (None,)}, checkpoint, str)  # adapters alone are saved
    model = _section(run, "model", path)
    arguments.require_described(model, {"_target_": _CLASSES}, checkpoint, _shown)
    missing = [_shown(name) for name in _NEEDED if model.get(name) is None]
    if missing:
        raise UserError(f"{path} has no {', '.join(missing)}, which Megatron-Bridge writes for "
                        "every GPT or hybrid model. Copy the file again from where it was made.")
    tokenizer = _section(run, "tokenizer", path).get("tokenizer_model")
    return {**_of_model(model, checkpoint),
            **_of_training(*(_section(run, name, path)
                             for name in ("train", "optimizer", "scheduler", "rng"))),
            **arguments.of_tokenizer(tokenizer if isinstance(tokenizer, str) else None)}


class _Loader(yaml.SafeLoader):
    """Plain values alone; an object of Python's is left as the name of its tag."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/",
                              lambda loader, suffix, node: f"!!python/{suffix}")


def _load(path: Path) -> Mapping[str, Any]:
    try:
        found = yaml.load(path.read_bytes(), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: it is not YAML ({' '.join(str(error).split())}). Copy "
                        "it again from where it was made.") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: expected sections such as model, found "
                        f"{str(found)[:40]!r}. Copy it again from where it was made.")
    return found


def _section(run: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    """The settings of a group, functions by their names; {} for a group that there is none of."""
    found = run.get(name)
    if found is not None and not isinstance(found, dict):
        raise UserError(f"{path} is damaged: expected settings under {name}, found "
                        f"{str(found)[:40]!r}. Copy it again from where it was made.")
    return {key: _named(value) for key, value in (found or {}).items()}


def _named(value: Any) -> Any:
    """The name of a function or a number format; all else as it is.

    With ``use_transformer_engine`` alone a function may have been given: it chooses between layers
    that compute the same.
    """
    if not isinstance(value, dict) or "_target_" not in value:
        return value
    given = {key for key in value if not key.startswith("_")} - {"use_transformer_engine"}
    is_function = value.get("_partial_") or value.get("_call_") is False
    return value["_target_"] if is_function and not given and not value.get("_args_") else value


def _shown(name: str) -> str:
    """A setting of the model as users of Bridge know it."""
    return f"model.{name}"


def _of_model(model: Mapping[str, Any], checkpoint: Path) -> dict[str, Any]:
    arguments.require_described(model, {**arguments.DESCRIBED, **_DESCRIBED}, checkpoint, _shown)
    has_latents = model.get("multi_latent_attention")
    has_experts = model.get("num_moe_experts") is not None
    is_hybrid = model["_target_"] in _HYBRID_MODELS
    if has_latents and model.get("rope_type") == "yarn":
        arguments.require_described(model, _YARN, checkpoint, _shown)
    is_silu = model["activation_func"] in _SILU
    if is_silu != model["gated_linear_unit"]:
        raise UserError(
            f"{checkpoint} was trained with model.activation_func {model['activation_func']} and "
            f"model.gated_linear_unit {model['gated_linear_unit']}: this is not supported (only "
            "SiLU with a gate and GELU without one are).")
    same_name = {
        f.name: model[f.name] for f in dataclasses.fields(ModelConfig) if f.name in model
        and (has_latents or f.name not in _OF_LATENT_ATTENTION)  # else they say nothing
        and (has_experts or not f.name.startswith("moe_"))
        and (is_hybrid or not f.name.startswith("mamba_"))}
    multiple = (model["make_vocab_size_divisible_by"] * model["tensor_model_parallel_size"]
                if model["should_pad_vocab"] else 1)
    padded_vocab_size = -(-model["vocab_size"] // multiple) * multiple
    base = model["rotary_base"]
    return {
        **same_name,
        **({"moe_layer_freq": str(model.get("moe_layer_freq", 1)).replace(" ", "")}
           if has_experts else {}),
        "num_experts": model.get("num_moe_experts"),
        # As Megatron-LM's: rows beyond the tokenizer's entries count in the softmax.
        "vocab_size": padded_vocab_size,
        "make_vocab_size_divisible_by": padded_vocab_size,
        "norm_epsilon": model["layernorm_epsilon"],
        "swiglu": is_silu,
        "bias_gelu_fusion": arguments.computes_fused_gelu(
            model.get("bias_activation_fusion"), model.get("add_bias_linear"), is_silu),
        "untie_embeddings_and_output_weights": not model["share_embeddings_and_output_weights"],
        # 500000.0 in the configurations of Hugging Face.
        "rotary_base": int(base) if isinstance(base, float) and base.is_integer() else base,
        "use_rope_scaling": bool(model.get("rope_scaling")),
        "bf16": bool(model.get("bf16")) or model.get("params_dtype") == "torch.bfloat16",
        **arguments.of_hybrid({**model, "is_hybrid_model": is_hybrid}, checkpoint),
    }


def _of_training(train: Mapping[str, Any], optimizer: Mapping[str, Any],
                 scheduler: Mapping[str, Any], rng: Mapping[str, Any]) -> dict[str, Any]:
    """{} for a model that Bridge converted from another format: its optimizer never ran."""
    if not train:
        return {}
    known = {**optimizer, **train, **rng, "lr_warmup_iters": scheduler.get("lr_warmup_iters")}
    if scheduler.get("end_weight_decay") is not None:  # what the scheduler gives the optimizer
        known["weight_decay"] = scheduler["end_weight_decay"]
    if scheduler.get("lr_decay_style") == "WSD":
        known["lr_wsd_decay_style"] = scheduler.get("lr_wsd_decay_style")
    return {f.name: known[f.name] for kind in (OptimizerConfig, BatchConfig)
            for f in dataclasses.fields(kind) if f.name in known}
