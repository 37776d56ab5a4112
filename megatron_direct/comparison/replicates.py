"""Arms at one seed: what they take, annealed, and measured on the test sets.

Two arms may share an annealing: one is its last weights, the other the mean of its last states.
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_direct.comparison.arms import Arm, Case, find_arm
from megatron_direct.comparison.ceiling import CeilingSearch, NoCeiling
from megatron_direct.comparison.measurements import (
    MEASUREMENTS,
    Setting,
    measurement_folder,
    uncut_labels,
)
from megatron_direct.comparison.repeats import Repeats, repeats_of
from megatron_direct.comparison.run_results import mean_test_loss
from megatron_direct.data import indexed
from megatron_direct.data.blend_plan import Blend
from megatron_direct.errors import NothingFits
from megatron_direct.mcore import blend, checkpoint, grid, model, training_folder
from megatron_direct.mcore.merging import Average
from megatron_direct.runtime import arrays, files, parallel
from megatron_direct.runtime.run_directory import locked, versions
from megatron_direct.selection import InfeasibleQuotas, InfeasibleSelection
from megatron_direct.steps.decay import Decay, Recipe, Segment, decay, set_losses
from megatron_direct.steps.merged import make_average
from megatron_direct.steps.pilot import states_to_merge
from megatron_direct.steps.rounds import Rounds
from megatron_direct.steps.selected import composition, masks_of


@dataclass(frozen=True)
class Replicate:
    """One arm at one seed. before: the checkpoint's losses."""

    setting: Setting
    arm: Arm
    seed: int
    before: dict

    @property
    def folder(self) -> Path:
        return self.setting.arm_folder(self.arm.name, self.seed)


@dataclass(frozen=True, eq=False)
class Taken:
    """chosen: numbers of the samples; problem: what the solver said, if one was solved; repeats:
    how much of it would be chosen again, if anything was."""

    chosen: np.ndarray
    problem: dict | None = None
    repeats: Repeats | None = None


def sharing_annealings(names: Sequence[str]) -> list[list[str]]:
    """The arms, in order, those together that take the same and are annealed the same way but for
    an average at its end: the one without comes first."""
    groups: dict[Any, list[str]] = {}
    for name in names:
        arm = find_arm(name)
        trajectory = None if arm.recipe is None else (arm.recipe.final, arm.rounds)
        groups.setdefault((arm.of or name, trajectory), []).append(name)
    for group in groups.values():
        group.sort(key=lambda name: getattr(find_arm(name).recipe, "average", 0.0))
        assert len(group) <= 2
    return list(groups.values())


def run_together(replicates: Sequence[Replicate], case: Case | None) -> None:
    """Arms that share an annealing, as sharing_annealings has them; all ranks call this.

    case: on rank 0. Arms that can take nothing, and an annealing that diverges, are reported and
    recorded; they are not tried again.
    """
    last = replicates[-1]
    if last.arm.rounds > 1:
        _run_in_rounds(last)
        return
    taken = parallel.on_rank_zero(lambda: _take(replicates, case))
    if taken is None:
        return
    began = time.perf_counter()

    def measure(replicate: Replicate) -> None:
        after = losses_on_test_sets(last.setting, chunks)
        if not np.isfinite(list(after["test"].values())).all():
            raise FloatingPointError("the losses after annealing are not finite")
        seconds = time.perf_counter() - began
        parallel.on_rank_zero(lambda: _write(replicate, taken, after, seconds))

    def measure_others() -> None:
        # First of all: an arm that has its result is never annealed again.
        parallel.on_rank_zero(lambda: _share_metrics(replicates))
        for replicate in replicates[:-1]:
            measure(replicate)

    job = last.setting.onset.job
    try:
        with grid.model_parallel(job.layout, job.num_model_chunks):
            chunks = model.build(job)
            if last.arm.recipe is None:
                _load_average(last.setting, chunks)
            else:
                _Annealing(last.setting, taken.chosen, last.seed, last.folder, _blend(last),
                           f"{last.arm.name} {last.seed}", last.arm.recipe).run(
                               chunks, before_averaging=measure_others)
            measure(last)
    except FloatingPointError as error:  # the other arms and seeds go on
        why = str(error)
        for replicate in replicates:
            parallel.on_rank_zero(lambda there=replicate: _record_failure(there, why))


