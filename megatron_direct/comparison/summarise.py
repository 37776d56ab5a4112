"""From the files of a comparison to its summary: means over seeds, differences, overlaps, costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_direct.comparison import statistics
from megatron_direct.comparison.repeats import Repeats
from megatron_direct.comparison.run_results import Candidates, Result, RunResults, read_run
from megatron_direct.comparison.statistics import PairedDifference, compare_by_seed
from megatron_direct.comparison.summary import (
    RIVALS,
    ArmSummary,
    ComparisonSummary,
    Composition,
    Cost,
    DomainCounts,
    LossCurve,
    LossesBefore,
    Overlap,
    PoolSummary,
    ProblemSummary,
    SampleStatistics,
    SettingSummary,
    ordered,
)

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CURVE_POINTS = 40  # of a loss curve: means over as many stretches of it

ResultsBySeed = dict[int, Result]


def summarise(run_dir: str | Path) -> ComparisonSummary:
    run = read_run(run_dir)
    before, pool = _before(run), _pool(run)
    arms = {name: _arm(name, run, before, pool) for name in run.setting.arms}
    family = statistics.corrected({name: arm.difference for name, arm in arms.items()
                                   if name != run.setting.reference})
    arms |= {name: replace(arms[name], difference=found) for name, found in family.items()}
    in_order = ordered(arms.values())
    return ComparisonSummary(
        setting=run.setting, identity=run.identity,
        finished=not any(set(arm.missing) - set(arm.failed) for arm in in_order),
        confidence=statistics.CONFIDENCE,
        before=before, pool=pool, arms=tuple(in_order), default_against=_default_against(run),
        overlap=_overlap([arm.name for arm in in_order], run), spectra=run.spectra,
        texts=run.texts)


def jaccard_matrix(sets: Sequence[np.ndarray], size: int) -> np.ndarray:
    """[n, n] size of the intersection over size of the union, of n sets of numbers below size."""
    member = np.zeros((len(sets), size), dtype=np.float32)  # sums are exact up to 2^24 members
    for row, of_set in zip(member, sets, strict=True):
        row[of_set] = 1
    shared = (member @ member.T).astype(np.float64)
    sizes = shared.diagonal()
    return shared / np.maximum(sizes[:, None] + sizes - shared, 1)


def _arm(name: str, run: RunResults, before: LossesBefore | None, pool: PoolSummary) -> ArmSummary:
    setting, results = run.setting, run.results[name]
    reference = run.results.get(setting.reference, {})
    losses = _losses(results)
    by_set = {test: (_losses(results, test), _losses(reference, test))
              for test in setting.test_and_all}
    difference = compare_by_seed(losses, _losses(reference))
    return ArmSummary(
        name=name, description=setting.arms[name], seeds=tuple(results),
        missing=tuple(seed for seed in setting.seeds if seed not in results),
        losses=losses, mean_loss=_mean(losses.values()),
        tests={test: _mean(of_arm.values()) for test, (of_arm, _) in by_set.items()},
        difference=difference,
        test_differences={test: compare_by_seed(*pair) for test, pair in by_set.items()},
        composition=_composition(results),
        selected=_statistics([(run.candidates[seed], r.chosen) for seed, r in results.items()]),
        problem={seed: _problem(r, run.candidates[seed]) for seed, r in results.items()},
        overlap_between_seeds=_overlap_between_seeds(results, run.candidates),
        repeats=_repeats(results),
        shared_by_seeds=_shared_by_seeds(results, run.candidates),
        curve=_curve([r.training_losses for r in results.values()]),
        cost=cost(name, difference.mean, _mean(losses.values()), setting, before, pool),
        failed={seed: why for seed, why in run.failures[name].items() if seed not in results},
        versions=tuple(sorted({r.file.version for r in results.values() if r.file.version})))


def _losses(results: ResultsBySeed, test: str | None = None) -> dict[int, float]:
    """seed -> loss on one test set, or the mean of all for None."""
    return {seed: r.file.after.mean if test is None else r.file.after.test[test]
            for seed, r in results.items()}


def _default_against(run: RunResults) -> dict[str, PairedDifference]:
    """arm -> default - arm, for the reference and the rivals that were run."""
    default = _losses(run.results.get(run.setting.default_arm, {}))
    return statistics.corrected({
        name: compare_by_seed(default, _losses(run.results[name]))
        for name in (run.setting.reference, *RIVALS)
        if default and name in run.results and name != run.setting.default_arm})


def _before(run: RunResults) -> LossesBefore | None:
    """Losses at the checkpoint that all arms start from: of any result, since they are the same."""
    for of_arm in run.results.values():
        for result in of_arm.values():
            return LossesBefore(result.file.before.mean, result.file.before.test)
    return None


def _pool(run: RunResults) -> PoolSummary:
    """The candidates themselves, as if an arm had selected them all."""
    seeds = list(run.candidates.values())
    domains = {}
    for number, name in enumerate(run.setting.pools if seeds else ()):
        domains[name] = DomainCounts(
            float(np.mean([(c.domain == number).sum() for c in seeds])),
            float(np.mean([c.corrupted[c.domain == number].sum() for c in seeds])))
    return PoolSummary(_statistics([(c, np.arange(len(c.numbers))) for c in seeds]), domains)


def _statistics(selections: Sequence[tuple[Candidates, np.ndarray]]) -> SampleStatistics | None:
    """Of one selection a seed, given as positions among the seed's candidates."""
    def mean_over_seeds(figure: Callable[[Candidates, np.ndarray], float]) -> float:
        return float(np.mean([figure(candidates, chosen) for candidates, chosen in selections]))

    def quantiles(values: Sequence[np.ndarray]) -> tuple[float, ...]:
        return tuple(np.mean([np.quantile(of_seed, QUANTILES) for of_seed in values], 0).tolist())

    if not all(len(chosen) for _, chosen in selections) or not selections:
        return None
    return SampleStatistics(
        samples=mean_over_seeds(lambda c, chosen: len(chosen)),
        tokens=mean_over_seeds(lambda c, chosen: c.labels[chosen].sum()),
        corrupted=mean_over_seeds(lambda c, chosen: c.corrupted[chosen].mean()),
        loss_mean=mean_over_seeds(lambda c, chosen: c.loss[chosen].mean()),
        loss=quantiles([c.loss[chosen] for c, chosen in selections]),
        labels=quantiles([c.labels[chosen] for c, chosen in selections]),
        uncut_tokens=mean_over_seeds(lambda c, chosen: c.uncut_labels[chosen].sum()))


