"""What a comparison found, typed: ``comparison.json``.

Pages and text are made from a :class:`ComparisonSummary` alone, and every figure in them is in it.
It can describe a run that is not finished: seeds without a result are left out of what they belong
to, and counted. What is not known is None.

Letters: S seeds, N candidates, K selected samples, M test sets. The *mean test loss* of an arm and
seed is the mean of its losses on the M test sets, so that each domain counts the same; ``all`` is
the loss over all test tokens.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from megatron_direct.comparison.repeats import Repeats
from megatron_direct.comparison.statistics import PairedDifference
from megatron_direct.runtime import files, typed_json

PAPER_ARM = "flat-energy"  # DiReCT's own objective
CEILING = "ceiling"  # what a direct search over mixtures finds: how much there is to gain
RANDOM_SUBSPACE = "flat-energy-random-subspace"  # its stiff directions are not those of other arms
# What the arm that `select` uses by default has to beat, beside the reference.
RIVALS = ("perplexity-low", "perplexity-middle", "perplexity-high", "gradient-norm",
          "gradient-dot", "gradient-cosine", "gradient-dot-adam", "ngrams", "ngrams-smoothed",
          "redundancy-draw", "influence", "influence-select")
# What the default is compared with beside its rivals: what could be had, and what it is made of.
YARDSTICKS = ("oracle", "domain", "whole-pool", "random-matched", "direct-plain",
              "direct-unshrunk")
# Averages: the default's selection, and what the same recipe makes of others, or no annealing.
AVERAGES = tuple((f"direct{recipe}", (f"random{recipe}", f"whole-pool{recipe}", "stable-averaged"))
                 for recipe in ("-averaged", "-constant-averaged", "-moderate-averaged"))
ALL_TOKENS = "all"  # the test set of all test tokens together


@dataclass(frozen=True)
class SettingSummary:
    """What all arms share: ``setting.json`` of the run. Datasets are given by name."""

    name: str
    num_select: int  # K
    num_candidates: int  # N
    parameters: int
    iterations: int  # of each annealing
    tokens: int  # of each annealing
    seeds: tuple[int, ...]
    pools: tuple[str, ...]
    valid: tuple[str, ...]
    test: tuple[str, ...]
    reference: str
    default_arm: str
    arms: dict[str, str]  # name -> description
    shared_seconds: dict[int, dict[str, dict[str, float]]]  # seed -> measurement -> step -> seconds
    annealing_seconds: float | None
    passes_of_selection: dict[str, float | None]  # arm -> training passes over the pool
    tokenizer_model: str | None = None
    not_annealed: tuple[str, ...] = ()  # arms that see no token after the checkpoint

    @property
    def test_and_all(self) -> tuple[str, ...]:
        return (*self.test, ALL_TOKENS)


@dataclass(frozen=True)
class LossesBefore:
    """Of the checkpoint that all arms start from."""

    mean_loss: float
    tests: dict[str, float]


@dataclass(frozen=True)
class SampleStatistics:
    """Of the samples that were selected (or of the whole pool); means over seeds.

    loss, labels: quantiles at 5, 25, 50, 75 and 95 % of the samples' losses before annealing and of
    their lengths in tokens. uncut_tokens: of their whole documents, which the annealing sees; None
    in a summary of an older version.
    """

    samples: float
    tokens: float
    corrupted: float  # share of them
    loss_mean: float
    loss: tuple[float, ...]
    labels: tuple[float, ...]
    uncut_tokens: float | None = None

    @property
    def tokens_of_an_epoch(self) -> float:
        """What the annealing sees of them before it sees one again."""
        return self.uncut_tokens or self.tokens


@dataclass(frozen=True)
class Composition:
    """Samples of one pool and those selected from it; means over seeds."""

    samples: float
    selected: float
    corrupted: float
    selected_corrupted: float


@dataclass(frozen=True)
class DomainCounts:
    """Candidates of one pool; means over seeds."""

    samples: float
    corrupted: float


@dataclass(frozen=True)
class PoolSummary:
    candidates: SampleStatistics | None
    domains: dict[str, DomainCounts]


@dataclass(frozen=True)
class ProblemSummary:
    """Of one arm and seed. Cost in units of what as many average samples cost at the checkpoint,
    and the budget to it as for the arm's own directions; budget and objective only of arms that
    solve a selection problem."""

    stiff_cost: float | None
    stiff_budget: float | None
    objective_value: float | None
    mean_loss: float


@dataclass(frozen=True)
class LossCurve:
    """Training loss by iteration: means over stretches of it; then mean and range over seeds."""

    iteration: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Cost:
    """What selecting costs, and what it would have to save: see ``summarise.cost``. tokens: that
    the arm is trained on after the checkpoint."""

    tokens: int
    passes: float | None
    share_of_annealing: float | None
    annealing_left: float | None
    needed_at_most: float | None


@dataclass(frozen=True)
class ArmSummary:
    name: str
    description: str
    seeds: tuple[int, ...]  # with a result
    missing: tuple[int, ...]
    losses: dict[int, float]  # seed -> mean test loss
    mean_loss: float | None
    tests: dict[str, float | None]  # test set -> loss
    difference: PairedDifference  # to the reference
    test_differences: dict[str, PairedDifference]
    composition: dict[str, Composition]  # pool -> counts
    selected: SampleStatistics | None
    problem: dict[int, ProblemSummary]  # by seed
    overlap_between_seeds: float | None  # Jaccard index
    repeats: Repeats | None  # means over seeds
    curve: LossCurve | None
    cost: Cost
    failed: dict[int, str] = field(default_factory=dict)  # of the missing: seed -> why
    versions: tuple[str, ...] = ()  # of this package, by which the results were made
    # Of the samples it was annealed on, means over pairs of seeds; None in an earlier file.
    shared_by_seeds: Repeats | None = None


@dataclass(frozen=True)
class Overlap:
    """Jaccard indices of the selections of each two arms, means over the seeds both have."""

    arms: tuple[str, ...]
    matrix: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True)
class SpectrumSummary:
    """Of the curvature at the checkpoint, from one seed's validation samples."""

    eigenvalues: tuple[float, ...]
    num_stiff: int
    operator: str
    notes: tuple[str, ...]


