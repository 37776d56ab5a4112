"""A selection among some candidates, carried over to the others by cheap features of all.

n of N candidates have sketches, and a selection was made among them: y_i is 1 for those selected. A
logistic regression on features x_i that need no gradient gives the chance that a candidate would
have been selected,

    p_i = 1 / (1 + exp(-b - c.x_i)),    c, b: least  sum_i log loss(y_i, p_i) + strength |c|^2 / 2,

with the strength that has the least log loss on folds that were left out. Of the other N - n as
many are taken as the same share asks for, drawn with these chances (Pareto sampling, Rosen 1997: an
exact number, and inclusion close to p_i where the p_i sum up to it). So the others are selected in
the proportions of what was selected, and not the likeliest of them alone, which would all be alike.

How good that is shows on the candidates that have sketches, each predicted from folds without it:
the rank correlation of p with worth, and how much of the worth that the selection adds to a mean
candidate is lost if it is drawn by p instead. A selection has picked its worth by the same noise,
and a prediction has not, so the loss is rather more than it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats

from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.rows import row_blocks

_STRENGTHS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_NUM_FOLDS = 5


@dataclass(frozen=True)
class Distilled:
    """num_sketched: of num_candidates; num_select: of all; worths are means over tokens of the
    candidates that have sketches: of all, of those selected, and of as many drawn by prediction."""

    num_sketched: int
    num_candidates: int
    num_select: int
    rank_correlation: float
    worth_of_sketched: float
    worth_of_selection: float
    worth_of_predicted: float

    @property
    def lost(self) -> float | None:
        """Share of the worth that is lost; None where the selection adds none."""
        gain = self.worth_of_selection - self.worth_of_sketched
        return 1 - (self.worth_of_predicted - self.worth_of_sketched) / gain if gain > 0 else None

    def __str__(self) -> str:
        lost = "" if self.lost is None else (
            f"; drawn by it, {self.lost:.0%} of the worth that selecting adds is lost")
        return (f"distilled: {self.num_sketched} of {self.num_candidates} candidates have "
                f"sketches, {self.num_select} of all are selected. Predicted from folds without "
                f"them, the chance to be selected has a rank correlation of "
                f"{self.rank_correlation:.2f} with worth{lost}")


def draw_share(usable: np.ndarray, share: float, seed: int) -> np.ndarray:
    """At least one of them, at random, ascending; a larger share has all that a smaller one has."""
    if share >= 1:
        return usable
    order = np.random.default_rng(seed).permutation(len(usable))
    return np.sort(usable[order[: max(1, round(share * len(usable)))]])


def for_share(config: SelectionConfig, of_samples: float, of_tokens: float) -> SelectionConfig:
    """The problem among this share of the candidates: so many fewer samples, and tokens."""
    if not config.is_auto:
        return dataclasses.replace(config, num_select=max(1, round(
            of_samples * int(config.num_select))))
    if config.anneal_tokens is None:
        return config
    return dataclasses.replace(config, anneal_tokens=max(1, round(
        of_tokens * config.anneal_tokens)))


@dataclass(frozen=True, eq=False)
class Sketched:
    """Of N candidates: features [N, F] of all; has_sketch: [N] bool, n of them; of these selected
    [n] bool, worth [n] and labels [n], tokens."""

    features: np.ndarray
    has_sketch: np.ndarray
    selected: np.ndarray
    worth: np.ndarray
    labels: np.ndarray

    def extended(self, num_select: int, seed: int) -> tuple[np.ndarray, Distilled]:
        """([N] bool, num_select of them or as many as there are; what shows how good it is)."""
        rng = np.random.default_rng(seed)
        known = self.features[self.has_sketch].astype(np.float64)
        mean_feature, spread = known.mean(0), known.std(0)
        spread[spread <= 1e-9] = 1.0
        chances_of, held_out = _predict((known - mean_feature) / spread, self.selected, rng)
        taken = np.zeros(len(self.features), dtype=bool)
        taken[np.flatnonzero(self.has_sketch)[self.selected]] = True
        rest = np.flatnonzero(~self.has_sketch)
        chances = np.empty(len(rest))
        for block in row_blocks(len(rest)):  # no copy of all features
            chances[block] = chances_of((self.features[rest[block]] - mean_feature) / spread)
        wanted = np.clip(num_select - int(self.selected.sum()), 0, len(rest))
        taken[rest[_drawn(chances, wanted, rng)]] = True
        predicted = _drawn(held_out, int(self.selected.sum()), rng)

        def mean(which) -> float:
            return float(np.average(self.worth[which], weights=self.labels[which]))

        correlation = scipy.stats.spearmanr(held_out, self.worth).statistic \
            if np.ptp(held_out) and np.ptp(self.worth) else 0.0
        return taken, Distilled(
            int(self.has_sketch.sum()), len(taken), int(taken.sum()), float(correlation),
            mean(slice(None)), mean(self.selected), mean(predicted))


# From standardised features [m, F] the chances [m].
_Chances = Callable[[np.ndarray], np.ndarray]


def _predict(known: np.ndarray, selected: np.ndarray, rng: np.random.Generator,
             ) -> tuple[_Chances, np.ndarray]:
    """(chances of others, of those that are known, each from folds without it)."""
    if selected.all():  # the whole pool: there is nothing to tell apart
        return lambda of: np.ones(len(of)), np.ones(len(known))
    folds = rng.permutation(len(known)) % _NUM_FOLDS
    best, least, held_out = _STRENGTHS[0], np.inf, np.zeros(len(known))
    for strength in _STRENGTHS:
        found = np.empty(len(known))
        for fold in range(_NUM_FOLDS):
            inside = folds != fold
            found[~inside] = _fit(known[inside], selected[inside], strength)(known[~inside])
        loss = -np.log(np.where(selected, found, 1 - found)).mean()
        if loss < least:
            best, least, held_out = strength, loss, found
    return _fit(known, selected, best), held_out


def _fit(features: np.ndarray, selected: np.ndarray, strength: float) -> _Chances:
    """strength: per standardised feature."""
    signs = np.where(selected, 1.0, -1.0)

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        weights, constant = parameters[:-1], parameters[-1]
        margins = signs * (features @ weights + constant)
        pull = -signs * scipy.special.expit(-margins)
        return (float(np.logaddexp(0, -margins).sum() + strength * weights @ weights / 2),
                np.append(features.T @ pull + strength * weights, pull.sum()))

    found = scipy.optimize.minimize(loss, np.zeros(features.shape[1] + 1), jac=True,
                                    method="L-BFGS-B").x

    def chances(of: np.ndarray) -> np.ndarray:
        return np.clip(scipy.special.expit(of @ found[:-1] + found[-1]), 1e-6, 1 - 1e-6)

    return chances


def _drawn(chances: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[count] positions, by Pareto sampling."""
    draws = scipy.special.logit(np.clip(rng.random(len(chances)), 1e-12, 1 - 1e-12))
    keys = draws - scipy.special.logit(np.clip(chances, 1e-6, 1 - 1e-6))
    return np.argsort(keys, kind="stable")[:count]
