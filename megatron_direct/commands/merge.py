"""``megatron-direct merge``: the weights of several checkpoints, averaged into one.

The result is a checkpoint like any other: ``select``, ``anneal``, ``pretrain`` and ``evaluate``
read it in any layout. Any number of ranks share the work; flags of the layout are not needed.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from megatron_direct.config import ParallelConfig
from megatron_direct.errors import UserError
from megatron_direct.mcore.merging import Average
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.settings import Settings, flag
from megatron_direct.steps.merged import find_states, make_average


@dataclass(frozen=True)
class MergeConfig(Settings):
    """Average of checkpoints."""

    merge_load: tuple = flag(
        (), "the checkpoints: iterations (.../iter_0000300), or folders of a training, of which "
        "the last states are taken (--merge-last)", nargs="+", required=True)
    merge_last: int = flag(
        0, "of a folder of a training, how many states to take, up to the newest; 0: those of the "
        "last quarter of its iterations", at_least=0)
    weights: tuple = flag(
        (), "a weight for each state, in their order (of one folder, oldest first); they are "
        "divided by their sum; default: equal weights", nargs="+")
    merge_optimizer: str = flag(
        "none", "optimizer state of the result: none, or that of the last state, with averaged "
        "main parameters", choices=("none", "last"))
    save: str = flag("", "folder for the averaged checkpoint", required=True)

    def check(self) -> None:
        try:
            values = [float(weight) for weight in self.weights]
        except ValueError:
            raise UserError(f"--weights {' '.join(self.weights)}: expected numbers.") from None
        if values and not (0 < sum(values) < float("inf") and all(value >= 0 for value in values)):
            raise UserError(f"--weights {' '.join(map(str, self.weights))}: expected "
                            "numbers of at least 0, with a finite sum that is not 0.")


@dataclass(frozen=True)
class MergeRequest:
    merge: MergeConfig
    layout: ParallelConfig = field(default_factory=ParallelConfig)


def merge(request: MergeRequest) -> None:
    """All ranks call this."""
    config = request.merge
    states = find_states([os.fspath(path) for path in config.merge_load], config.merge_last, None,
                         "--merge-load")
    weights = [float(weight) for weight in config.weights] or [1.0] * len(states)
    if len(weights) != len(states):
        raise UserError(f"--weights gives {len(weights)} weights for {len(states)} states: "
                        f"{', '.join(str(state.path) for state in states)}. Give one for each.")
    total = sum(weights)
    run = RunDirectory(config.save)
    with run.entered("merge", request):
        make_average(Average(states, [weight / total for weight in weights],
                             config.merge_optimizer == "last"), run.path, "--save")
