"""What a run directory of ``compare`` says, as one plain dict (``comparison.json``).

Page and text are made from this dict alone, and every figure in them stands in it. It can be made
of a run that is not finished: seeds that are not there are left out of what they belong to, and
counted.

Letters: S seeds, N candidates, K chosen, M test sets. The *mean test loss* of an arm and seed is
the mean of its losses on the M test sets, so that each domain counts the same; ``all`` is the loss
over all test tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from megatron_direct.comparison import statistics
from megatron_direct.comparison.statistics import compare_by_seed
from megatron_direct.mcore.training import read_metrics
from megatron_direct.runtime import files
from megatron_direct.runtime.run_directory import RunDirectory

PAPER_ARM = "flat-energy"  # DiReCT's own objective
RANDOM_SUBSPACE = "flat-energy-random-subspace"  # its stiff directions are others than all arms'
# What the arm that `select` uses by default has to beat, beside the reference.
RIVALS = ("perplexity-low", "perplexity-middle", "perplexity-high", "gradient-norm",
          "gradient-dot", "gradient-cosine", "gradient-dot-adam")
# What the default is read against beside its rivals: what could be had, and what it is made of.
YARDSTICKS = ("oracle", "domain", "whole-pool", "random-matched", "direct-onset",
              "direct-unshrunk")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_CURVE_POINTS = 40  # of a loss curve: means over as many stretches of it


@dataclass(frozen=True)
class Result:
    """One annealing. chosen: [K] positions among the seed's candidates."""

    losses: dict
    chosen: np.ndarray
    training_losses: np.ndarray


class Candidates:
    """``samples.npz`` of one seed: arrays [N]."""

    def __init__(self, path: Path):
        with np.load(path) as data:
            self.numbers, self.loss, self.labels, self.domain, self.corrupted, self.stiff_cost = (
                data[key] for key in ("candidates", "loss", "labels", "domain", "corrupted",
                                      "stiff_cost"))

    def positions(self, numbers: np.ndarray) -> np.ndarray:
        order = np.argsort(self.numbers)
        found = order[np.searchsorted(self.numbers, numbers, sorter=order).clip(
            max=len(order) - 1)]
        if not np.array_equal(self.numbers[found], numbers):
            raise ValueError("a chosen sample is none of the seed's candidates: chosen.npy and "
                             "samples.npz are of different runs")
        return found


def summarise(run_dir: str | Path) -> dict:
    """The dict; arms by ascending mean test loss, those without any result last."""
    run = RunDirectory(run_dir)
    setting = files.read_json(run.path / "setting.json")
    record = run.record().get("compare", {})
    pools = {seed: Candidates(run.path / "seeds" / str(seed) / "samples.npz")
             for seed in setting["seeds"]
             if (run.path / "seeds" / str(seed) / "samples.npz").is_file()}
    results = {name: {seed: _read(run.path / "arms" / name / str(seed), pools[seed])
                      for seed in pools if _is_there(run.path / "arms" / name / str(seed))}
               for name in setting["arms"]}
    before = _before(results)
    reference = results.get(setting["reference"], {})
    pool = _pool(setting, pools)
    arms = [_arm(name, setting, results[name], reference, pools) for name in setting["arms"]]
    others = [arm for arm in arms if arm["name"] != setting["reference"]]
    _correct([arm["difference"] for arm in others])
    for arm in arms:
        arm["cost"] = _cost(arm, setting, before, pool)
    arms.sort(key=lambda arm: (arm["mean_loss"] is None, arm["mean_loss"] or 0.0, arm["name"]))
    texts = run.path / "texts.json"
    return {
        "setting": setting, "identity": record.get("identity", {}),
        "finished": not any(arm["missing"] for arm in arms),
        "reference": setting["reference"], "default_arm": setting["default_arm"],
        "confidence": statistics.CONFIDENCE, "before": before, "pool": pool, "arms": arms,
        "default_against": _default_against(setting, results),
        "overlap": _overlaps([arm["name"] for arm in arms], results),
        "spectra": _spectra(run.path, setting["seeds"]),
        "texts": files.read_json(texts) if texts.is_file() else None}