def _run_in_rounds(replicate: Replicate) -> None:
    """An arm alone, which selects for itself; all ranks call this."""
    folder = replicate.folder
    parallel.on_rank_zero(lambda: shutil.rmtree(folder, ignore_errors=True))
    began, rounds = time.perf_counter(), _rounds_of(replicate)
    try:
        test = rounds.train()["after"].test
        if not np.isfinite(list(test.values())).all():
            raise FloatingPointError("the losses after annealing are not finite")
    except (FloatingPointError, NothingFits) as error:  # the other arms and seeds go on
        why = str(error)
        parallel.on_rank_zero(lambda: _record_failure(replicate, why))
        return

    def write() -> None:
        taken = np.flatnonzero(sum(rounds.counts(number) for number in range(rounds.number)))
        _write(replicate, Taken(taken), {"test": test}, time.perf_counter() - began)
        for name in ("rounds", "checkpoints"):
            shutil.rmtree(folder / name)

    parallel.on_rank_zero(write)


def _rounds_of(replicate: Replicate) -> Rounds:
    """The first selection is measured where that of the arm ``direct`` is."""
    setting, seed = replicate.setting, replicate.seed
    job = setting.onset.job
    onset = dataclasses.replace(setting.onset, job=dataclasses.replace(
        job, batch=dataclasses.replace(job.batch, seed=seed)))
    measure = MEASUREMENTS["select"].settings(dataclasses.replace(
        setting.measure, sketch=dataclasses.replace(setting.measure.sketch, seed=seed)))
    rounds = Rounds(onset, measure, setting.selection, replicate.folder, replicate.arm.rounds,
                    setting.config.lr_wsd_decay_iters, setting.config.test_data_path,
                    max_epochs=None,  # as for the other arms
                    load_optim=onset.checkpoint.has_readable_optimizer,
                    measured_in=measurement_folder(setting, seed, "select"))
    return dataclasses.replace(
        rounds, selection=setting.selection.for_annealing(rounds.tokens_of_a_round))


def losses_on_test_sets(setting: Setting, chunks) -> dict[str, dict[str, float]]:
    # Of the validation sets no loss is asked for: the selections were made for them.
    return set_losses(chunks, setting.onset.job.model, setting.onset.job.batch, valid=(),
                      test=setting.config.test_data_path)


def states_of_training(setting: Setting) -> Average:
    """The last states of the training that led to the checkpoint; all ranks call this.

    Raises UserError if fewer than two are there.
    """
    return Average.uniform(states_to_merge(setting.measure.pilot, setting.onset.checkpoint))


def _load_average(setting: Setting, chunks) -> None:
    folder = setting.folder / "merged"
    with locked(folder, "compare", waits=True):  # seeds may be run at once
        make_average(states_of_training(setting), folder)
    checkpoint.load_model(parallel.on_rank_zero(lambda: training_folder.latest(folder)), chunks)


@dataclass(frozen=True, eq=False)
class _Annealing:
    """Of which samples, with which blend and at which seed; folder: for what it leaves."""

    setting: Setting
    chosen: np.ndarray
    seed: int
    folder: Path
    blend: Blend
    description: str
    recipe: Recipe = field(default_factory=Recipe)

    def run(self, chunks, before_averaging: Callable[[], object] = lambda: None) -> None:
        onset, iterations = self.setting.onset, self.setting.config.lr_wsd_decay_iters
        request = blend.BlendRequest.for_job(
            onset.job, iterations, self.seed, self.folder / "cache",
            onset.checkpoint.tokenizer_digest)
        masks = masks_of(onset.pool, onset.digests_of(onset.pool), self.chosen)
        dataset, _ = blend.build_blend(self.blend, masks, request)
        decay(Decay(onset.job, onset.checkpoint, [Segment(0, dataset)], iterations, self.folder,
                    self.description, load_optim=onset.checkpoint.has_readable_optimizer,
                    recipe=self.recipe), chunks, before_averaging=before_averaging)


def ceiling_search(setting: Setting) -> CeilingSearch:
    return CeilingSearch(setting.folder / "ceiling", setting.num_tokens)


