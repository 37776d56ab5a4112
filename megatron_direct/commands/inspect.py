"""``megatron-direct inspect``: what masks hold, masks made of masks, and masks made datasets; and
what a checkpoint holds, without running anything that is in it."""

from __future__ import annotations

import functools
import math
import operator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_direct.config import ParallelConfig
from megatron_direct.data import indexed
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.materialize import materialize
from megatron_direct.errors import UserError
from megatron_direct.mcore import checkpoint_contents, integrity
from megatron_direct.mcore.training_folder import latest
from megatron_direct.reports.tables import Table, make_table, text_table
from megatron_direct.runtime import parallel
from megatron_direct.settings import Settings, flag, flag_name

_OPERATIONS = {"and": operator.and_, "or": operator.or_, "minus": operator.sub}


@dataclass(frozen=True)
class InspectConfig(Settings):
    """Masks and checkpoints."""

    mask: tuple = flag((), "mask files", nargs="+")
    checkpoint: str = flag("", "checkpoint to list and to compare with its checksums; nothing in "
                               "it is run, so that it need not be trusted")
    operation: str | None = flag(
        None, "combine the masks given into one: documents that all keep (and), that any keeps "
        "(or), or that the first keeps and no other does (minus)", choices=tuple(_OPERATIONS))
    output: str = flag("", "file for the mask that --operation makes")
    data_path: tuple = flag(
        (), "the datasets that the masks belong to, in any order; needed to count tokens",
        nargs="+")
    list_documents: bool = flag(
        False, "print, in place of statistics, the numbers of the documents that the mask keeps, "
        "one a line; needs one mask, or --operation")
    materialize: str = flag(
        "", "prefix of a new indexed dataset with the documents that the mask keeps; needs one "
        "mask, or --operation, and its dataset in --data-path")

    def check(self) -> None:
        if not self.mask and not self.checkpoint:
            raise UserError("--mask and --checkpoint are both missing. Give one of them.")
        of_masks = [flag_name(name) for name in (
            "operation", "output", "data_path", "list_documents", "materialize")
            if getattr(self, name)]
        if of_masks and not self.mask:
            raise UserError(f"{of_masks[0]} is about masks. Add --mask.")


@dataclass(frozen=True)
class InspectRequest:
    masks: InspectConfig
    layout: ParallelConfig = field(default_factory=ParallelConfig)


def inspect(request: InspectRequest) -> None:
    """Prints a line of statistics for each mask, or the documents of one; writes what the flags
    ask for."""
    if request.masks.checkpoint:
        _inspect_checkpoint(request.masks.checkpoint)
    if request.masks.mask:
        parallel.on_rank_zero(lambda: _inspect_masks(request.masks))


def _inspect_checkpoint(folder: str) -> None:
    """All ranks call this: they share the work of comparing checksums."""
    found = parallel.on_rank_zero(lambda: latest(folder) or Path(folder))
    tensors = parallel.on_rank_zero(lambda: checkpoint_contents.tensors_in(found))
    weights = [tensor for tensor in tensors if tensor.is_weight]
    rows = [[tensor.name, " x ".join(map(str, tensor.shape)), tensor.dtype.removeprefix("torch.")]
            for tensor in weights]
    parallel.say(text_table(make_table(["weight", "shape", "type"], rows, left=(0, 2))))
    parallel.say(f"{found}: {len(weights)} weights with "
                 f"{sum(math.prod(tensor.shape) for tensor in weights):,} numbers, and "
                 f"{len(tensors) - len(weights)} tensors of an optimizer")
    integrity.verify(found)
    has_checksums = parallel.on_rank_zero((found / integrity.MANIFEST).is_file)
    parallel.say("checksums: " + ("as written" if has_checksums else
                                  f"none ({integrity.MANIFEST} is missing)"))


def _inspect_masks(config: InspectConfig) -> None:
    masks = [(path, SampleMask.load(path)) for path in config.mask]
    if config.output and config.operation is None:
        raise UserError("--output is for the mask that --operation makes. Add --operation.")
    if config.operation is not None:
        made = functools.reduce(_OPERATIONS[config.operation], (mask for _, mask in masks))
        masks.append((config.output or f"({config.operation})", made))
        if config.output:
            made.save(config.output)
    datasets = _datasets(config.data_path, masks)
    _, mask = masks[-1]
    for name in ("list_documents", "materialize"):
        if getattr(config, name) and len(masks) > 1 and config.operation is None:
            raise UserError(f"{flag_name(name)} is for the documents of one mask, but several were "
                            "given. Give one, or combine them with --operation.")
    if config.list_documents:
        print("".join(f"{number}\n" for number in np.flatnonzero(mask.keep)), end="", flush=True)
    else:
        print(text_table(statistics(masks, datasets)), flush=True)
    if config.materialize:
        prefix = datasets.get(mask.dataset_digest)
        if prefix is None:
            raise UserError("--materialize needs the dataset that the mask belongs to. Give it "
                            "with --data-path.")
        written = materialize(prefix, mask, config.materialize)
        print(f"{config.materialize}: {written.documents} documents, {written.tokens} tokens",
              flush=True)


def _datasets(prefixes: tuple, masks: list[tuple[str, SampleMask]]) -> dict[str, str]:
    """{digest: prefix}. Raises UserError for a dataset that no mask belongs to."""
    found = {}
    wanted = {mask.dataset_digest for _, mask in masks}
    for prefix in prefixes:
        digest = indexed.dataset_digest(prefix)
        if digest not in wanted:
            raise UserError(f"none of the masks belongs to {prefix} (digest {digest}): it is a "
                            "different dataset, or was rebuilt. Correct --data-path.")
        found[digest] = prefix
    return found


def statistics(masks: list[tuple[str, SampleMask]], datasets: dict[str, str]) -> Table:
    """Documents kept of all, tokens kept of all where the dataset is known, origin; of masks with
    counts also how often all of them are seen per epoch, and one at most.

    masks: names and masks; datasets: {digest: prefix}.
    """
    rows, counted = [], any(mask.max_count > 1 for _, mask in masks)
    for path, mask in masks:
        tokens = ["-"] * 3
        if mask.dataset_digest in datasets:
            lengths = indexed.document_lengths(indexed.open_indexed(datasets[mask.dataset_digest]))
            tokens = _counts(int(lengths.sum()),
                             int(lengths.astype(np.int64) @ mask.counts.astype(np.int64)))
        rows.append([Path(path).name, *_counts(mask.num_documents, mask.num_kept),
                     *([str(mask.num_seen), str(mask.max_count)] if counted else []), *tokens,
                     datasets.get(mask.dataset_digest, mask.dataset_digest), mask.run or "-"])
    header = ["mask", "documents", "kept", "share", *(["seen", "most"] if counted else []),
              "tokens", "kept", "share", "dataset", "run"]
    return make_table(header, rows, left=(0, len(header) - 2, len(header) - 1))


def _counts(whole: int, kept: int) -> list[str]:
    return [str(whole), str(kept), f"{kept / max(whole, 1):.4f}"]
