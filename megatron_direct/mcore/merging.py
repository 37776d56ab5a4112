"""The weights of several checkpoints, averaged into one, whatever layouts they were written in.

No model is built: tensors are known by their names and whole shapes in the checkpoints, and each
rank averages a fragment of each. They are read a few hundred MiB at a time, one checkpoint after
the other, so that all ranks together hold one model, the one that is written, and never two.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_direct.config import ModelConfig
from megatron_direct.errors import UserError
from megatron_direct.mcore import checkpoint, compat
from megatron_direct.mcore.checkpoint import Checkpoint
from megatron_direct.mcore.checkpoint_formats import tied_to_a_layout
from megatron_direct.runtime import parallel
from megatron_direct.settings import flag_name

_OF_OPTIMIZER = re.compile(r"^(chained_\d+\.)?optimizer\.")
# Main parameters are weights, too; the distributed optimizer calls them ``param``.
_MAIN_PARAMETERS = re.compile(r"^(chained_\d+\.)?optimizer\.state\.(fp32_param|param)\.")
_OPTIMIZER_STATE = ("optimizer", "opt_param_scheduler")  # names in the common state
_COMMON_STATE = "common_state"  # since 0.19 an object beside the tensors
_READ_AT_ONCE = 1 << 28  # bytes per rank


@dataclass(frozen=True)
class Average:
    """Of states, oldest first, by weights that sum to 1. keeps_optimizer: the state of the last
    one's optimizer goes with the weights."""

    states: Sequence[Checkpoint]
    weights: Sequence[float]
    keeps_optimizer: bool = False

    @classmethod
    def uniform(cls, states: Sequence[Checkpoint]) -> Average:
        return cls(states, [1 / len(states)] * len(states))


def write_average(average: Average, folder: Path) -> None:
    """A checkpoint in ``folder`` with the last state's iteration and flags; all ranks call this.

    Integers, and whatever else is no tensor of real numbers, are the last state's. Raises
    UserError, before anything is written, for states of different models.
    """
    stored = parallel.on_rank_zero(lambda: _tensors_of_one_model(average))
    last = average.states[-1]
    common = {name: value for name, value in compat.load_common_state(last.path).items()
              if average.keeps_optimizer or name not in _OPTIMIZER_STATE}
    taken = {key: entry for key, entry in stored.items()
             if average.keeps_optimizer or not _OF_OPTIMIZER.match(key)}
    tensors: dict[str, Any] = {}
    for keys in _portions(taken):
        tensors |= _averaged({key: taken[key] for key in keys}, average)
    checkpoint.write_state(folder, last.iteration, {**common, **tensors, **_objects(average)})


def _tensors_of_one_model(average: Average) -> dict[str, Any]:
    """{key: sharded tensor without data} of the last state (rank 0)."""
    last = average.states[-1]
    expected = _stored(last.path)
    for state in average.states[:-1]:
        _require_same_flags(state, last)
        _require_same_tensors(state.path, _stored(state.path), last.path, expected,
                              average.keeps_optimizer)
    if average.keeps_optimizer:
        for state in average.states:
            if not state.has_optimizer:
                raise UserError(f"{state.path} holds no optimizer, and --merge-optimizer last "
                                "averages the main parameters that come with it. Leave it out "
                                "with --merge-optimizer none.")
        tied = tied_to_a_layout(expected)
        if tied is not None:
            raise UserError(
                f"{last.path} holds its optimizer ({tied}) as it lies in one layout. Save with "
                "--dist-ckpt-optim-fully-reshardable, or leave it out with --merge-optimizer "
                "none.")
    return expected


def _stored(path: Path) -> dict[str, Any]:
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_tensors_metadata(str(path))


def _require_same_flags(state: Checkpoint, last: Checkpoint) -> None:
    names = [f.name for f in dataclasses.fields(ModelConfig)] + ["tokenizer_digest"]
    for name in names:
        found, expected = (of.arguments.get(name) for of in (state, last))
        if found is not None and expected is not None and found != expected:
            raise UserError(
                f"{state.path} was made with {flag_name(name)} {found}, but {last.path} with "
                f"{expected}: weights of different models cannot be averaged. Leave one out.")


