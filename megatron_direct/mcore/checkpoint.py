"""Megatron distributed checkpoints: written and read at any layout.

The folder is laid out as Megatron-LM's: ``iter_0000300/`` for each saved iteration, and
``latest_checkpointed_iteration.txt``, which is written last and names the newest whole one. Every
checkpoint carries, under ``args``, the flags that it was made with. Those of a checkpoint that
Megatron-LM wrote are read as it reads them itself (``--use-checkpoint-args``).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pickle
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from megatron_direct.config import ModelConfig, flag_name
from megatron_direct.errors import UserError
from megatron_direct.mcore.model import ParameterShard, checkpoint_metadata
from megatron_direct.runtime import files, parallel

_TRACKER = "latest_checkpointed_iteration.txt"
_SECOND_MOMENTS = "optimizer.state.exp_avg_sq."  # before a parameter's own key

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
    "hybrid_override_pattern": (None,),
    "is_hybrid_model": (False,),
    "moe_latent_size": (None,),
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
    "window_size": (None,),
}


def latest(folder: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint in a folder, or the folder itself if it is one, or None."""
    folder = Path(folder)
    if (folder / "metadata.json").is_file():
        return folder
    tracker = folder / _TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_text().strip()
    return folder / (text if text == "release" else f"iter_{int(text):07d}")


def require(folder: str | os.PathLike) -> Path:
    found = latest(folder)
    if found is None or not (found / "metadata.json").is_file():
        raise UserError(
            f"{folder} holds no Megatron distributed checkpoint: expected {_TRACKER} and the "
            "iteration it names, or metadata.json. Correct --load, or run pretrain first.")
    return found


def read_args(checkpoint: Path) -> dict:
    """The flags a checkpoint was made with; {} if it carries none."""
    args = _common_state(checkpoint).get("args")
    if args is None:
        return {}
    args = dict(vars(args))
    return _of_megatron_lm(args, checkpoint) if "padded_vocab_size" in args else args


def read_iteration(checkpoint: Path) -> int:
    return int(_common_state(checkpoint)["iteration"])


def has_optimizer(checkpoint: Path) -> bool:
    """Whether training can be carried on with, or has to begin with an optimizer of its own."""
    return "opt_param_scheduler" in _common_state(checkpoint)


def _common_state(checkpoint: Path) -> dict:
    """All that is not a tensor of the model or the optimizer."""
    from megatron.core import dist_checkpointing

    try:
        return dist_checkpointing.load_common_state_dict(str(checkpoint))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{checkpoint}/common.pt holds objects that this megatron-core does not know "
            f"({str(error).splitlines()[0]}). Use the version that wrote the checkpoint."
            ) from error


def _of_megatron_lm(args: dict, checkpoint: Path) -> dict:
    """Megatron-LM's arguments, with those of the model as ModelConfig has them.

    Raises UserError for a model that ModelConfig cannot describe.
    """
    for name, described in _DESCRIBED.items():
        if args.get(name, described[0]) not in described:
            raise UserError(
                f"{checkpoint} was trained with {flag_name(name)} {args[name]}: such a model is "
                f"not supported (only {' or '.join(map(str, described))}).")
    frequency = args.get("moe_layer_freq", 1)
    translated = {
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
        translated["tokenizer_digest"] = files.file_digest(tokenizer)
    return {**args, **translated}


def save(folder: str | os.PathLike, iteration: int, chunks: Sequence[torch.nn.Module], optimizer,
         scheduler, args: dict) -> None:
    """Every rank calls this. ``chunks`` are bare; what was saved before stays until it is done."""
    from megatron.core import dist_checkpointing

    target = Path(folder) / f"iter_{iteration:07d}"
    if parallel.is_rank_zero():
        shutil.rmtree(target, ignore_errors=True)  # left by a run that was killed while saving
        target.mkdir(parents=True)
    parallel.barrier()
    state = _model_state(chunks)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, metadata=checkpoint_metadata())
        state["opt_param_scheduler"] = scheduler.state_dict()
    state.update(args=argparse.Namespace(**args), iteration=iteration, checkpoint_version=3.0)
    dist_checkpointing.save(state, str(target))
    parallel.barrier()
    if parallel.is_rank_zero():
        with files.written_whole(Path(folder) / _TRACKER, "w") as tracker:
            tracker.write(str(iteration))
    parallel.barrier()


