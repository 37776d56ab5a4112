"""Megatron distributed checkpoints: written and read at any layout.

Every checkpoint carries, under ``args``, the flags that it was made with; one of Megatron-Bridge
has a file for them. training_folder.py says where they lie.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import itertools
import os
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from megatron_direct.architecture import ModelConfig
from megatron_direct.errors import UserError
from megatron_direct.mcore import (
    arguments,
    bridge_arguments,
    compat,
    integrity,
    main_parameters,
    torch_adam,
    training_folder,
)
from megatron_direct.mcore.checkpoint_contents import tensors_in
from megatron_direct.mcore.checkpoint_formats import (
    FORMAT_FILE,
    PARTS_OF_MODELS,
    TRACKER,
    iteration_folder,
    iteration_of,
    require_readable,
    tied_to_a_layout,
)
from megatron_direct.mcore.shards import ParameterShard, checkpoint_metadata
from megatron_direct.runtime import attendance, digests, files, parallel, stopping
from megatron_direct.settings import Settings, flag_name

_PREDICTION_HEADS = "mtp."
# Flags, with their values, that ask for less than the model of a checkpoint.
_LEAVES_OUT = {("mtp_num_layers", 0)}
# Before a parameter's own key. Optimizers that are chained, as experts have one of their own, are
# numbered.
_SECOND_MOMENTS = "optimizer.state.exp_avg_sq."
_SECOND_MOMENTS_OF = re.compile(rf"(?:chained_\d+\.)?{re.escape(_SECOND_MOMENTS)}(.+)")


Group = TypeVar("Group", bound=Settings)


@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint before its weights are loaded; the same on every rank.

    arguments: the flags it was made with, under our names; {} if it carries none. has_optimizer:
    whether its optimizer was saved; is_optimizer_of_one_layout: as it lies in the layout of its
    training, so that it cannot be read; lr_reached: the learning rate of its last step. digest: of
    the names, sizes and ends of its files (its weights are not all read).
    """

    path: Path
    iteration: int
    arguments: Mapping[str, Any]
    has_optimizer: bool
    digest: str
    is_optimizer_of_one_layout: bool = False
    lr_reached: float | None = None

    @property
    def has_readable_optimizer(self) -> bool:
        """Whether training can carry on with it."""
        return self.has_optimizer and not self.is_optimizer_of_one_layout

    @property
    def tokenizer_digest(self) -> str | None:
        return self.arguments.get("tokenizer_digest")

    def settings(self, kind: type[Group], given: Mapping[str, Any]) -> Group:
        """As given, else as the checkpoint was trained, else the default.

        Raises UserError for a model that nothing describes but the shapes of its tensors.
        """
        if kind is ModelConfig and not self.arguments:
            arguments.require_given(given, self.path)
        carried = {f.name: self.arguments[f.name] for f in dataclasses.fields(kind)
                   if f.name in self.arguments
                   and (self.arguments[f.name] is not None or f.default is None)}
        return kind(**{**carried, **given})

    def require_same_model(self, given: Mapping[str, Any]) -> None:
        """Raises UserError if a flag of the model was given that differs from the checkpoint's."""
        for name, value in given.items():
            carried = self.arguments.get(name)
            if carried not in (None, value) and (name, value) not in _LEAVES_OUT:
                raise UserError(
                    f"{flag_name(name)} {value} was given, but {self.path} was made with "
                    f"{carried}. Leave the flag out, or load another checkpoint.")


def open_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """Read once, on rank 0, for all ranks; all ranks call this.

    Raises UserError where there is no Megatron distributed checkpoint.
    """
    return parallel.on_rank_zero(lambda: read_checkpoint(folder))


def read_checkpoint(folder: str | os.PathLike) -> Checkpoint:
    """As open_checkpoint, on one rank."""
    found = training_folder.latest(folder) or Path(folder)
    # Without one of these files it would seem to be of another format, or version.
    integrity.verify_files(found, itertools.chain([FORMAT_FILE], compat.common_state_files(found)))
    require_readable(found)
    common = _common_state(found)
    args, has_optimizer = common.get("args"), "opt_param_scheduler" in common
    return Checkpoint(
        path=found, iteration=int(common["iteration"]),
        arguments=(bridge_arguments.read(found) if args is None
                   else arguments.translated(vars(args), found)),
        has_optimizer=has_optimizer, digest=_digest(found),
        is_optimizer_of_one_layout=has_optimizer and tied_to_a_layout(
            tensor.name for tensor in tensors_in(found)) is not None,
        lr_reached=main_parameters.lr_reached(common.get("optimizer", {})))