def mean_test_loss(losses: dict[str, float]) -> float:
    """The mean over test sets; ``all`` is none of them."""
    return float(np.mean([loss for name, loss in losses.items() if name != "all"]))


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Size of the intersection over size of the union, of sets given as arrays."""
    shared = len(np.intersect1d(a, b))
    return shared / max(len(a) + len(b) - shared, 1)


def _is_there(folder: Path) -> bool:
    return (folder / "result.json").is_file() and (folder / "chosen.npy").is_file()


def _read(folder: Path, candidates: Candidates) -> Result:
    metrics = read_metrics(folder / "metrics.jsonl")
    return Result(files.read_json(folder / "result.json"),
                  candidates.positions(np.load(folder / "chosen.npy")),
                  np.array([line["loss"] for line in metrics], dtype=np.float64))


def _arm(name: str, setting: dict, results: dict[int, Result], reference: dict[int, Result],
         pools: dict[int, Candidates]) -> dict:
    sets = [*setting["test"], "all"]
    by_set = {of: (_losses(results, of), _losses(reference, of)) for of in (None, *sets)}
    losses = by_set[None][0]
    return {
        "name": name, "description": setting["arms"][name],
        "seeds": list(results), "missing": [s for s in setting["seeds"] if s not in results],
        "losses": {str(seed): loss for seed, loss in losses.items()},
        "mean_loss": _mean(losses.values()),
        "tests": {of: _mean(by_set[of][0].values()) for of in sets},
        "difference": difference(*by_set[None]),
        "test_differences": {of: difference(*by_set[of]) for of in sets},
        "composition": _composition(results),
        "picks": _picks([(pools[seed], r.chosen) for seed, r in results.items()]),
        "problem": {str(seed): _problem(r, pools[seed]) for seed, r in results.items()},
        "overlap_between_seeds": _mean(
            [jaccard(pools[a].numbers[results[a].chosen], pools[b].numbers[results[b].chosen])
             for i, a in enumerate(results) for b in list(results)[:i]]),
        "curve": _curve([r.training_losses for r in results.values()])}


def _losses(results: dict[int, Result], of: str | None) -> dict[int, float]:
    """seed -> loss on one test set, or the mean of all for None."""
    return {seed: mean_test_loss(r.losses["after"]["test"]) if of is None
            else r.losses["after"]["test"][of] for seed, r in results.items()}


def difference(arm: dict[int, float], reference: dict[int, float]) -> dict:
    """A PairedDifference as plain values, with its verdict."""
    found = compare_by_seed(arm, reference)
    return files.as_json({**asdict(found), "interval": found.interval, "verdict": found.verdict})


def _correct(differences: Sequence[dict]) -> None:
    """Enters Holm's corrected p-values, of differences that are read as one family."""
    corrected = statistics.holm([d["p_value"] for d in differences])
    for found, p_value in zip(differences, corrected, strict=True):
        found["p_holm"] = p_value


def _default_against(setting: dict, results: dict[str, dict[int, Result]]) -> dict[str, dict]:
    """arm -> default less arm, for the reference and the rivals that were run."""
    mine = _losses(results.get(setting["default_arm"], {}), None)
    against = {name: difference(mine, _losses(results[name], None))
               for name in (setting["reference"], *RIVALS)
               if mine and name in results and name != setting["default_arm"]}
    _correct(list(against.values()))
    return against


def _before(results: dict[str, dict[int, Result]]) -> dict:
    """Losses at the checkpoint that all arms start from: of any result, since they are the same."""
    for of_arm in results.values():
        for result in of_arm.values():
            losses = result.losses["before"]
            return {"mean_loss": mean_test_loss(losses["test"]), "tests": losses["test"]}
    return {"mean_loss": None, "tests": {}}


def _pool(setting: dict, pools: dict[int, Candidates]) -> dict:
    """The candidates themselves, as if an arm had picked them all."""
    everything = [(c, np.arange(len(c.numbers))) for c in pools.values()]
    return {"picks": _picks(everything),
            "domains": {name: {"samples": _mean([(c.domain == i).sum() for c in pools.values()]),
                               "corrupted": _mean([c.corrupted[c.domain == i].sum()
                                                   for c in pools.values()])}
                        for i, name in enumerate(setting["pools"])}}


def _picks(picked: Sequence[tuple[Candidates, np.ndarray]]) -> dict:
    """Of some choices, means over seeds: how many, of what loss, length and soundness."""
    def mean_over_seeds(figure):
        return _mean([figure(candidates, chosen) for candidates, chosen in picked])

    def quantiles(name):
        values = [np.quantile(getattr(c, name)[chosen], QUANTILES) for c, chosen in picked]
        return np.mean(values, 0).tolist() if values else None

    return {"samples": mean_over_seeds(lambda c, chosen: len(chosen)),
            "tokens": mean_over_seeds(lambda c, chosen: c.labels[chosen].sum()),
            "corrupted": mean_over_seeds(lambda c, chosen: c.corrupted[chosen].mean()),
            "loss_mean": mean_over_seeds(lambda c, chosen: c.loss[chosen].mean()),
            "loss": quantiles("loss"), "labels": quantiles("labels")}