def _composition(results: ResultsBySeed) -> dict[str, Composition]:
    found = [r.file.composition for r in results.values()]
    return {name: Composition(*(float(np.mean([getattr(of_seed[name], key) for of_seed in found]))
                                for key in ("samples", "selected", "corrupted",
                                            "selected_corrupted")))
            for name in (found[0] if found else ())}


def _problem(result: Result, candidates: Candidates) -> ProblemSummary:
    unit = len(result.chosen) * float(candidates.stiff_cost.mean())

    def relative(value: float | None) -> float | None:
        return value / unit if value is not None and np.isfinite(value) and unit > 0 else None

    solved, cost = result.file.problem, float(candidates.stiff_cost[result.chosen].sum())
    budget = None
    if solved and solved.stiff_budget is not None and solved.stiff_cost:
        # Its directions may be others than those of the candidates' costs, at another point.
        budget = relative(cost * (solved.stiff_budget / solved.stiff_cost))
    return ProblemSummary(
        stiff_cost=relative(cost), stiff_budget=budget,
        objective_value=solved.objective_value if solved else None,
        mean_loss=result.file.after.mean)


def cost(name: str, difference: float | None, mean_loss: float | None, setting: SettingSummary,
         before: LossesBefore | None, pool: PoolSummary) -> Cost:
    """What selecting by an arm costs, and what it would have to save.

    A unit of cost is a token's pass forward and back. With T tokens of annealing and a cost of c T,
    the arm costs as much as the reference when it is annealed on (1 - c) T tokens
    (`annealing_left`).

    How few tokens the arm needs for the reference's loss is not in the data: each arm was annealed
    for T alone, and the loss in the middle of a decay is not that of a shorter one. A bound is
    there if the loss as a function of the annealing's length is convex, each further token bringing
    less: then it lies below the chord from the loss before to the arm's loss, and the arm needs at
    most the share (before - reference) / (before - arm) (`needed_at_most`).
    """
    passes, share, needed = setting.passes_of_selection.get(name), None, None
    if passes is not None and pool.candidates is not None:
        share = passes * pool.candidates.tokens / setting.tokens
    if difference is not None and mean_loss is not None and before is not None:
        gain = before.mean_loss - mean_loss
        if difference < 0 < gain:
            needed = max(0.0, (gain + difference) / gain)
    tokens = 0 if name in setting.not_annealed else setting.tokens
    return Cost(tokens, passes, share, None if share is None else max(0.0, 1 - share), needed)