def _require_same_tensors(path: Path, found: Mapping[str, Any], last: Path,
                          expected: Mapping[str, Any], with_optimizer: bool) -> None:
    def shape(of: Mapping[str, Any], key: str) -> str:
        return f"{tuple(of[key].global_shape)} in {of[key].dtype}" if key in of else "nothing"

    for key in sorted(found.keys() | expected.keys()):
        of_optimizer = _OF_OPTIMIZER.match(key) and not (with_optimizer
                                                         and _MAIN_PARAMETERS.match(key))
        if not of_optimizer and shape(found, key) != shape(expected, key):
            raise UserError(
                f"{path} holds {shape(found, key)} for {key}, but {last} holds "
                f"{shape(expected, key)}: weights of different models cannot be averaged. Leave "
                "one out.")


def _portions(stored: Mapping[str, Any]) -> Iterator[list[str]]:
    """Keys of tensors that are read together; the same on every rank."""
    portion: list[str] = []
    size, limit = 0, _READ_AT_ONCE * parallel.world_size()
    for key, entry in stored.items():
        portion.append(key)
        size += entry.dtype.itemsize * _num_entries(entry)
        if size >= limit:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _num_entries(entry) -> int:
    return torch.Size(entry.global_shape).numel()


def _averaged(entries: Mapping[str, Any], average: Average) -> dict[str, Any]:
    """{key: this rank's fragment of the average}, of tensors that have one here."""
    last = average.states[-1]
    fragments = _read(entries, last.path)
    sums = {key: torch.zeros(fragment.data.shape, dtype=torch.float64)
            for key, fragment in fragments.items() if _is_weight(key, fragment)}
    weights = {key: entry for key, entry in entries.items() if _is_weight(key, entry)}
    for state, weight in zip(average.states, average.weights, strict=True):
        read = fragments if state is last else _read(weights, state.path)
        for key, total in sums.items():
            total.add_(read[key].data.double(), alpha=weight)
    for key, total in sums.items():
        fragments[key].data.copy_(total)
    return fragments


def _is_weight(key: str, entry) -> bool:
    return entry.dtype.is_floating_point and (not _OF_OPTIMIZER.match(key)
                                              or bool(_MAIN_PARAMETERS.match(key)))


def _read(entries: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """This rank's fragments of tensors, with their data; all ranks call this."""
    fragments = {key: fragment for key, entry in entries.items()
                 if (fragment := _fragment(entry)) is not None}
    loaded = compat.load_sharded(dict(fragments), path)
    return {key: dataclasses.replace(fragment, data=loaded[key])
            for key, fragment in fragments.items()}


def _fragment(entry):
    """The part of a tensor that is this rank's, or None: of equal parts along the axis that can be
    cut into the most, at most as many as there are ranks."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    rank, world_size = parallel.rank_and_size()
    shape = list(entry.global_shape)
    parts = [max(n for n in range(1, world_size + 1) if size % n == 0) for size in shape]
    axis = max(range(len(shape)), key=lambda i: parts[i], default=0)
    count = parts[axis] if shape else 1
    if rank >= count:
        return None
    cut = [(axis, rank, count)] if shape else []
    shape[axis: axis + 1] = [size // count for size in shape[axis: axis + 1]]
    return ShardedTensor.from_rank_offsets(entry.key, torch.empty(shape, dtype=entry.dtype), *cut)


def _objects(average: Average) -> dict[str, Any]:
    """What the last state holds beside tensors for parts of the model; all ranks call this."""
    path = average.states[-1].path
    found = compat.load_sharded_objects(path) if parallel.is_rank_zero() else {}
    wanted = {name: entry for name, entry in found.items() if entry.key != _COMMON_STATE
              and (average.keeps_optimizer or not _OF_OPTIMIZER.match(entry.key))}
    loaded = compat.load_sharded(dict(wanted), path)
    return {name: dataclasses.replace(entry, data=loaded[name]) for name, entry in wanted.items()}
