"""Averages of a training's last states: artefacts made of checkpoints alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_direct.errors import UserError
from megatron_direct.mcore import training_folder
from megatron_direct.mcore.checkpoint import Checkpoint, read_checkpoint
from megatron_direct.mcore.merging import Average, write_average
from megatron_direct.runtime import parallel
from megatron_direct.runtime.manifest import Artefact, Key, State


@dataclass(frozen=True)
class AverageKey(Key):
    """What averaged weights depend on."""

    state_digests: tuple[str, ...]
    weights: tuple[float, ...]
    keeps_optimizer: bool = False


def average_key(average: Average) -> AverageKey:
    return AverageKey(tuple(state.digest for state in average.states), tuple(average.weights),
                      average.keeps_optimizer)


def make_average(average: Average, folder: Path, flag: str = "--run-dir") -> AverageKey:
    """The averaged checkpoint in ``folder``, made if it is not there; all ranks call this. flag: by
    which a user gives the folder, or one that it is in."""
    key, artefact = average_key(average), Artefact(folder, "an average", flag)
    if parallel.on_rank_zero(lambda: artefact.state(key)) is State.FINISHED:
        parallel.say(f"{folder} already holds this average.")
        return key
    parallel.on_rank_zero(lambda: artefact.begin(key))
    write_average(average, folder)
    parallel.on_rank_zero(lambda: artefact.finish(
        key, {"states": [str(state.path) for state in average.states]}))
    iterations = [state.iteration for state in average.states]
    parallel.say(f"{folder}: the average of {len(iterations)} states, of iterations "
                 f"{', '.join(map(str, iterations))}")
    return key


def find_states(folders: Sequence[str], last: int, upto: int | None, flag: str,
                ) -> list[Checkpoint]:
    """The states that are in these folders, in their order; all ranks call this.

    last, upto: as in saved_states. flag: by which a user gives the folders. Raises UserError
    unless there are two at least.
    """
    def find() -> list[Checkpoint]:
        found = [read_checkpoint(path) for folder in folders
                 for path in training_folder.saved_states(folder, last, upto)]
        if len(found) < 2:
            where = ", ".join(folders)
            raise UserError(
                f"an average needs at least two states, and {where} has {len(found)} to take"
                + ("" if last else " in the last quarter of its iterations")
                + f". Name others with {flag}, take more with --merge-last, or train again with "
                "a smaller --save-interval.")
        if len({state.digest for state in found}) < len(found):
            raise UserError(f"{flag} names a state twice. Name each once; --weights gives one "
                            "state more weight than another.")
        return found

    return parallel.on_rank_zero(find)
