"""How much of a selection is a choice, and how much is chance.

The selection is made again twice, each time from half of the validation set, half of the sketch's
coordinates and half of the texts' n-grams, so that the two share none of them (worth.py). What
both select would be selected again; of the rest, another validation set of the same kind, or
another seed, would select something else.

Shapes: N candidates, K selected, k coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence, Half
from megatron_direct.selection.halves import halves_of
from megatron_direct.selection.treatment import select_by_sketches


@dataclass(frozen=True)
class Stability:
    """samples: share of the samples of one half's selection that the other's has, too; by_chance:
    what two selections at random within the same clusters would share; clusters: share of the
    samples that could be paired with one of the same cluster."""

    samples: float
    by_chance: float
    clusters: float

    def __str__(self) -> str:
        return (f"stability: selected from half of the validation set and of the sketch, twice, "
                f"two selections share {self.samples:.0%} of their samples (drawn at random within "
                f"the same clusters, {self.by_chance:.0%}) and {self.clusters:.0%} of their "
                "clusters")


@dataclass(frozen=True, eq=False)
class Repeating:
    """again: [N] bool, what is selected from all of the evidence and from both halves; clusters:
    [N] numbers; others_drawn: whether the rest of the selection was drawn at random."""

    again: np.ndarray
    clusters: np.ndarray
    others_drawn: bool


def halves(config: SelectionConfig, evidence: Evidence, num_select: int, seed: int,
           ) -> tuple[np.ndarray, np.ndarray]:
    """[N] bool each: what is selected from the two halves of the evidence; all ranks call this."""
    def chosen(part: Half) -> np.ndarray:
        found = np.zeros(evidence.share().num_samples, dtype=bool)
        found[select_by_sketches(config, evidence.half(part), num_select, seed)[0].indices] = True
        return found

    first, second = halves_of(evidence, seed)
    return chosen(first), chosen(second)


def stability(first: np.ndarray, second: np.ndarray, clusters: np.ndarray) -> Stability:
    """first, second: [N] bool, K each; clusters: [N] numbers."""
    sizes = np.bincount(clusters)
    ours, theirs = (np.bincount(clusters, chosen, len(sizes)) for chosen in (first, second))
    count = first.sum()
    return Stability(float((first & second).sum() / count),
                     float((ours * theirs / np.maximum(sizes, 1)).sum() / count),
                     float(np.minimum(ours, theirs).sum() / count))
