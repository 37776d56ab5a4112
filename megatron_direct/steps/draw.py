"""Which samples of a selection were chosen, and which were drawn at random.

    selection.json        ``draw``: how many of each, in all, by pool and by cluster
    drawn/POOL.mask.npz   the samples that were drawn, as a mask of each pool
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from megatron_direct.data import indexed
from megatron_direct.data.samples import Samples
from megatron_direct.selection.stability import Repeating
from megatron_direct.steps.domains import cluster_name


@dataclass(frozen=True)
class DrawnOf:
    """Numbers of samples of a pool or of a cluster within one. candidates; of these selected;
    repeated: selected from both halves of the evidence, too; drawn: at random."""

    candidates: int
    selected: int
    repeated: int
    drawn: int


@dataclass(frozen=True)
class Draw:
    """whole: of all candidates; repeated_tokens, drawn_tokens: shares of the selected tokens, of
    each sample up to the sequence length; pools, clusters: by name; predicted: with
    ``--sketch-share``, samples beyond these that have no gradient, drawn by predicted chances."""

    whole: DrawnOf
    repeated_tokens: float
    drawn_tokens: float
    pools: dict[str, DrawnOf]
    clusters: dict[str, DrawnOf]
    predicted: int = 0

    def __str__(self) -> str:
        whole = self.whole
        predicted = "" if not self.predicted else (
            f"; {self.predicted} without a gradient drawn by predicted chances")
        if not whole.drawn:
            return (f"draw: all {whole.selected} kept as solved, of which both halves of the "
                    f"evidence select {whole.repeated} again ({self.repeated_tokens:.0%} of the "
                    f"tokens){predicted}")
        return (f"draw: {whole.selected - whole.drawn} kept ({1 - self.drawn_tokens:.0%} of the "
                f"tokens), {whole.drawn} drawn at random within their clusters "
                f"({self.drawn_tokens:.0%}){predicted}")


@dataclass(frozen=True, eq=False)
class FoundDraw:
    """draw: in numbers; numbers: [.] of the samples that were drawn."""

    draw: Draw
    numbers: np.ndarray

    def with_predicted(self, numbers: np.ndarray) -> FoundDraw:
        """Of a selection that was carried over to these samples, too."""
        return FoundDraw(dataclasses.replace(self.draw, predicted=len(numbers)),
                         np.concatenate([self.numbers, numbers]))


def find_draw(samples: Samples, candidates: np.ndarray, selected: np.ndarray, found: Repeating,
              ) -> FoundDraw:
    """candidates: [N] sample numbers; selected: [N] bool."""
    drawn = selected & ~found.again & found.others_drawn
    pool_of = samples.dataset_of(candidates)
    names = indexed.prefix_names(samples.prefixes)
    tokens = samples.num_labels[candidates].astype(np.int64)

    def of(here: np.ndarray) -> DrawnOf:
        return DrawnOf(*(int((here & part).sum()) for part in (
            np.ones_like(selected), selected, found.again, drawn)))

    def share(part: np.ndarray) -> float:
        return float(tokens[part].sum() / tokens[selected].sum())

    clusters = {}
    for number in np.unique(found.clusters):
        here = found.clusters == number
        pool = names[samples.prefixes[int(pool_of[here.argmax()])]]
        clusters[cluster_name(pool, number)] = of(here)
    pools = {names[prefix]: of(pool_of == i) for i, prefix in enumerate(samples.prefixes)}
    return FoundDraw(Draw(of(np.ones_like(selected)), share(found.again), share(drawn), pools,
                          clusters), candidates[drawn])