def _composition(results: dict[int, Result]) -> dict[str, dict[str, float]]:
    """pool -> counts, means over seeds."""
    found = [r.losses["composition"] for r in results.values()]
    return {name: {key: _mean([c[name][key] for c in found]) for key in counts}
            for name, counts in (found[0].items() if found else ())}


def _problem(result: Result, candidates: Candidates) -> dict:
    """Stiff cost and budget, in units of what as many average samples cost.

    Budget and objective are there for arms that solve a selection problem, the cost for all.
    """
    unit = len(result.chosen) * float(candidates.stiff_cost.mean())
    found = result.losses.get("problem") or {}
    return {"stiff_cost": _over(float(candidates.stiff_cost[result.chosen].sum()), unit),
            "stiff_budget": _over(found.get("stiff_budget"), unit),
            "objective_value": found.get("objective_value"),
            "mean_loss": mean_test_loss(result.losses["after"]["test"])}


def _over(value: float | None, unit: float) -> float | None:
    return value / unit if value is not None and np.isfinite(value) and unit > 0 else None


def _cost(arm: dict, setting: dict, before: dict, pool: dict) -> dict:
    """What choosing costs, and what it would have to save.

    A unit of cost is a token's pass forward and back. With T tokens of annealing and a cost of c T,
    the arm is as dear as the reference when it is annealed on (1 - c) T tokens (`annealing_left`).

    How few tokens the arm needs for the reference's loss is not in the data: each arm was annealed
    for T alone, and the loss in the middle of a decay is not that of a shorter one. A bound is
    there if the loss as a function of the annealing's length is convex, each further token bringing
    less: then it lies below the chord from the loss before to the arm's loss, and the arm needs at
    most the share (before - reference) / (before - arm) (`needed_at_most`).
    """
    passes, tokens = setting["passes_of_selection"].get(arm["name"]), pool["picks"]["tokens"]
    share = None if passes is None or tokens is None else passes * tokens / setting["tokens"]
    gain, needed = arm["difference"]["mean"], None
    if gain is not None and gain < 0 and arm["mean_loss"] < before["mean_loss"]:
        whole = before["mean_loss"] - arm["mean_loss"]
        needed = max(0.0, (whole + gain) / whole)
    return {"passes": passes, "share_of_annealing": share,
            "annealing_left": None if share is None else max(0.0, 1 - share),
            "needed_at_most": needed}


def _overlaps(names: Sequence[str], results: dict[str, dict[int, Result]]) -> dict:
    """Jaccard index of each two arms, mean over the seeds that both have."""
    matrix = [[_mean([jaccard(results[a][seed].chosen, results[b][seed].chosen)
                      for seed in results[a] if seed in results[b]]) for b in names]
              for a in names]
    return {"arms": list(names), "matrix": matrix}


def _curve(losses: Sequence[np.ndarray]) -> dict | None:
    """Training loss by iteration: means over stretches of it; then mean and range over seeds."""
    length = min((len(of_seed) for of_seed in losses), default=0)
    if length == 0:
        return None
    stretches = np.array_split(np.arange(length), min(length, _CURVE_POINTS))
    means = np.array([[of_seed[part].mean() for part in stretches] for of_seed in losses])
    return {"iteration": [float(part.mean()) + 1 for part in stretches],
            "mean": means.mean(0).tolist(), "low": means.min(0).tolist(),
            "high": means.max(0).tolist()}


def _spectra(run_path: Path, seeds: Sequence[int]) -> dict[str, dict]:
    found = {}
    for seed in seeds:
        # At the checkpoint, as the stiff costs are; without a pilot there is no folder of its own.
        paths = (run_path / "seeds" / str(seed) / part / "curvature" / "spectrum.json"
                 for part in ("onset", "."))
        path = next(filter(Path.is_file, paths), None)
        if path is not None:
            spectrum = files.read_json(path)
            found[str(seed)] = {"eigenvalues": spectrum["eigenvalues"],
                                "num_stiff": spectrum["elbow"]["num_stiff"],
                                "operator": spectrum["operator"], "notes": spectrum["notes"]}
    return found


def _mean(values) -> float | None:
    values = list(values)
    return float(np.mean(values)) if values else None