def _common_state(checkpoint: Path) -> dict:
    """Unpickled by torch, which is why its files have to be verified first."""
    try:
        return compat.load_common_state(checkpoint)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{checkpoint} holds objects that this megatron-core does not support "
            f"({str(error).splitlines()[0]}). Use the version that wrote the checkpoint."
            ) from error


def save(folder: str | os.PathLike, iteration: int, chunks: Sequence[Any], optimizer,
         scheduler, args: dict) -> None:
    """Every rank calls this. ``chunks`` are bare; what was saved before stays until it is done."""
    state = _model_state(chunks)
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(state, metadata=checkpoint_metadata())
        state["opt_param_scheduler"] = scheduler.state_dict()
    state.update(args=argparse.Namespace(**args), iteration=iteration, checkpoint_version=3.0)
    write_state(folder, iteration, state)


def write_state(folder: str | os.PathLike, iteration: int, state: dict) -> None:
    """A sharded state dict as the folder's newest checkpoint; every rank calls this."""
    from megatron.core import dist_checkpointing

    target = iteration_folder(folder, iteration)
    attendance.at(f"saving {target}")
    compat.start_saver()
    with stopping.postponed():
        parallel.on_rank_zero(lambda: _make_room(target))
        with _disk_errors_told(target):
            dist_checkpointing.save(state, str(target))
        parallel.barrier()
        integrity.write(target)
        parallel.on_rank_zero(lambda: _declare_whole(target, iteration))


def _make_room(target: Path) -> None:
    """An empty folder, and none that a run left which was killed while saving (rank 0)."""
    try:
        for path in target.parent.glob("iter_*"):
            if path == target or (iteration_of(path) is not None
                                  and not (path / FORMAT_FILE).is_file()):  # written last
                shutil.rmtree(path)
        target.mkdir(parents=True)
    except OSError as error:
        raise files.cannot_write(error.filename or target, error) from error


def _declare_whole(target: Path, iteration: int) -> None:
    """From here on the checkpoint is the newest one (rank 0)."""
    files.sync_files(target)  # Megatron leaves a part of it to the operating system
    with files.written_whole(target.parent / TRACKER, "w") as tracker:
        tracker.write(str(iteration))


@contextlib.contextmanager
def _disk_errors_told(target: Path) -> Iterator[None]:
    """Megatron writes in other processes, and says in its own words what became of it."""
    try:
        yield
    except BaseException as error:  # torch's CheckpointException is no Exception
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
            if os.strerror(number) in str(error):
                raise files.cannot_write(target, OSError(number, os.strerror(number))) from error
        if "inline_container" in str(error):  # torch's, which says no more of a write that failed
            raise files.cannot_write(target, OSError("only a part of it was written")) from error
        raise


def load_model(checkpoint: Path, chunks: Sequence[Any]) -> None:
    """Weights into bare chunks of any layout. Raises UserError if their shapes are others, and for
    a damaged file."""
    integrity.verify(checkpoint)
    state = _model_state(chunks)
    _require_same_tensors(checkpoint, state)
    loaded = compat.load_sharded(state, checkpoint)
    for key, chunk in zip(_model_keys(chunks), chunks, strict=True):
        _take(chunk, loaded[key])


def _take(chunk: Any, state: Mapping[str, Any]) -> None:
    found = chunk.load_state_dict(state, strict=False)
    # What layers of Transformer Engine keep beside their weights for FP8, and is empty without.
    missing = [name for name in found.missing_keys if not name.endswith("_extra_state")]
    assert not missing and not found.unexpected_keys, (missing, found.unexpected_keys)


def load_training(checkpoint: Path, chunks: Sequence[Any], optimizer,
                  scheduler) -> int:
    """Weights, optimizer and schedule; returns the iteration they are of."""
    from megatron.core import dist_checkpointing

    integrity.verify(checkpoint)
    stored = _common_state(checkpoint)
    if "opt_param_scheduler" not in stored:
        raise UserError(f"{checkpoint} holds weights but no optimizer. Add --no-load-optim to "
                        "start with a fresh one.")
    load_model(checkpoint, chunks)
    torch_adam.give_state(optimizer)
    known = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    state = optimizer.sharded_state_dict(
        _model_state(chunks), is_loading=True,
        metadata=checkpoint_metadata(main_parameters.has_chained_prefix(known)))
    torch_adam.load(optimizer, main_parameters.load_state(
        checkpoint, state, stored["optimizer"], known))
    scheduler.load_state_dict(stored["opt_param_scheduler"])
    return int(stored["iteration"])


