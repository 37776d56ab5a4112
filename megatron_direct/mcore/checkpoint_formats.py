"""Which of Megatron's formats a checkpoint is in, told by its files before anything is loaded.

``torch_dist`` is the one that is read: its tensors can be loaded in any layout. What Megatron does
with the others ends in an error that names neither the format nor a way out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from megatron_direct.errors import UserError
from megatron_direct.mcore import compat

TRACKER = "latest_checkpointed_iteration.txt"
FORMAT_FILE = "metadata.json"  # written last, and by Megatron's own formats alone

# How the names of a model's tensors begin; an optimizer's have something before them.
PARTS_OF_MODELS = ("embedding.", "decoder.", "output_layer.", "mtp.")

# Buffers of the distributed optimizer as they lie in one layout, which it saves by default.
_OF_ONE_LAYOUT = re.compile(r"^(chained_\d+\.)?optimizer\.distributed\.")

_RESAVE = "--ckpt-convert-format torch_dist --ckpt-convert-save FOLDER"


def tied_to_a_layout(names: Iterable[str]) -> str | None:
    """The first of a checkpoint's tensors that is of such buffers."""
    return next(filter(_OF_ONE_LAYOUT.match, names), None)


def iteration_folder(training: str | os.PathLike, iteration: int) -> Path:
    """Of a checkpoint, in the folder of its training."""
    return Path(training) / f"iter_{iteration:07d}"


def iteration_of(folder: Path) -> int | None:
    """Of a checkpoint, by its folder's name; None for any other folder, such as a copy."""
    found = re.fullmatch(r"iter_(\d+)", folder.name)
    return int(found[1]) if found else None


def require_readable(checkpoint: Path) -> None:
    """Raises UserError unless ``checkpoint`` is one that this megatron-core can read."""
    if (checkpoint / FORMAT_FILE).is_file():
        require_torch_dist(checkpoint)
        _require_common_state(checkpoint)
    elif (checkpoint / ".metadata").is_file():
        raise UserError(
            f"{checkpoint} is in torch's own format (--ckpt-format fsdp_dtensor or torch_dcp), "
            "and torch_dist is expected. What Megatron-FSDP saved, Megatron-LM converts: python "
            "tools/checkpoint/checkpoint_inspector.py convert-fsdp-dtensor-to-torch-dist "
            f"{checkpoint} FOLDER. Otherwise save with --ckpt-format torch_dist.")
    elif any(checkpoint.glob("mp_rank_*")):
        raise UserError(
            f"{checkpoint} is in Megatron's old format (--ckpt-format torch), which is tied to a "
            "layout, and torch_dist is expected. Megatron-LM converts it: load it in the layout "
            f"it was trained in, with {_RESAVE}.")
    else:
        raise UserError(
            f"{checkpoint} holds no Megatron distributed checkpoint: expected {TRACKER} and the "
            f"iteration it names, or {FORMAT_FILE}. Correct --load, or run pretrain first.")


def require_torch_dist(checkpoint: Path) -> None:
    """Raises UserError unless ``metadata.json`` names that format."""
    try:
        found = json.loads((checkpoint / FORMAT_FILE).read_text())["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{checkpoint}/{FORMAT_FILE} names no format ({error!r}): expected "
            '{"sharded_backend": "torch_dist", ...}. Copy the checkpoint again, or take an earlier '
            "iteration.") from error
    if found == "zarr":
        raise UserError(
            f"{checkpoint} is in the zarr format, which Megatron no longer reads since 0.16; "
            f"torch_dist is expected. Convert it with Megatron-LM core_v0.15: load it with "
            f"{_RESAVE}.")
    if found != "torch_dist":
        raise UserError(f"{checkpoint} is in the format {found}, and torch_dist is expected. Save "
                        "it with --ckpt-format torch_dist.")


def _require_common_state(checkpoint: Path) -> None:
    if not compat.can_read_common_state(checkpoint):
        raise UserError(
            f"{checkpoint} has no common.pt: it was written by megatron-core 0.19 or later, which "
            f"megatron-core {compat.version()}, installed here, cannot read. Install the version "
            "that wrote it (0.17 and later need Python 3.12). If it was copied, look for "
            "common.pt where it came from.")
