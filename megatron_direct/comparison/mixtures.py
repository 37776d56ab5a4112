"""The best weights of groups of samples, by direct search, and samples drawn by weights.

Letters: C groups, N samples. A mixture w [C] gives each group its share of the tokens that an
annealing sees; f(w) is the loss after it, which nothing but an annealing tells. The search is
local, in logarithms, since shares are positive and matter by their ratios:

1. The best of the mixtures that it begins with is the centre c.
2. Probes: each group's share times ``_FACTOR``, the others scaled down. Their losses are slopes.
3. Steps: from c down the slopes, so far that the share that changes most changes by each of
   ``_LENGTHS``, in logarithms.
4. The best of all so far is the next centre, and probes are half as long. Again from 2.

With R rounds and S mixtures to begin with that is S + R (C + 3) annealings. All annealings of a
search share their seed, so that they differ by what they see. What is found is the least of noisy
figures and flatters itself: its worth is to be measured on other data, with other seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_FACTOR = 4.0
_LENGTHS = (1.0, 2.0, 4.0)
# A share below is none, and does not come back.
_LEAST = 1e-4


def num_annealings(num_groups: int, num_starts: int, num_rounds: int) -> int:
    return num_starts + num_rounds * (num_groups + len(_LENGTHS))


@dataclass(frozen=True, eq=False)
class Trial:
    mixture: np.ndarray
    loss: float


@dataclass(frozen=True, eq=False)
class GroupMixture:
    """mixture: [C] shares; groups: [N] numbers; num_tokens: that an annealing sees."""

    mixture: np.ndarray
    groups: np.ndarray
    num_tokens: int


def search(loss_of: Callable[[np.ndarray], float], starts: Sequence[np.ndarray], num_rounds: int,
           ) -> list[Trial]:
    """All trials, in order; the least loss is the result. starts: mixtures [C] to begin with.

    A loss may be infinite. Where all are that it begins with, it does not begin.
    """
    trials: list[Trial] = []

    def tried(mixtures: Iterator[np.ndarray]) -> list[Trial]:
        begun = len(trials)
        for mixture in mixtures:
            trials.append(Trial(mixture, loss_of(mixture)))
        return trials[begun:]

    tried(map(_mixture, starts))
    if np.isinf(best(trials).loss):
        return trials
    for number in range(num_rounds):
        centre, length = best(trials), np.log(_FACTOR) / 2**number
        probes = tried(_mixture(centre.mixture * np.exp(length * unit))
                       for unit in np.eye(len(centre.mixture)))
        slopes = np.array([probe.loss - centre.loss for probe in probes]) / length
        # The slope of scaling all shares alike is none; a group of no share has none either, and
        # an infinite one says nothing of how steep it is nearby.
        slopes = np.where((centre.mixture > 0) & np.isfinite(slopes), slopes, 0.0)
        slopes -= centre.mixture * slopes.sum()
        steepest = np.abs(slopes).max()
        step = -slopes / steepest if steepest > 0 else slopes
        tried(_mixture(centre.mixture * np.exp(far * step)) for far in _LENGTHS)
    return trials


def best(trials: Sequence[Trial]) -> Trial:
    return min(trials, key=lambda trial: trial.loss)


def _mixture(weights: np.ndarray) -> np.ndarray:
    weights = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    weights = np.where(weights < _LEAST, 0.0, weights)
    return weights / weights.sum()


def draw_by_shares(mixture: np.ndarray, groups: np.ndarray, labels: np.ndarray, num_tokens: int,
                   rng: np.random.Generator) -> np.ndarray:
    """Positions, ascending, each as often as it is taken: about ``num_tokens`` of them, by shares.

    groups, labels: [N]. A group gives all its samples as often as they fit, and for the rest some
    at random.
    """
    order, taken = rng.permutation(len(groups)), []
    for group, share in enumerate(mixture):
        members = order[groups[order] == group]
        total = int(labels[members].sum())
        if total and share > 0:
            times, rest = divmod(share * num_tokens, total)
            some = members[np.cumsum(labels[members]) - labels[members] / 2 <= rest]
            taken += [np.tile(members, min(int(times), 254)), some]
    return np.sort(np.concatenate(taken))