def with_ceiling(setting: Setting, case: Case | None) -> Case | None:
    """The case, with the best mixture that a search finds; all ranks call this."""
    onset = setting.onset

    def anneal(seed: int, chosen: np.ndarray) -> float:
        folder = setting.folder / "ceiling" / "annealing"
        parallel.on_rank_zero(lambda: shutil.rmtree(folder, ignore_errors=True))
        try:
            with grid.model_parallel(onset.job.layout, onset.job.num_model_chunks):
                chunks = model.build(onset.job)
                _Annealing(setting, chosen, seed, folder, Blend(onset.pool.prefixes), "ceiling"
                           ).run(chunks)
                loss = mean_test_loss(set_losses(chunks, onset.job.model, onset.job.batch,
                                                 valid=onset.valid.prefixes)["valid"])
        except FloatingPointError:
            return np.inf
        return loss if np.isfinite(loss) else np.inf

    with locked(setting.folder / "ceiling", "compare", waits=True):  # seeds may be run at once
        return ceiling_search(setting).completed(case, anneal)


def _blend(replicate: Replicate) -> Blend:
    """The pools, each by its tokens, or one of them as half of what is seen."""
    pool, dataset = replicate.setting.onset.pool, replicate.arm.dataset
    if not dataset:
        return Blend(pool.prefixes)
    labels = uncut_labels(pool)
    tokens = np.array([labels[first:end].sum() for first, end in itertools.pairwise(pool.first)],
                      dtype=float)
    is_it = np.array(list(indexed.prefix_names(pool.prefixes).values())) == dataset
    return Blend(pool.prefixes, (tokens / tokens.sum() / 2 + is_it / 2).tolist())


def _take(replicates: Sequence[Replicate], case: Case | None) -> Taken | None:
    """What the arms take, all of them the same; None, with their failures recorded, where there is
    nothing to take: no samples keep budget and quotas, say (rank 0)."""
    assert case is not None  # on rank 0
    for replicate in replicates:
        shutil.rmtree(replicate.folder, ignore_errors=True)  # of an annealing that was killed
    arm = replicates[0].arm
    try:
        positions, found = arm.take(case)
    except (InfeasibleSelection, InfeasibleQuotas, NoCeiling) as error:  # the other arms go on
        for replicate in replicates:
            _record_failure(replicate, str(error))
        return None
    candidates, = arrays.read_named(
        replicates[0].setting.seed_folder(case.seed) / "samples.npz", ["candidates"],
        arrays.MAKE_AGAIN)
    problem = None if found is None else {
        "stiff_cost": found.stiff_cost, "stiff_budget": found.stiff_budget,
        "objective_value": found.objective, "status": found.status}
    return Taken(candidates[positions], problem, repeats_of(arm, case, len(positions)))


def _write(replicate: Replicate, taken: Taken, after: dict, seconds: float) -> None:
    folder, pool = replicate.folder, replicate.setting.onset.pool
    folder.mkdir(parents=True, exist_ok=True)
    with files.written_whole(folder / "chosen.npy") as file:
        np.save(file, taken.chosen)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    parts = composition(pool, taken.chosen)
    files.write_json(folder / "result.json", {
        "arm": replicate.arm.name, "seed": replicate.seed,
        "version": versions()["megatron-direct"], "before": replicate.before,
        "after": after, "seconds": seconds, "problem": taken.problem,
        "repeats": None if taken.repeats is None else vars(taken.repeats),
        "composition": {name: vars(part) for name, part in parts.items()}})
    print(f"{replicate.arm.name}, seed {replicate.seed}: mean test loss "
          f"{mean_test_loss(after['test']):.4f}", flush=True)


def _share_metrics(replicates: Sequence[Replicate]) -> None:
    """The training losses of the one annealing."""
    *others, last = (replicate.folder / "metrics.jsonl" for replicate in replicates)
    for path in others:
        with files.written_whole(path) as file:
            file.write(last.read_bytes())


def _record_failure(replicate: Replicate, why: str) -> None:
    """Unless it has its result: the average at the end may diverge alone."""
    if not (replicate.folder / "result.json").is_file():
        replicate.folder.mkdir(parents=True, exist_ok=True)
        files.write_json(replicate.folder / "failed.json", {"error": why})
        parallel.say(f"{replicate.arm.name}, seed {replicate.seed}: {why}")
