"""How much of a selection is a choice, and how much is chance.

The selection is made again twice, each time from half of the validation set and half of the
sketch's coordinates, so that the two share neither validation samples nor hashes (worth.py). What
both select would be selected again; of the rest, another validation set of the same kind, or
another seed, would select something else.

Shapes: N candidates, K selected, k coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.treatment import select_by_sketches
from megatron_direct.selection.worth import first_coordinates, source_blocks


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


def halves(config: SelectionConfig, evidence: Evidence, num_select: int, seed: int,
           ) -> tuple[np.ndarray, np.ndarray]:
    """[N] bool each: what is selected from the two halves of the evidence; all ranks call this."""
    coordinates = first_coordinates(evidence.rows.shape[1], seed)
    valid = source_blocks(evidence) % 2 == 0
    found = []
    for part, samples in ((coordinates, valid), (~coordinates, ~valid)):
        chosen = np.zeros(evidence.share().num_samples, dtype=bool)
        chosen[select_by_sketches(config, evidence.half(part, samples), num_select,
                                  seed)[0].indices] = True
        found.append(chosen)
    return found[0], found[1]


def stability(first: np.ndarray, second: np.ndarray, clusters: np.ndarray) -> Stability:
    """first, second: [N] bool, K each; clusters: [N] numbers."""
    sizes = np.bincount(clusters)
    ours, theirs = (np.bincount(clusters, chosen, len(sizes)) for chosen in (first, second))
    count = first.sum()
    return Stability(float((first & second).sum() / count),
                     float((ours * theirs / np.maximum(sizes, 1)).sum() / count),
                     float(np.minimum(ours, theirs).sum() / count))
