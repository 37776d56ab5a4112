"""Which mask belongs to which prefix of a blend, from what a user gives on a command line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from megatron_direct.data.mask import SampleMask
from megatron_direct.errors import UserError

SUFFIX = ".mask.npz"


def find_mask_files(prefixes: Sequence[str], pairs: Sequence[tuple[str, str]] = (),
                    folder: str | None = None) -> dict[str, str]:
    """{prefix: mask file}; a prefix without one is not in it.

    pairs: ``--sample-mask PREFIX FILE``. folder: ``--sample-masks DIR``, where a prefix's mask is
    called by the last part of its path, as a run directory has it, or by the whole path.

    Raises UserError for a mask that finds no prefix, since that prefix would be seen whole; but not
    for one in the folder that keeps nothing, whose prefix the blend files of a selection leave out.
    """
    found: dict[str, str] = {}
    for prefix, path in pairs:
        if prefix not in prefixes:
            raise UserError(f"--sample-mask {prefix} is not in the blend, whose prefixes are "
                            f"{', '.join(prefixes)}. Give one of these.")
        if prefix in found:
            raise UserError(f"--sample-mask is given twice for {prefix}. Give one mask for each "
                            "prefix; `megatron-direct inspect` can combine two masks.")
        found[prefix] = path
    if folder is not None:
        _from_folder(found, prefixes, Path(folder))
    return found


def read_mask_files(mask_files: dict[str, str]) -> dict[str, SampleMask]:
    return {prefix: SampleMask.load(path) for prefix, path in mask_files.items()}


def _from_folder(found: dict[str, str], prefixes: Sequence[str], folder: Path) -> None:
    there = {path.name: path for path in sorted(folder.glob(f"*{SUFFIX}"))}
    if not there:
        raise UserError(f"--sample-masks {folder} holds no *{SUFFIX}. Give the masks folder of a "
                        "selection.")
    taken: dict[str, str] = {}
    for prefix in prefixes:
        names = (os.path.basename(prefix), prefix.strip("/").replace("/", "__"))
        matching = [name + SUFFIX for name in dict.fromkeys(names) if name + SUFFIX in there]
        if not matching or prefix in found:
            continue
        name = matching[-1]  # the longer name says more
        if name in taken:
            raise UserError(f"{folder / name} could belong to {taken[name]} and to {prefix}. Say "
                            "which with --sample-mask PREFIX FILE.")
        taken[name] = prefix
        found[prefix] = str(there[name])
    given = {os.path.realpath(path) for path in found.values()}
    left = [str(path) for path in there.values()
            if os.path.realpath(path) not in given and SampleMask.load(path).num_kept]
    if left:
        raise UserError(
            f"no prefix of the blend matches {', '.join(left)}. Say which dataset each "
            "belongs to with --sample-mask PREFIX FILE, or move it out of the folder.")
