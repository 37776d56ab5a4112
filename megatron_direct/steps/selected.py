"""A selection on disk: its summary, and a mask for each pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_direct.data import indexed, mask_files
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.runtime import files, parallel, typed_json
from megatron_direct.runtime.manifest import Artefact
from megatron_direct.selection.auto import HowMany
from megatron_direct.selection.distilled import Distilled
from megatron_direct.selection.stability import Stability
from megatron_direct.steps.draw import Draw


@dataclass(frozen=True)
class SelectionOrigin:
    """On what a selection was made: paths as they were given, digests of all of them by prefix, and
    the values of the ModelConfig. tokenizer_model: of its typical samples' texts, "" for tokens."""

    load: str
    checkpoint_digest: str
    data_path: tuple[str, ...]
    valid_data_path: tuple[str, ...]
    digests: dict[str, str]
    model: dict[str, Any]
    tokenizer_model: str = ""


def selection_folder(run_path: Path, name: str) -> Path:
    return run_path / "selections" / name


def arm_folder(run_path: Path, arm: str) -> Path:
    return run_path / "anneal" / arm


def selection_names(run_path: Path) -> list[str]:
    """Of those that are finished; the default one first."""
    folders = (path.parent for path in run_path.glob("selections/*/manifest.json"))
    names = [folder.name for folder in folders if Artefact(folder, "a selection").is_finished()]
    return sorted(names, key=lambda name: (name != "direct", name))


def find_selection(run_path: Path, name: str) -> tuple[SelectionOrigin, SelectionSummary]:
    """Of a finished selection (rank 0). Raises UserError if there is none of this name."""
    found = Artefact(selection_folder(run_path, name), "a selection").read()
    if found is None or not found["finished"]:
        there = selection_names(run_path)
        raise UserError(
            f"{run_path} holds no finished selection named {name}"
            + (f" (it holds {', '.join(there)})" if there else "") + ". Run `megatron-direct "
            f"select --run-dir {run_path}` first, or correct --selection or --run-dir.")
    return typed_json.from_json(SelectionOrigin, found["details"]), \
        SelectionSummary.read(selection_folder(run_path, name))


@dataclass(frozen=True)
class PoolComposition:
    """Of one pool: candidates, selected (each as often as its count says), and how many of each
    were corrupted on purpose."""

    samples: int
    selected: int
    corrupted: int
    selected_corrupted: int


@dataclass(frozen=True)
class SampleCounts:
    """in_pools: documents; cut: at the sequence length, so many tokens of them; not_finite: without
    a finite gradient."""

    in_pools: int
    too_short: int
    cut: int
    cut_tokens: int
    not_finite: int


@dataclass(frozen=True)
class MeanLoss:
    """Per token, before annealing."""

    pool: float
    selected: float


@dataclass(frozen=True)
class SelectionSummary:
    """``selection.json``. composition, mask_digests: by pool; not_finite: numbers of the samples
    that can never be selected; history: the solver's steps; how_many: why so many, None if the
    number was given; stability, draw: None where there was nothing to choose; distilled: None where
    all samples have sketches. With it, costs, mean losses, how_many and stability are of those that
    have, and so is draw but for ``predicted``."""

    objective: str
    num_select: int
    objective_value: float
    upper_bound: float | None
    status: str
    stiff_cost: float
    stiff_budget: float | None
    least_stiff_cost: float
    average_stiff_cost: float
    num_stiff: int
    samples: SampleCounts
    mean_loss: MeanLoss
    composition: dict[str, PoolComposition]
    mask_digests: dict[str, str]
    not_finite: tuple[int, ...] = ()
    history: tuple[Any, ...] = ()
    how_many: HowMany | None = None
    stability: Stability | None = None
    distilled: Distilled | None = None
    draw: Draw | None = None

    @classmethod
    def read(cls, folder: Path) -> SelectionSummary:
        return typed_json.read_record(cls, folder / "selection.json")

    def write(self, folder: Path) -> None:
        files.write_json(folder / "selection.json", typed_json.to_json(self))

    def __str__(self) -> str:
        counts = self.samples
        lines = [f"selection: {self.num_select} of {counts.in_pools} samples by {self.objective}, "
                 f"{self.status}; {counts.cut} cut at the sequence length, {counts.too_short} too "
                 f"short, {counts.not_finite} not finite"]
        for name, part in self.composition.items():
            corrupted = (f" (corrupted: {part.selected_corrupted} of {part.corrupted})"
                         if part.corrupted else "")
            lines.append(f"  {name}: {part.selected} of {part.samples}{corrupted}")
        lines += [str(part) for part in (self.how_many, self.stability, self.draw, self.distilled)
                  if part is not None]
        return "\n".join(lines)


def masks_of(samples: Samples, digests: Sequence[str], chosen: np.ndarray) -> dict[str, SampleMask]:
    """One mask for each dataset, from the numbers of the samples that were chosen, each as often as
    it shall be seen per epoch."""
    counts = np.bincount(chosen, minlength=len(samples))
    return {prefix: SampleMask(counts[samples.first[i]: samples.first[i + 1]], digest)
            for i, (prefix, digest) in enumerate(zip(samples.prefixes, digests, strict=True))}


def write_masks(folder: Path, masks: Mapping[str, SampleMask], subfolder: str = "masks",
                ) -> dict[str, str]:
    """{name of the pool: digest of its mask}, of masks that name the folder as their origin."""
    names = indexed.prefix_names(list(masks))
    for prefix, mask in masks.items():
        mask.with_run(str(folder)).save(mask_path(folder, names[prefix], subfolder))
    return {names[prefix]: mask.digest for prefix, mask in masks.items()}


def mask_path(folder: Path, name: str, subfolder: str = "masks") -> Path:
    return folder / subfolder / f"{name}{mask_files.SUFFIX}"


def load_masks(folder: Path, prefixes: Sequence[str], digests: Mapping[str, str],
               ) -> dict[str, SampleMask]:
    """The masks of a selection, read on rank 0 and given to all ranks.

    digests: by name of the pool, as the selection recorded them. Raises UserError for a mask that
    is another one.
    """
    names = indexed.prefix_names(list(prefixes))

    def read() -> dict[str, SampleMask]:
        masks = {}
        for prefix in prefixes:
            path = mask_path(folder, names[prefix])
            masks[prefix] = SampleMask.load(path)
            if masks[prefix].digest != digests.get(names[prefix]):
                raise UserError(f"{path} was changed or replaced after the selection. Delete the "
                                "folder of the selection, and run select again.")
        return masks

    return parallel.on_rank_zero(read)


def composition(samples: Samples, chosen: np.ndarray) -> dict[str, PoolComposition]:
    """By name of the pool."""
    names = indexed.prefix_names(samples.prefixes)
    counts = np.bincount(chosen, minlength=len(samples))
    result = {}
    for i, prefix in enumerate(samples.prefixes):
        here = slice(samples.first[i], samples.first[i + 1])
        selected, corrupted = counts[here], samples.corrupted[here]
        result[names[prefix]] = PoolComposition(
            len(selected), int(selected.sum()), int(corrupted.sum()),
            int(selected[corrupted].sum()))
    return result