def load_model(checkpoint: Path, chunks: Sequence[torch.nn.Module]) -> None:
    """Weights into bare chunks of any layout. Raises UserError if their shapes are others."""
    from megatron.core import dist_checkpointing

    state = _model_state(chunks)
    _check_shapes(checkpoint, state)
    loaded = dist_checkpointing.load(state, str(checkpoint))
    for key, chunk in zip(_model_keys(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[key])


def load_training(checkpoint: Path, chunks: Sequence[torch.nn.Module], optimizer,
                  scheduler) -> int:
    """Weights, optimizer and schedule; returns the iteration they are of."""
    from megatron.core import dist_checkpointing

    state = _model_state(chunks)
    _check_shapes(checkpoint, state)
    _give_torch_adam_a_state(optimizer)
    state["optimizer"] = optimizer.sharded_state_dict(
        state, is_loading=True, metadata=checkpoint_metadata())
    loaded = dist_checkpointing.load(state, str(checkpoint))
    if "opt_param_scheduler" not in loaded:
        raise UserError(f"{checkpoint} holds weights but no optimizer. Add --no-load-optim to "
                        "begin with an optimizer of its own.")
    for key, chunk in zip(_model_keys(chunks), chunks, strict=True):
        chunk.load_state_dict(loaded[key])
    _load_optimizer(optimizer, loaded["optimizer"])
    optimizer.reload_model_params()
    scheduler.load_state_dict(loaded["opt_param_scheduler"])
    return int(loaded["iteration"])


def load_second_moments(checkpoint: Path, chunks: Sequence[torch.nn.Module],
                        shards: Sequence[ParameterShard]) -> dict[str, torch.Tensor]:
    """Adam's, by shard name, in the parameter's shape, in float32; all ranks call this.

    Read at any layout. Raises UserError for a checkpoint without moments of every parameter.
    """
    from megatron.core import dist_checkpointing

    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    names = {id(shard.parameter): shard.name for shard in shards}
    wanted = {}
    for chunk in chunks:
        sharded = chunk.sharded_state_dict(metadata=checkpoint_metadata())
        for local_name, parameter in chunk.named_parameters():
            if id(parameter) in names:
                entry = sharded[local_name]
                wanted[names[id(parameter)]] = dataclasses.replace(
                    entry, key=_SECOND_MOMENTS + entry.key,
                    data=torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False))
    missing = [name for name, entry in wanted.items() if entry.key not in stored]
    if missing:
        raise UserError(
            f"{checkpoint} holds no second moments of Adam for {missing[0]} and {len(missing) - 1} "
            "other parameters, which --precondition adam needs. Save it with its optimizer (with "
            "Megatron-LM and the distributed optimizer: --dist-ckpt-optim-fully-reshardable), or "
            "leave --precondition out.")
    loaded = dist_checkpointing.load(dict(wanted), str(checkpoint))  # and what all ranks share
    return {name: loaded[name] for name in wanted}


def require_same_architecture(given: dict, carried: dict, checkpoint: Path) -> None:
    """Raises UserError if an architecture flag was given that differs from the checkpoint's."""
    for name, value in given.items():
        if name in carried and carried[name] is not None and carried[name] != value:
            raise UserError(
                f"{flag_name(name)} {value} was given, but {checkpoint} was made with "
                f"{carried[name]}. Leave the flag out, or load another checkpoint.")


def architecture(carried: dict) -> dict:
    """Of a checkpoint's flags, those of the model."""
    return {name: carried[name] for name in ModelConfig.__dataclass_fields__ if name in carried}


def _model_keys(chunks: Sequence[torch.nn.Module]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _model_state(chunks: Sequence[torch.nn.Module]) -> dict:
    return {key: chunk.sharded_state_dict(metadata=checkpoint_metadata())
            for key, chunk in zip(_model_keys(chunks), chunks, strict=True)}


def _check_shapes(checkpoint: Path, state: dict) -> None:
    """Compares whole shapes with the file's before anything is loaded."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    for entry in nested_values(state):
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        for tensor in built:
            if not isinstance(tensor, ShardedTensor):
                continue
            found = stored.get(tensor.key)
            if found is None or (tuple(found.global_shape) != tuple(tensor.global_shape)
                                 and not tensor.allow_shape_mismatch):
                shape = "nothing" if found is None else tuple(found.global_shape)
                raise UserError(
                    f"{checkpoint} holds {shape} for {tensor.key}, but the flags describe a model "
                    f"with {tuple(tensor.global_shape)}. Give the flags of the model that was "
                    "saved.")


# Without Apex and Transformer Engine, Megatron falls back to torch's own Adam, whose loading it
# gets wrong in three ways: it asks an optimizer that has not stepped for its step; it gives all
# parameters one step tensor, which each of them would then count up; and it looks for a step among
# the distributed optimizer's tensors, where it is not. What follows mends that.


def _parts(optimizer) -> list:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _torch_adam_states(part) -> list[dict]:
    """[parameters] states of torch's own Adam inside a Megatron optimizer; [] for any other."""
    inner = part.optimizer
    if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        return []
    return [inner.state[p] for group in inner.param_groups for p in group["params"]]


def _give_torch_adam_a_state(optimizer) -> None:
    for part in _parts(optimizer):
        parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
        for state, parameter in zip(_torch_adam_states(part), parameters, strict=False):
            if not state:
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(parameter),
                             exp_avg_sq=torch.zeros_like(parameter))


def _load_optimizer(optimizer, loaded: dict) -> None:
    parts = _parts(optimizer)
    for part, state in zip(parts, [loaded] if len(parts) == 1 else
                           [loaded[key] for key in sorted(loaded)], strict=True):
        tensors = state.pop("param_state") if _torch_adam_states(part) and \
            "param_state" in state else None
        part.load_state_dict(state)
        states = _torch_adam_states(part)
        steps = [s.pop("step").clone() for s in states]
        if tensors is not None:
            part.load_parameter_state_from_fully_reshardable(tensors)
        for s, step in zip(states, steps, strict=True):
            s["step"] = step


def digest(checkpoint: Path) -> str:
    """Of the names, sizes and ends of a checkpoint's files (its weights are not all read)."""
    parts: list[bytes | str] = []
    for path in sorted(p for p in Path(checkpoint).iterdir() if p.is_file()):
        parts += [path.name, str(path.stat().st_size), *files.both_ends(path)]
    return files.digest(*parts)