@dataclass(frozen=True)
class SampleText:
    text: str
    pool: str
    loss: float
    labels: int


@dataclass(frozen=True)
class SampleTexts:
    """Samples that the default arm selects and that it leaves out: ``texts.json`` of the run."""

    picked: tuple[SampleText, ...]
    dropped: tuple[SampleText, ...]


@dataclass(frozen=True)
class ComparisonSummary:
    """arms: in the order of ``ordered``."""

    setting: SettingSummary
    identity: dict[str, Any]  # the flags and digests that the run depends on
    finished: bool
    confidence: float  # of the intervals
    before: LossesBefore | None
    pool: PoolSummary
    arms: tuple[ArmSummary, ...]
    default_against: dict[str, PairedDifference]  # arm -> default - arm
    overlap: Overlap
    spectra: dict[int, SpectrumSummary]  # by seed
    texts: SampleTexts | None

    @property
    def reference(self) -> str:
        return self.setting.reference

    @property
    def default_arm(self) -> str:
        return self.setting.default_arm

    @property
    def loss_before(self) -> float | None:
        return None if self.before is None else self.before.mean_loss

    def arm(self, name: str) -> ArmSummary | None:
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def measured(self) -> tuple[ArmSummary, ...]:
        """The arms with a result."""
        return tuple(arm for arm in self.arms if arm.mean_loss is not None)

    @property
    def ranked(self) -> tuple[ArmSummary, ...]:
        """The arms with a result of every seed that counts, the lowest mean test loss first: means
        over different seeds are not to be compared."""
        wanted = seeds_that_count(self.arms)
        return tuple(arm for arm in self.measured if set(arm.seeds) >= wanted)

    @property
    def compared(self) -> tuple[ArmSummary, ...]:
        """The arms that have a difference to the reference, without the reference itself."""
        return tuple(arm for arm in self.arms
                     if arm.name != self.reference and arm.difference.mean is not None)

    def to_json(self) -> dict:
        return typed_json.to_json(self)

    @classmethod
    def from_json(cls, value: dict) -> ComparisonSummary:
        return typed_json.from_json(cls, value)


def seeds_that_count(arms: Iterable[ArmSummary]) -> set[int]:
    """Those of the arm that has most of them."""
    most: tuple[int, ...] = ()
    for arm in arms:
        most = max(most, arm.seeds, key=len)
    return set(most)


def ordered(arms: Collection[ArmSummary]) -> list[ArmSummary]:
    """By mean test loss; then those that lack seeds, by their difference from the reference; last
    those without any result."""
    wanted = seeds_that_count(arms)

    def place(arm: ArmSummary) -> tuple:
        if arm.mean_loss is None:
            return 2, 0.0, arm.name
        if set(arm.seeds) >= wanted:
            return 0, arm.mean_loss, arm.name
        return 1, arm.difference.mean or 0.0, arm.name

    return sorted(arms, key=place)


def write_summary(summary: ComparisonSummary, path: str | os.PathLike) -> None:
    files.write_json(path, summary.to_json())


def read_summary(path: str | os.PathLike) -> ComparisonSummary:
    """Raises UserError if the file is not a summary of this version."""
    return typed_json.read_record(ComparisonSummary, path)