def load_second_moments(checkpoint: Path, chunks: Sequence[Any],
                        shards: Sequence[ParameterShard]) -> dict[str, torch.Tensor]:
    """Adam's, by shard name, in the parameter's shape, in float32; all ranks call this.

    Read at any layout. Raises UserError for a checkpoint without moments of every parameter.
    """
    from megatron.core import dist_checkpointing

    integrity.verify(checkpoint)
    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    stored_as = {match[1]: key for key in stored if (match := _SECOND_MOMENTS_OF.match(key))}
    names = {id(shard.parameter): shard.name for shard in shards}
    wanted: dict[str, Any] = {}
    for chunk in chunks:
        sharded = chunk.sharded_state_dict(metadata=checkpoint_metadata())
        for local_name, parameter in chunk.named_parameters():
            if id(parameter) in names:
                wanted[names[id(parameter)]] = _of_second_moments(
                    sharded[local_name], parameter, stored_as)
    missing = [name for name, entry in wanted.items()
               if any(part.key not in stored for part in _sharded_tensors({name: entry}))]
    if missing:
        raise UserError(
            f"{checkpoint} holds no second moments of Adam for {missing[0]} and {len(missing) - 1} "
            "other parameters, which --precondition adam needs. Save it with its optimizer (with "
            "Megatron-LM and the distributed optimizer: --dist-ckpt-optim-fully-reshardable), or "
            "leave --precondition out.")
    loaded = compat.load_sharded(dict(wanted), checkpoint)  # and what all ranks share
    return {name: loaded[name] for name in wanted}


def _of_second_moments(entry: Any, parameter: torch.Tensor, stored_as: Mapping[str, str]) -> Any:
    """A parameter's entry of the checkpoint, for its moments. stored_as: keys of moments by those
    of parameters; what a factory builds has keys that begin with the factory's."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    part = next(_sharded_tensors({"": entry})).key
    key = stored_as.get(part, _SECOND_MOMENTS + part).removesuffix(part.removeprefix(entry.key))
    of_moments = {"dtype": torch.float32} if isinstance(entry, ShardedTensor) else {}
    return dataclasses.replace(
        entry, key=key, **of_moments,
        data=torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False))


def _model_keys(chunks: Sequence[Any]) -> list[str]:
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def _model_state(chunks: Sequence[Any]) -> dict:
    return {key: chunk.sharded_state_dict(metadata=checkpoint_metadata())
            for key, chunk in zip(_model_keys(chunks), chunks, strict=True)}


def _require_same_tensors(checkpoint: Path, state: dict) -> None:
    """Compares whole shapes with the file's before anything is loaded; all ranks call this.

    Raises UserError also for weights that the model lacks: without them it is another model.
    """
    from megatron.core import dist_checkpointing

    stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    tensors = list(_sharded_tensors(state))
    known = set().union(*parallel.gather_objects({tensor.key for tensor in tensors}))
    for tensor in tensors:
        found = stored.get(tensor.key)
        if found is None or (tuple(found.global_shape) != tuple(tensor.global_shape)
                             and not tensor.allow_shape_mismatch):
            shape = "nothing" if found is None else tuple(found.global_shape)
            raise UserError(
                f"{checkpoint} holds {shape} for {tensor.key}, but the flags describe a model "
                f"with {tuple(tensor.global_shape)}. Give the flags of the model that was saved.")
    for key in sorted(stored.keys() - known):
        if key.startswith(PARTS_OF_MODELS) and not key.startswith(_PREDICTION_HEADS):
            raise UserError(
                f"{checkpoint} holds {key}, which the model that the flags describe does not have. "
                "Give the flags of the model that was saved.")
    if any(key.startswith(_PREDICTION_HEADS) for key in stored.keys() - known):
        parallel.say(f"{checkpoint}: its heads for multi-token prediction are left out")


def _sharded_tensors(state: dict) -> Iterator:
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    for entry in nested_values(state):
        built = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        yield from (tensor for tensor in built if isinstance(tensor, ShardedTensor))


def _digest(checkpoint: Path) -> str:
    parts: list[bytes | str] = []
    for path in sorted(p for p in Path(checkpoint).iterdir() if p.is_file()):
        parts += [path.name, str(path.stat().st_size), *digests.both_ends(path)]
    return digests.digest(*parts)