def _overlap(names: Sequence[str], run: RunResults) -> Overlap:
    total, count = np.zeros((2, len(names), len(names)))
    for seed, candidates in run.candidates.items():
        here = [i for i, name in enumerate(names) if seed in run.results[name]]
        total[np.ix_(here, here)] += jaccard_matrix(
            [run.results[names[i]][seed].chosen for i in here], len(candidates.numbers))
        count[np.ix_(here, here)] += 1
    return Overlap(tuple(names), tuple(
        tuple(float(t / c) if c else None for t, c in zip(*rows, strict=True))
        for rows in zip(total, count, strict=True)))


def _repeats(results: ResultsBySeed) -> Repeats | None:
    return _mean_of([r.file.repeats for r in results.values() if r.file.repeats is not None])


def _shared_by_seeds(results: ResultsBySeed, candidates: dict[int, Candidates]) -> Repeats | None:
    """Of distinct samples; None where a seed chose none. Two random choices of a and b samples, out
    of A and B candidates of which C are the same, share C (a / A) (b / B)."""
    chosen = [(np.unique(candidates[seed].numbers[r.chosen]), candidates[seed].numbers)
              for seed, r in results.items()]
    if not all(len(of_seed) for of_seed, _ in chosen):
        return None
    return _mean_of([
        Repeats(len(np.intersect1d(a, b)) / size, len(np.intersect1d(of_a, of_b))
                * len(a) * len(b) / (len(of_a) * len(of_b) * size))
        for (a, of_a), (b, of_b) in itertools.combinations(chosen, 2)
        for size in [(len(a) + len(b)) / 2]])


def _mean_of(found: Sequence[Repeats]) -> Repeats | None:
    return Repeats(*(float(np.mean([getattr(one, name) for one in found]))
                     for name in ("samples", "by_chance"))) if found else None


def _overlap_between_seeds(results: ResultsBySeed, candidates: dict[int, Candidates],
                           ) -> float | None:
    """Each seed has candidates of its own, so the samples' own numbers are compared."""
    chosen = [candidates[seed].numbers[r.chosen] for seed, r in results.items()]
    size = 1 + max((int(numbers.max(initial=0)) for numbers in chosen), default=0)
    matrix = jaccard_matrix(chosen, size)
    return _mean(matrix[np.tril_indices(len(chosen), -1)])


def _curve(losses: Sequence[np.ndarray]) -> LossCurve | None:
    """Of the seeds whose training losses are there."""
    losses = [of_seed for of_seed in losses if len(of_seed)]
    length = min((len(of_seed) for of_seed in losses), default=0)
    if length == 0:
        return None
    stretches = np.array_split(np.arange(length), min(length, _CURVE_POINTS))
    means = np.array([[of_seed[part].mean() for part in stretches] for of_seed in losses])
    return LossCurve(
        iteration=tuple(float(part.mean()) + 1 for part in stretches),
        mean=tuple(means.mean(0).tolist()), low=tuple(means.min(0).tolist()),
        high=tuple(means.max(0).tolist()))


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None
