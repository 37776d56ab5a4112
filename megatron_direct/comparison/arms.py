"""Ways of selecting that are compared: an *arm* is a function from a case to candidates.

A new arm is a function of a :class:`Case` with the decorator ``arm``; it returns the positions of
the samples that it selects among the N candidates, or the solution of the selection problem. What
arms know are sketches of pool and validation set, the losses that come with them, and the
curvature's leading directions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from megatron_direct.comparison.mixtures import GroupMixture
from megatron_direct.selection import treatment
from megatron_direct.selection.baselines import random_selection
from megatron_direct.selection.choice import choose
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence, flat_rows
from megatron_direct.selection.problem import Selection
from megatron_direct.selection.rows import row_lengths
from megatron_direct.steps.decay import Recipe


@dataclass(frozen=True)
class Case:
    """What an arm may know. N candidates, M validation samples, k coordinates, K to select (an arm
    that asks :meth:`select` takes as many as the flags say, which may leave that open).

    evidence: by measurement (see :class:`Arm`). domains: [N] the domain of each candidate, by name;
    losses: [N] mean token losses; corrupted: [N] what a trial shuffled on purpose, for the oracle
    alone; valid_domains, valid_labels: [M]; token_features: yields [N, F]; ceiling: the best
    mixture found. config: the flags of the selection problem; numbers: [N] of the samples;
    uncut_labels: [N] of their whole documents.
    """

    evidence: Mapping[str, Evidence]
    losses: np.ndarray
    domains: np.ndarray
    corrupted: np.ndarray
    valid_domains: np.ndarray
    valid_labels: np.ndarray
    num_select: int
    seed: int
    config: SelectionConfig
    limits: Mapping = field(default_factory=dict)
    numbers: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    token_features: Callable[[], np.ndarray] | None = None
    ceiling: GroupMixture | None = None
    uncut_labels: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @functools.cached_property
    def rng(self) -> np.random.Generator:
        """One generator for all that an arm draws; :meth:`Arm.take` restarts it."""
        return np.random.default_rng(self.seed)

    def solve(self, evidence: Evidence, **settings) -> Selection:
        """The solution of the selection problem, with some of its flags changed."""
        config = dataclasses.replace(self.config, **settings)
        return treatment.select_by_sketches(
            config, evidence, self.num_select, self.seed, **self.limits)[0]

    def select(self, evidence: Evidence, **settings) -> Selection:
        """What `select` would with these flags, some of them changed."""
        return choose(dataclasses.replace(self.config, **settings), evidence, self.seed,
                      self.limits).selection

    def largest(self, scores: np.ndarray) -> np.ndarray:
        """[K] of the largest scores; ties go to the lower number."""
        return np.sort(np.lexsort((np.arange(len(scores)), -scores))[: self.num_select])


@dataclass(frozen=True)
class Arm:
    """needs: what has to be measured over the pool first, which decides what selecting costs.

    losses: of the pool at the checkpoint, a forward pass; text: its tokens; ceiling: the search for
    it; share: what select measures, of a share of the candidates; else a name in
    :data:`megatron_direct.comparison.measurements.MEASUREMENTS`. recipe: how it is annealed, None
    for the average of the training's last states, which is not annealed at all; of: the arm that
    selects the same, "" for none; dataset: name of the pool that makes up half of its training
    data, "" for none; rounds: segments of the annealing, each on what select selects at its
    beginning.
    """

    name: str
    description: str
    choose: Callable[[Case], np.ndarray | Selection]
    needs: tuple[str, ...] = ()
    recipe: Recipe | None = field(default_factory=Recipe)
    of: str = ""
    dataset: str = ""
    rounds: int = 1

    def take(self, case: Case) -> tuple[np.ndarray, Selection | None]:
        """([K] positions, ascending; the solution, if a selection problem was solved)."""
        found = self.choose(dataclasses.replace(case))  # a copy has a generator of its own
        return (found.indices, found) if isinstance(found, Selection) else (found, None)


REGISTRY: dict[str, Arm] = {}  # in the order in which arms are run
# Arms that mean nothing where pools and validation sets have no domain in common.
BY_DOMAIN = ("domain", "oracle")


def arm(name: str, description: str, needs: tuple[str, ...] = ()):
    def register(choose: Callable[[Case], np.ndarray | Selection]):
        REGISTRY[name] = Arm(name, description, choose, needs)
        return choose

    return register


# Of an arm that is a dataset: dataset:NAME.
DATASET = "dataset:"


def find_arm(name: str) -> Arm:
    """Of the registry, or ``dataset:NAME``. Raises KeyError for any other name."""
    if name.startswith(DATASET):
        dataset = name.removeprefix(DATASET)
        return Arm(name, f"half {dataset}, half the whole pool", _whole_pool, dataset=dataset)
    return REGISTRY[name]


@arm("random", "K samples at random")
def _random(case: Case) -> np.ndarray:
    return random_selection(np.arange(len(case.losses)), case.num_select, case.seed)


@arm("whole-pool", "all samples, up to the tokens of the annealing")
def _whole_pool(case: Case) -> np.ndarray:
    return np.arange(len(case.losses))


@arm("oracle", "like domain, without samples corrupted on purpose, which only a trial can know")
def _oracle(case: Case) -> np.ndarray:
    return in_proportions(case, ~case.corrupted)


@arm("domain", "at random, with domains in proportion to the validation set's tokens")
def _domain(case: Case) -> np.ndarray:
    return in_proportions(case, np.ones(len(case.losses), dtype=bool))


@arm("perplexity-low", "lowest loss", ("losses",))
def _perplexity_low(case: Case) -> np.ndarray:
    return case.largest(-case.losses)


@arm("perplexity-middle", "loss closest to the median", ("losses",))
def _perplexity_middle(case: Case) -> np.ndarray:
    order = np.lexsort((np.arange(len(case.losses)), case.losses))
    first = (len(order) - case.num_select) // 2
    return np.sort(order[first: first + case.num_select])


@arm("perplexity-high", "highest loss", ("losses",))
def _perplexity_high(case: Case) -> np.ndarray:
    return case.largest(case.losses)


@arm("gradient-norm", "largest gradient", ("onset",))
def _gradient_norm(case: Case) -> np.ndarray:
    return case.largest(row_lengths(case.evidence["onset"].rows))


@arm("gradient-dot", "largest inner product with the mean validation gradient", ("onset",))
def _gradient_dot(case: Case) -> np.ndarray:
    return case.largest(_dots(case.evidence["onset"]))


@arm("gradient-cosine", "largest cosine with the mean validation gradient", ("onset",))
def _gradient_cosine(case: Case) -> np.ndarray:
    return case.largest(_dots(case.evidence["onset"]) / row_lengths(case.evidence["onset"].rows))


@arm("gradient-dot-adam", "the same inner product under Adam's scaling (as in LESS)",
     ("adam-sketches",))
def _gradient_dot_adam(case: Case) -> np.ndarray:
    return case.largest(_dots(case.evidence["adam-sketches"]))


@arm("direct", "what `megatron-direct select` selects with these flags", ("select",))
def _direct(case: Case) -> Selection:
    return case.select(case.evidence["select"])


@arm("pilot-dot", "largest inner product with the mean validation gradient, where direct takes "
     "gradients",
     ("select",))
def _pilot_dot(case: Case) -> np.ndarray:
    return case.largest(_dots(case.evidence["select"]))


@arm("random-matched", "at random, with the losses and lengths of what direct selects", ("select",))
def _random_matched(case: Case) -> np.ndarray:
    return matched(case, _direct(case).indices)


@arm("flat-energy", "DiReCT as published: flat energy within a stiff budget", ("onset",))
def _flat_energy(case: Case) -> Selection:
    return case.solve(case.evidence["onset"], objective="flat-energy")


@arm("flat-energy-no-budget", "flat energy without a budget", ("onset",))
def _flat_energy_no_budget(case: Case) -> Selection:
    return case.solve(case.evidence["onset"], objective="flat-energy", stiff_budget=math.inf)


@arm("flat-energy-random-subspace", "flat energy with as many random directions in place of the "
     "stiff ones", ("onset",))
def _flat_energy_random_subspace(case: Case) -> Selection:
    evidence = case.evidence["onset"]
    directions = evidence.directions
    drawn = case.rng.standard_normal(directions.sketches.shape)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return case.solve(dataclasses.replace(
        evidence, directions=dataclasses.replace(directions, sketches=drawn)),
        objective="flat-energy")


@arm("stiff-alignment", "inner product with the validation gradient in the stiff directions only",
     ("onset",))
def _stiff_alignment(case: Case) -> np.ndarray:
    evidence = case.evidence["onset"]
    flat = flat_rows(np.concatenate([evidence.rows, evidence.valid_rows]),
                              evidence.directions, "complement")
    count = len(evidence.rows)
    stiff = dataclasses.replace(evidence, rows=evidence.rows - flat[:count],
                                valid_rows=evidence.valid_rows - flat[count:])
    return case.largest(_dots(stiff))


@arm("alignment", "inner product with the validation gradient in flat directions, within a stiff "
     "budget", ("onset",))
def _alignment(case: Case) -> Selection:
    return case.solve(case.evidence["onset"], objective="alignment")


@arm("descent", "quadratic model of the validation loss, with gradients as they are at the "
     "checkpoint", ("onset",))
def _descent(case: Case) -> Selection:
    return case.solve(case.evidence["onset"], objective="descent", normalize_gradients=False,
                      weight_by_tokens=False, contrast=False, shrinkage_clusters=0)


def in_proportions(case: Case, allowed: np.ndarray) -> np.ndarray:
    """[K] of the allowed [N], at random, whose tokens are of the domains in the proportions of the
    validation set's, as expected, all documents cut at the sequence length. Where a domain has too
    few, the others fill up; what is not allowed comes last.
    """
    names, domain = np.unique(case.valid_domains, return_inverse=True)
    labels = case.evidence["onset"].labels
    tokens = np.bincount(domain, weights=case.valid_labels)
    candidates = [allowed & (case.domains == name) for name in names]
    # Of a domain without candidates any length will do: the others fill up.
    shares = tokens / [labels[of_domain].mean() if of_domain.any() else labels.mean()
                       for of_domain in candidates]
    order = case.rng.permutation(len(case.domains))
    sound = order[allowed[order]]
    wanted = np.floor(case.num_select * shares / shares.sum()).astype(int)
    chosen = np.concatenate([sound[case.domains[sound] == name][:count]
                             for name, count in zip(names, wanted, strict=True)])
    rest = order[~np.isin(order, chosen)]
    # What is allowed first, and of that the validation's own domains.
    rest = rest[np.lexsort((~np.isin(case.domains[rest], names), ~allowed[rest]))]
    return np.sort(np.concatenate([chosen, rest[: case.num_select - len(chosen)]]))


def matched(case: Case, chosen: np.ndarray, num_bins: int = 8) -> np.ndarray:
    """[K] at random, but with the losses and lengths of ``chosen``.

    Candidates are binned by octiles of loss and of length; as many are drawn from each bin as were
    chosen from it, which comes round to the same ones where that is more than are in it.
    """
    bins = np.zeros(len(case.losses), dtype=int)
    for values in (case.losses, case.evidence["onset"].labels):
        edges = np.quantile(values, np.linspace(0, 1, num_bins + 1)[1:-1])
        bins = bins * num_bins + np.searchsorted(edges, values)
    order = case.rng.permutation(len(bins))
    counts = np.bincount(bins[chosen], minlength=num_bins**2)
    drawn = [np.resize(order[bins[order] == b], count) for b, count in enumerate(counts) if count]
    return np.sort(np.concatenate(drawn))


def _dots(evidence: Evidence) -> np.ndarray:
    return evidence.rows.astype(np.float64) @ evidence.valid_rows.astype(np.float64).mean(0)
