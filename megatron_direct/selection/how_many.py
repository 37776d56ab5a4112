"""How many samples to select, from what they are worth (worth.py) and what the annealing sees.

A selection S of U tokens, seen by an annealing of T tokens, is given the value

    V(S) = mean worth of S, per token  *  E(U, T) / T  *  (U / P)^(1/3),  P the tokens of the pool,

with E the fresh tokens to which T tokens of U different ones amount (Muennighoff et al. 2023):

    E = T  if T <= U,  else  U + U R (1 - exp(-(T / U - 1) / R))

The power of U / P is what variety is worth: a smaller selection has to be worth more per token to
make up for it. If the mean of U tokens' gradients were their worth along the validation gradient
and independent noise beside it, its ratio of signal to noise would give 1/2; but samples repeat
each other, and 1/3 fits the annealings that were run (docs/selection.md).

Candidates for S: the samples of the greatest worth, so many that they hold a given share of the
tokens; all of positive worth; and the whole pool. Two questions are asked. Is there anything to
choose by? A candidate counts only if what it is chosen by, cross-fitted, is greater in it than in
the pool by more than chance explains. And how many? The one of the greatest value of those that
count, or the whole pool, if its value is greater. The error of a difference has two parts, the
scatter of the mean over blocks of the validation set and what chance does to a mean over so many
samples; intervals are Student's, of the effective number of blocks.

Shapes: N samples, C candidates, B blocks of the validation set.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_direct.selection.worth import Fold, Worth, cross_fitted, mean_over_blocks

# R. Muennighoff et al. (2023, arXiv 2305.16264) fitted 15 to training from scratch. In annealings
# variety is worth more: 3 had the least regret of 15, 5, 3, 2 and 1 (docs/selection.md).
REPETITION_DECAY = 3.0
# What variety is worth: the exponent of U / P.
VARIETY = 1 / 3
# Of intervals: a dozen candidates and more are looked at.
_CONFIDENCE = 0.999
# Shares of the pool's tokens that are looked at.
_SHARES = (1 / 64, 1 / 32, 3 / 64, 1 / 16, 3 / 32, 1 / 8, 3 / 16,
           *(sixteenths / 16 for sixteenths in range(4, 16)))


def effective_tokens(unique: np.ndarray, seen: float, decay: float) -> np.ndarray:
    """E(U, T): fresh tokens that ``seen`` tokens of ``unique`` ones are worth."""
    more = np.maximum(seen / unique, 1.0) - 1
    return np.minimum(unique, seen) * (1 + decay * (1 - np.exp(-more / decay)))


@dataclass(frozen=True, eq=False)
class NestedSelections:
    """The candidates; the last one is the whole pool.

    counts, tokens: [C] samples and tokens; by_block: [C, B] cross-fitted mean worth per token, by
    block of the validation set, of which there are sizes [B] samples; noise: [C] variance that
    chance gives to the mean worth of so many samples.
    """

    counts: np.ndarray
    tokens: np.ndarray
    by_block: np.ndarray
    sizes: np.ndarray
    noise: np.ndarray

    @property
    def worth(self) -> np.ndarray:
        return self.by_block @ self.sizes / self.sizes.sum()

    def gain(self, number: int, *, factor: float = 1.0) -> Gain:
        """Of the mean worth over that of the whole pool, times ``factor``."""
        return gain_of(factor * (self.by_block[number] - self.by_block[-1]), self.sizes,
                       factor**2 * self.noise[number])


@dataclass(frozen=True)
class Gain:
    """A difference, and an interval that chance leaves with 99.9 % if there is none."""

    mean: float
    low: float
    high: float


def gain_of(by_block: np.ndarray, sizes: np.ndarray, noise: float) -> Gain:
    """by_block: [B] differences; sizes: [B] validation samples; noise: variance beside the scatter
    over blocks."""
    mean = mean_over_blocks(by_block, sizes)
    error = mean.margin(_CONFIDENCE, noise)
    return Gain(mean.value, mean.value - error, mean.value + error)


def shares_of(worth: Worth) -> np.ndarray:
    """[C] of the pool's tokens that are looked at, ascending: those of _SHARES, that of the samples
    of positive worth, and 1."""
    positive = float(worth.weights[worth.values > 0].sum() / worth.weights.sum())
    return np.array(sorted({*_SHARES, positive} - {0.0, 1.0}) + [1.0])


def nested_selections(worth: Worth, shares: np.ndarray) -> NestedSelections:
    weights = worth.weights
    total = float(weights.sum())
    spread = 0.0
    for fold in worth.folds:
        judged = fold.judge.mean()
        mean = weights @ judged / total
        spread += float(weights @ (judged - mean) ** 2 / total) / len(worth.folds)
    order = _order(worth.values)
    held = np.cumsum(weights[order])
    counts = np.minimum(np.searchsorted(held, shares * total * (1 - 1e-12)) + 1, len(order))
    # Of a mean over so many of equally many; 1 / (effective number of samples).
    squares = float(weights @ weights) / total**2
    noise = spread * squares * (1 / shares - 1)
    by_block = cross_fitted(worth, lambda fold: _best_means(fold, weights, shares))
    return NestedSelections(counts, held[counts - 1], by_block, worth.sizes, noise)


def _order(scores: np.ndarray) -> np.ndarray:
    return np.lexsort((np.arange(len(scores)), -scores))


def _best_means(fold: Fold, weights: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """[C, B'] mean alignment, per token, of the samples of greatest worth with each block."""
    order = _order(fold.score)
    held = np.cumsum(weights[order])
    last = np.minimum(np.searchsorted(held, shares * held[-1] * (1 - 1e-12)), len(order) - 1)
    return np.stack([np.cumsum(judged * weights[order])[last] / held[last]
                     for judged in fold.judge.by_block(order)], axis=1)


@dataclass(frozen=True, eq=False)
class Values:
    """Of the candidates, for an annealing of ``seen`` tokens. by_block: [C, B] values; factors: [C]
    of the mean worth in them."""

    found: NestedSelections
    by_block: np.ndarray
    factors: np.ndarray

    @classmethod
    def of(cls, found: NestedSelections, seen: float, decay: float = REPETITION_DECAY) -> Values:
        factors = effective_tokens(found.tokens, seen, decay) / seen * (
            found.tokens / found.tokens[-1])**VARIETY
        return cls(found, found.by_block * factors[:, None], factors)

    @property
    def mean(self) -> np.ndarray:
        """[C] V."""
        return self.by_block @ (self.found.sizes / self.found.sizes.sum())

    def over_pool(self, number: int) -> Gain:
        return gain_of(self.by_block[number] - self.by_block[-1], self.found.sizes,
                       self.factors[number] ** 2 * self.found.noise[number])

    def over_random(self, number: int) -> Gain:
        """Over as many tokens at random."""
        return self.found.gain(number, factor=self.factors[number])


def best_selection(values: Values, chosen_by: NestedSelections) -> int:
    """Its number; that of the whole pool, the last one, where there is nothing to choose by, or
    nothing that is worth anything.
    chosen_by: of the same shares, by what samples are chosen by."""
    whole = len(values.found.counts) - 1
    # Below zero, less variety would count for a selection: the smallest would be the best one.
    clear = [number for number in range(whole)
             if chosen_by.gain(number).low > 0 and values.mean[number] > 0]
    best = max(clear, key=lambda number: values.mean[number], default=whole)
    return best if values.mean[best] > values.mean[whole] else whole
