"""Ways of selecting that are compared: an *arm* is a function from a case to candidates.

A new arm is a function of a :class:`Case` with the decorator ``arm``; it returns the positions of
the samples it takes among the N candidates. All arms know the same: one pass of sketches over pool
and validation set, with the losses that come with it, and the curvature's leading directions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megatron_direct.selection import sketched
from megatron_direct.selection.baselines import random_selection
from megatron_direct.selection.sketched import Evidence, SelectionConfig


@dataclass(frozen=True)
class Case:
    """What an arm may know. N candidates, M validation samples, k coordinates, K to select.

    domains: [N] the domain of each candidate, by name; losses: [N] mean token losses; corrupted:
    [N] what a trial shuffled on purpose, for the oracle alone; valid_domains, valid_labels: [M].
    config: the flags of the selection problem. adam: for arms that need it, yields the evidence
    with gradients scaled by Adam's moments.
    """

    evidence: Evidence
    losses: np.ndarray
    domains: np.ndarray
    corrupted: np.ndarray
    valid_domains: np.ndarray
    valid_labels: np.ndarray
    num_select: int
    seed: int
    config: SelectionConfig
    adam: Callable[[], Evidence]

    @property
    def rng(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def solve(self, evidence: Evidence | None = None, **settings) -> np.ndarray:
        """[K] by the selection problem, with some of its flags changed."""
        config = dataclasses.replace(self.config, **settings)
        found, _ = sketched.solve(config, evidence or self.evidence, self.num_select, self.seed)
        return found.indices

    def largest(self, scores: np.ndarray) -> np.ndarray:
        """[K] of the largest scores; ties go to the lower number."""
        return np.sort(np.lexsort((np.arange(len(scores)), -scores))[: self.num_select])


@dataclass(frozen=True)
class Arm:
    """needs: what has to be computed over the pool first; it decides what a choice costs."""

    name: str
    description: str
    choose: Callable[[Case], np.ndarray]
    needs: tuple[str, ...] = ()


NEEDS = ("losses", "sketches", "curvature", "adam-sketches")
_SKETCHES, _DIRECTIONS = ("sketches",), ("sketches", "curvature")
ARMS: dict[str, Arm] = {}


def arm(name: str, description: str, needs: tuple[str, ...] = ()):
    def register(choose: Callable[[Case], np.ndarray]):
        ARMS[name] = Arm(name, description, choose, needs)
        return choose

    return register


@arm("random", "K samples at random")
def _random(case: Case) -> np.ndarray:
    return random_selection(np.arange(len(case.losses)), case.num_select, case.seed)


@arm("whole-pool", "all samples, as far as the tokens of the annealing reach")
def _whole_pool(case: Case) -> np.ndarray:
    return np.arange(len(case.losses))


@arm("oracle", "at random as domain, of what was not corrupted: only a trial can know")
def _oracle(case: Case) -> np.ndarray:
    return in_proportions(case, ~case.corrupted)


@arm("domain", "at random, domains in the proportions of the validation set's tokens")
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


@arm("gradient-norm", "largest gradient", _SKETCHES)
def _gradient_norm(case: Case) -> np.ndarray:
    return case.largest(_norms(case.evidence.rows))


@arm("gradient-dot", "largest inner product with the mean validation gradient", _SKETCHES)
def _gradient_dot(case: Case) -> np.ndarray:
    return case.largest(_dots(case.evidence))


@arm("gradient-cosine", "largest cosine with the mean validation gradient", _SKETCHES)
def _gradient_cosine(case: Case) -> np.ndarray:
    return case.largest(_dots(case.evidence) / _norms(case.evidence.rows))


@arm("gradient-dot-adam", "the same inner product under Adam's scaling (as LESS has it)",
     ("adam-sketches",))
def _gradient_dot_adam(case: Case) -> np.ndarray:
    return case.largest(_dots(case.adam()))


@arm("direct", "what `megatron-direct select` takes, with these flags", _DIRECTIONS)
def _direct(case: Case) -> np.ndarray:
    return case.solve()


@arm("random-matched", "at random, with the losses and lengths of what direct takes", _DIRECTIONS)
def _random_matched(case: Case) -> np.ndarray:
    return matched(case, case.solve())


@arm("flat-energy", "DiReCT as published: flat energy within a stiff budget", _DIRECTIONS)
def _flat_energy(case: Case) -> np.ndarray:
    return case.solve(objective="flat-energy")


@arm("flat-energy-no-budget", "flat energy without a budget", _DIRECTIONS)
def _flat_energy_no_budget(case: Case) -> np.ndarray:
    return case.solve(objective="flat-energy", stiff_budget=math.inf)


@arm("flat-energy-random-subspace", "flat energy with random directions in the place of the stiff "
     "ones, as many", _DIRECTIONS)
def _flat_energy_random_subspace(case: Case) -> np.ndarray:
    directions = case.evidence.directions
    drawn = case.rng.standard_normal(directions.sketches.shape)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    return case.solve(dataclasses.replace(
        case.evidence, directions=dataclasses.replace(directions, sketches=drawn)),
        objective="flat-energy")


@arm("stiff-alignment", "inner product with the validation gradient in the stiff directions alone",
     _DIRECTIONS)
def _stiff_alignment(case: Case) -> np.ndarray:
    evidence = case.evidence
    flat = sketched.flat_rows(np.concatenate([evidence.rows, evidence.valid_rows]),
                              evidence.directions, "complement")
    count = len(evidence.rows)
    stiff = dataclasses.replace(evidence, rows=evidence.rows - flat[:count],
                                valid_rows=evidence.valid_rows - flat[count:])
    return case.largest(_dots(stiff))


@arm("alignment", "inner product with the validation gradient in flat directions, within a stiff "
     "budget", _DIRECTIONS)
def _alignment(case: Case) -> np.ndarray:
    return case.solve(objective="alignment")


@arm("descent", "quadratic model of the validation loss", _DIRECTIONS)
def _descent(case: Case) -> np.ndarray:
    return case.solve(objective="descent")


def in_proportions(case: Case, allowed: np.ndarray) -> np.ndarray:
    """[K] of the allowed [N], at random, with as many of each domain as the validation set has
    tokens of it. Where a domain has too few, the others fill up.
    """
    names = np.unique(case.valid_domains)
    tokens = np.array([case.valid_labels[case.valid_domains == name].sum() for name in names])
    order = case.rng.permutation(len(case.domains))
    order = np.concatenate([order[allowed[order]], order[~allowed[order]]])
    wanted = np.floor(case.num_select * tokens / tokens.sum()).astype(int)
    chosen = np.concatenate([order[case.domains[order] == name][:count]
                             for name, count in zip(names, wanted, strict=True)])
    rest = order[~np.isin(order, chosen)]
    # The validation's own domains first, then any.
    rest = rest[np.argsort(~np.isin(case.domains[rest], names), kind="stable")]
    return np.sort(np.concatenate([chosen, rest[: case.num_select - len(chosen)]]))


def matched(case: Case, chosen: np.ndarray, num_bins: int = 8) -> np.ndarray:
    """[K] at random, but with the losses and lengths of ``chosen``.

    Candidates are binned by octiles of loss and of length; from each bin as many are drawn as were
    chosen of it.
    """
    bins = np.zeros(len(case.losses), dtype=int)
    for values in (case.losses, case.evidence.labels):
        edges = np.quantile(values, np.linspace(0, 1, num_bins + 1)[1:-1])
        bins = bins * num_bins + np.searchsorted(edges, values)
    order = case.rng.permutation(len(bins))
    counts = np.bincount(bins[chosen], minlength=num_bins**2)
    drawn = [order[bins[order] == b][:count] for b, count in enumerate(counts) if count]
    return np.sort(np.concatenate(drawn))


def _dots(evidence: Evidence) -> np.ndarray:
    return evidence.rows.astype(np.float64) @ evidence.valid_rows.astype(np.float64).mean(0)


def _norms(rows: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("nk,nk->n", rows, rows, dtype=np.float64))
