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

A verdict of better or worse asks that both be clear of zero.

The p-value is that of the sign-flip test (Fisher 1935, section 21): if arm and reference were
exchangeable, each d_s were as likely to have the other sign. The least two-sided p-value that S
seeds can give is 2^(1-S), 0.0625 for five: it says how far the seeds agree, and no verdict hangs on
it. Holm's (1979) step-down rule corrects it for the number of arms that were tried.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
    """What is known of an arm's loss less the reference's.

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

    @property
    def verdict(self) -> str:
        """better, worse, or no clear difference: whether both intervals are clear of zero."""
        if self.bootstrap is None or self.student is None:
            return UNCLEAR
        if max(self.bootstrap[1], self.student[1]) < 0:
            return BETTER
        if min(self.bootstrap[0], self.student[0]) > 0:
            return WORSE
        return UNCLEAR

    @property
    def interval(self) -> tuple[float, float] | None:
        """The span of both intervals: it is clear of zero where the verdict says so."""
        if self.bootstrap is None or self.student is None:
            return None
        return (min(self.bootstrap[0], self.student[0]), max(self.bootstrap[1], self.student[1]))


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
    return float(values.std(ddof=1) / math.sqrt(len(values)))


def bootstrap_interval(differences: np.ndarray, confidence: float = CONFIDENCE, *,
                       seed: int = 0) -> tuple[float, float]:
    """Percentile interval of the mean of [S] differences: quantiles of the resampled means."""
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
    reach = student_quantile((1 + confidence) / 2, len(differences) - 1) * standard_error(
        differences)
    return mean - reach, mean + reach


def student_quantile(probability: float, degrees: int) -> float:
    """t with P(T <= t) = probability, for T of Student's distribution; 0.5 <= probability < 1.

    By bisection in theta = arctan(t / sqrt(degrees)), in which the distribution function of a whole
    number of degrees of freedom is a finite sum.
    """
    if degrees < 1 or not 0.5 <= probability < 1:
        raise ValueError(f"expected degrees of freedom >= 1 and a probability in [0.5, 1), got "
                         f"{degrees} and {probability}")
    low, high = 0.0, math.pi / 2
    for _ in range(100):  # halvings: more than float64 has digits
        middle = (low + high) / 2
        if (1 + _student_two_sided(middle, degrees)) / 2 < probability:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan(low)


def _student_two_sided(theta: float, degrees: int) -> float:
    """P(|T| <= sqrt(degrees) tan(theta)); Abramowitz and Stegun 26.7.3 (odd) and 26.7.4 (even)."""
    square = math.cos(theta) ** 2
    if degrees % 2:
        term, total = math.cos(theta), 0.0
        for k in range(1, (degrees - 1) // 2 + 1):
            total += term
            term *= square * 2 * k / (2 * k + 1)
        return 2 / math.pi * (theta + math.sin(theta) * total)
    term, total = 1.0, 0.0
    for k in range(1, degrees // 2 + 1):
        total += term
        term *= square * (2 * k - 1) / (2 * k)
    return math.sin(theta) * total


def sign_flip_p_value(differences: np.ndarray, *, seed: int = 0) -> float:
    """Two-sided: the share of sign patterns whose |mean| is at least that of [S] differences.

    All 2^S patterns for S <= 16, where the least possible value is 2^(1-S); else as many drawn at
    random, with the observed one among them (Phipson and Smyth 2010), so that it is never zero.
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
    """p-values corrected for their number, in the order given; None stays None and counts not.

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
