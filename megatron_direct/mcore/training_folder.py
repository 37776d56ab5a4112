"""The folder of a training: which states it has saved, and which of them is the newest.

It is laid out as Megatron-LM's: ``iter_0000300/`` for each saved iteration, and
``latest_checkpointed_iteration.txt``, which is written last and names the newest whole one.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_direct.errors import UserError
from megatron_direct.mcore.checkpoint_formats import (
    FORMAT_FILE,
    TRACKER,
    iteration_folder,
    iteration_of,
)
from megatron_direct.runtime import files, parallel, stopping

_STOPS = "stops.json"  # beside a training's checkpoints


def latest(folder: str | os.PathLike) -> Path | None:
    """The newest whole checkpoint in a folder, or the folder itself if it is one, or None."""
    folder = Path(folder)
    if (folder / FORMAT_FILE).is_file():
        return folder
    tracker = folder / TRACKER
    if not tracker.is_file():
        return None
    text = tracker.read_bytes().decode(errors="replace").strip()
    if text != "release" and not re.fullmatch("[0-9]{1,15}", text):
        older = ", ".join(sorted(path.name for path in folder.glob("iter_*"))) or "none"
        raise UserError(f"{tracker} holds {text[:40]!r}, where the number of an iteration was "
                        f"expected. Write the one to use into it; there are {older}.")
    return folder / text if text == "release" else iteration_folder(folder, int(text))


def saved_states(folder: str | os.PathLike, last: int = 0, upto: int | None = None) -> list[Path]:
    """The newest whole checkpoints of a training's folder, oldest first.

    ``last`` of them; for 0 those of the last quarter of its iterations. upto: the iteration that
    counts as the newest. A state that is there only because the training stopped is none of them,
    unless it is the newest. A folder that is itself a checkpoint stands for itself.
    """
    folder = Path(folder)
    newest = latest(folder)
    if newest is None or newest == folder or iteration_of(newest) is None:
        return [newest or folder]
    end = iteration_of(newest) if upto is None else upto
    assert end is not None
    there = {iteration: path.parent for path in folder.glob(f"iter_*/{FORMAT_FILE}")
             if (iteration := iteration_of(path.parent)) is not None}
    stops = set(_stops(folder)) - {end}
    iterations = sorted(iteration for iteration in there.keys() - stops if iteration <= end)
    taken = iterations[-last:] if last else [n for n in iterations if 4 * n > 3 * end]
    return [there[iteration] for iteration in taken]


def note_due(folder: str | os.PathLike, iteration: int, *, is_due: bool) -> None:
    """That the state of an iteration is saved because it is due, or only because the training
    stops there: without a stop there would be none. All ranks call this before they save it."""
    def note() -> None:
        stops = _stops(Path(folder))
        if is_due == (iteration in stops):
            files.write_json(Path(folder) / _STOPS, sorted({*stops} ^ {iteration}))

    with stopping.postponed():
        parallel.on_rank_zero(note)


def _stops(folder: Path) -> list[int]:
    """Iterations whose states are there only because the training stopped."""
    path = folder / _STOPS
    found = files.read_json(path) if path.is_file() else []
    if not isinstance(found, list) or not all(type(number) is int for number in found):
        raise UserError(f"{path} is damaged: it holds no list of iterations. Write [] into it, or "
                        "the iterations at which the training was stopped.")
    return found
