"""Arms compared on a few seeds: paired differences, intervals, p-values.

Notation. An arm and a reference were run with the same seeds s = 1..S, and ended with the losses
x_s and y_s; d_s = x_s - y_s is the paired difference, mean(d) = sum_s d_s / S and
se = sqrt(sum_s (d_s - mean(d))^2 / (S - 1) / S). Pairing takes out what a seed does to both: its
sketch, its draw of the validation set, its order of batches. Lower loss is better, so d < 0 speaks
for the arm.

With S = 5 no single figure can be trusted, so two intervals are made that err in opposite ways:

* **Percentile bootstrap** (Efron and Tibshirani 1993, chapter 13): it assumes no shape of
  distribution, but resamples S values only, and is too narrow by about sqrt((S - 1) / S) and by
  the difference between normal and t quantiles.
* **Student's t** (Student 1908): exact for normal differences at any S, and wide at few degrees of
  freedom.

A verdict of better or worse requires that both exclude zero.

The p-value is that of the sign-flip test (Fisher 1935, section 21): if arm and reference were
exchangeable, each d_s were as likely to have the other sign. The least two-sided p-value that S
seeds can give is 2^(1-S), 0.0625 for five: it says how far the seeds agree, and no verdict depends
on it. Holm's (1979) step-down rule corrects it for the number of arms that were tried.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import scipy.stats

CONFIDENCE = 0.95
# Resamples, of the seeds for the bootstrap: all S^S of them up to this many (S <= 6), else as many
# drawn at random, of which a tail of 0.025 has a relative error of 2 %.
MAX_RESAMPLES = 100_000
# Seeds up to which all 2^S patterns of signs are counted.
MAX_EXACT_SEEDS = 16
# Differences of means up to this relative size are rounding, and count as ties.
_ROUNDING = 1e-12

BETTER, WORSE, UNCLEAR = "better", "worse", "no clear difference"


@dataclass(frozen=True)
class PairedDifference:
    """What is known of an arm's loss minus the reference's.

    The figures are None where the seeds are too few: no mean without a pair, no spread, interval or
    p-value with one.
    """

    num_pairs: int  # S, seeds that both were run with
    num_left_out: int  # seeds that only one of them was run with
    mean: float | None
    standard_error: float | None
    bootstrap: tuple[float, float] | None
    student: tuple[float, float] | None
    p_value: float | None
    p_holm: float | None = None  # corrected for a family of differences, see `corrected`
    # The span of both intervals: it excludes zero where the verdict is better or worse.
    interval: tuple[float, float] | None = field(init=False)
    verdict: str = field(init=False)

    def __post_init__(self):
        interval, verdict = None, UNCLEAR
        if self.bootstrap is not None and self.student is not None:
            interval = (min(self.bootstrap[0], self.student[0]),
                        max(self.bootstrap[1], self.student[1]))
            verdict = BETTER if interval[1] < 0 else WORSE if interval[0] > 0 else UNCLEAR
        object.__setattr__(self, "interval", interval)
        object.__setattr__(self, "verdict", verdict)


def compare_by_seed(arm: Mapping[int, float], reference: Mapping[int, float],
                    confidence: float = CONFIDENCE) -> PairedDifference:
    """The paired difference arm - reference, from the losses of each by seed.

    A seed that only one of them has is left out, and counted.
    """
    shared = sorted(arm.keys() & reference.keys())
    differences = np.array([arm[seed] - reference[seed] for seed in shared], dtype=np.float64)
    if not np.isfinite(differences).all():
        raise ValueError(f"losses must be finite, but the differences of the seeds {shared} are "
                         f"{differences.tolist()}. Leave out the seeds that did not end well.")
    enough = len(shared) > 1
    return PairedDifference(
        num_pairs=len(shared), num_left_out=len(arm.keys() ^ reference.keys()),
        mean=float(differences.mean()) if shared else None,
        standard_error=standard_error(differences) if enough else None,
        bootstrap=bootstrap_interval(differences, confidence) if enough else None,
        student=student_interval(differences, confidence) if enough else None,
        p_value=sign_flip_p_value(differences) if enough else None)


def standard_error(values: np.ndarray) -> float:
    """Of the mean of [S] values, S >= 2."""
    return float(scipy.stats.sem(values))


def bootstrap_interval(differences: np.ndarray, confidence: float = CONFIDENCE, *,
                       seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean of [S] differences: quantiles of the resampled means.

    scipy.stats.bootstrap draws resamples at random; for a few seeds all of them can be had.
    """
    count = len(differences)
    if count**count <= MAX_RESAMPLES:
        chosen = np.indices((count,) * count).reshape(count, -1).T
    else:
        chosen = np.random.default_rng(seed).integers(count, size=(MAX_RESAMPLES, count))
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences[chosen].mean(1), [tail, 1 - tail])
    return float(low), float(high)


def student_interval(differences: np.ndarray, confidence: float = CONFIDENCE,
                     ) -> tuple[float, float]:
    """mean(d) -+ t_{S-1, (1 + confidence) / 2} se, for [S] differences."""
    mean = float(differences.mean())
    quantile = scipy.stats.t.ppf((1 + confidence) / 2, len(differences) - 1)
    reach = float(quantile) * standard_error(differences)
    return mean - reach, mean + reach


def sign_flip_p_value(differences: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided: the share of sign patterns whose |mean| is at least that of [S] differences.

    All 2^S patterns for S <= 16, where the least possible value is 2^(1-S); else as many drawn at
    random, with the observed one among them (Phipson and Smyth 2010), so that it is never zero.
    The values are those of scipy.stats.permutation_test, which builds the patterns one by one and
    takes 70 times as long at S = 12; a comparison of 22 arms on two test sets makes 100 such tests.
    """
    count = len(differences)
    observed = abs(differences.mean())
    threshold = observed - _ROUNDING * np.abs(differences).max()
    if count <= MAX_EXACT_SEEDS:
        patterns = np.arange(2**count)[:, None] >> np.arange(count) & 1
        means = np.abs(((2 * patterns - 1) * differences).mean(1))
        return float((means >= threshold).mean())
    signs = np.random.default_rng(seed).integers(2, size=(MAX_RESAMPLES, count)) * 2 - 1
    means = np.abs((signs * differences).mean(1))
    return float((1 + (means >= threshold).sum()) / (1 + len(means)))


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p-values corrected for their number, in the order given; None stays None, and is not counted.

    Sorted ascending, the corrected p_(i) is the greatest of min(1, (m - j + 1) p_(j)) over j <= i:
    with it, the chance that any true null hypothesis is refused at a level is at most that level.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    greatest = 0.0
    for rank, (p, place) in enumerate(known):
        greatest = max(greatest, min(1.0, (len(known) - rank) * p))
        corrected[place] = greatest
    return corrected


def corrected(family: Mapping[str, PairedDifference]) -> dict[str, PairedDifference]:
    """The same differences with Holm's p-values, for as many tests as the family has members."""
    p_values = holm([difference.p_value for difference in family.values()])
    return {name: dataclasses.replace(difference, p_holm=p_value)
            for (name, difference), p_value in zip(family.items(), p_values, strict=True)}
