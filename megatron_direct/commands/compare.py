"""``megatron-direct compare``: does selection help here, and which?

Arms (:mod:`megatron_direct.comparison.arms`) fork from one checkpoint and are annealed with the
same tokens, schedule, batches and order of work. Each seed is a replicate: of the hashes, of the
draw of validation samples, of what is drawn at random, and of the order of the data. The losses
that count are of test sets that no selection saw.

    RUN_DIR/seeds/S/M      sketches and curvature of one seed, by measurement, shared by all arms
    RUN_DIR/arms/ARM/S     what the arm selected, and its losses; finished arms are not repeated
    RUN_DIR/comparison.json, results.md, report.html      rewritten at the end of each call
"""

from __future__ import annotations

import dataclasses
import itertools
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_direct.comparison import record
from megatron_direct.comparison.arms import BY_DOMAIN, DATASET, REGISTRY, Case, find_arm
from megatron_direct.comparison.measurements import (
    CompareConfig,
    Setting,
    domain_names,
    measured_case,
)
from megatron_direct.comparison.run_results import mean_test_loss
from megatron_direct.comparison.summarise import summarise
from megatron_direct.comparison.summary import write_summary
from megatron_direct.config import (
    Given,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
)
from megatron_direct.data import indexed
from megatron_direct.data.blend_plan import Blend
from megatron_direct.errors import UserError
from megatron_direct.evaluation.tokenizers import tokenizer_of
from megatron_direct.mcore import blend, checkpoint, grid, model, shards
from megatron_direct.reports import comparison_page, markdown
from megatron_direct.runtime import arrays, files, parallel
from megatron_direct.runtime.manifest import Artefact, Key, State
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.steps import solve as solve_step
from megatron_direct.steps.curvature import CurvatureConfig
from megatron_direct.steps.decay import Decay, Segment, decay, set_losses
from megatron_direct.steps.measure import MeasureSettings
from megatron_direct.steps.onset import OnsetConfig, dataset_digests, open_onset
from megatron_direct.steps.pilot import PilotConfig, states_to_merge
from megatron_direct.steps.selected import composition, masks_of
from megatron_direct.steps.sketch import SketchConfig

REFERENCE = "random"


@dataclass(frozen=True)
class CompareRequest:
    compare: CompareConfig
    onset: OnsetConfig
    pilot: PilotConfig = field(default_factory=PilotConfig)
    sketch: SketchConfig = field(default_factory=SketchConfig)
    curvature: CurvatureConfig = field(default_factory=CurvatureConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    layout: ParallelConfig = field(default_factory=ParallelConfig)
    given: Given = field(default_factory=Given)


@dataclass(frozen=True)
class ComparisonKey(Key):
    """What the figures depend on. Arms and seeds are not: more may be added later. How many
    samples are computed at once, and the seed of the hashes, are left at their defaults."""

    checkpoint_digest: str
    pool_digests: tuple[str, ...]
    valid_digests: tuple[str, ...]
    test_digests: tuple[str, ...]
    lr_wsd_decay_iters: int
    first_seed: int
    global_batch_size: int
    model: ModelConfig
    optimizer: OptimizerConfig
    pilot: PilotConfig
    sketch: SketchConfig
    curvature: CurvatureConfig
    problem: SelectionConfig
    precision: Precision = field(default_factory=Precision)


def compare(request: CompareRequest) -> None:
    """Measures, selects and anneals what is not there yet, and writes the report; all ranks call
    this."""
    setting = _setting(request)
    chosen = _arms(setting)
    run, artefact = RunDirectory(setting.folder), Artefact(setting.folder, "a comparison")
    with run.entered("compare", request):
        _compare(setting, chosen, artefact)


def _compare(setting: Setting, chosen: list[str], artefact: Artefact) -> None:
    key = _key(setting)
    if parallel.on_rank_zero(lambda: artefact.state(key)) is State.NEW:
        parallel.on_rank_zero(lambda: artefact.begin(key, _paths(setting)))
    before = _before(setting)
    for seed in setting.seeds_of_this_call:
        missing = parallel.on_rank_zero(
            lambda seed=seed: [name for name in chosen if not any(
                (setting.arm_folder(name, seed) / file).is_file()
                for file in ("result.json", "failed.json"))])
        if missing:
            case = measured_case(setting, seed, {need for name in missing
                                                 for need in find_arm(name).needs})
            for name in missing:
                _run_arm(_Run(setting, name, seed), case,
                         {key: before[key] for key in ("valid", "test")})
    if setting.config.only_replicate is None:  # else others may be at work beside this one
        parallel.on_rank_zero(lambda: _report(setting, chosen))
        parallel.on_rank_zero(lambda: artefact.finish(key, _paths(setting)))


def _setting(request: CompareRequest) -> Setting:
    config, selection = request.compare, request.selection
    onset = open_onset(request.onset, request.layout, request.given, config.test_data_path)
    if config.tokenizer_model:
        parallel.kept_on_rank_zero(
            lambda: tokenizer_of(config.tokenizer_model, onset.checkpoint, onset.job.model))
    if selection.sketch_rows == "spread":
        raise UserError("--sketch-rows spread is not supported by compare, which solves with all "
                        "rows on rank 0. Leave the flag out, and compare on a smaller pool.")
    selection.require_number_where_needed()
    # Most arms select no sample twice.
    solve_step.check_number(dataclasses.replace(selection, max_count=1), len(onset.pool.usable))
    onset.job.require_runs_on(parallel.world_size(), trains=True)
    solve_step.require_quotas(selection, onset.pool)
    return Setting(config, Path(request.onset.run_dir), onset,
                   MeasureSettings(request.pilot.in_one_spelling(), request.sketch,
                                   request.curvature), selection,
                   dataset_digests(config.test_data_path))


def _arms(setting: Setting) -> list[str]:
    """Those asked for and the reference, or all that can be had here."""
    asked = list(setting.config.arms)
    chosen = asked or list(REGISTRY)
    pools, valid = (set(domain_names(samples))
                    for samples in (setting.onset.pool, setting.onset.valid))
    obstacles = []  # (arms that cannot be had, why, remedy)
    if not pools & valid:
        obstacles.append((
            [name for name in chosen if name in BY_DOMAIN],
            f"no domain of the validation sets ({', '.join(sorted(valid))}) is a domain of the "
            f"pools ({', '.join(sorted(pools))})",
            "A domain is named in the card (PREFIX.json) of a dataset, or else by the last part of "
            "its prefix: give pools and validation sets the same domains, or leave these arms "
            "out."))
    if not setting.onset.checkpoint.has_optimizer:
        obstacles.append((
            [name for name in chosen if "adam-sketches" in find_arm(name).needs],
            f"{setting.onset.checkpoint.path} holds no second moments of Adam",
            "Save it with its optimizer, or leave these arms out."))
    for names, why, remedy in obstacles:
        if names and asked:
            raise UserError(f"--arms {' '.join(names)}: {why}. {remedy}")
        if names:
            parallel.say(f"{', '.join(names)}: left out, since {why}.")
        chosen = [name for name in chosen if name not in names]
    names = list(indexed.prefix_names(setting.onset.pool.prefixes).values())
    for name in chosen:
        if name.startswith(DATASET) and name.removeprefix(DATASET) not in names:
            raise UserError(f"--arms {name}: no pool has this name. The pools are "
                            f"{', '.join(names)}.")
    if REFERENCE not in chosen:
        parallel.say(f"{REFERENCE} is added: the others are compared with it.")
        chosen.insert(0, REFERENCE)
    return chosen


def _key(setting: Setting) -> ComparisonKey:
    onset, sketch, pilot = setting.onset, setting.measure.sketch, setting.measure.pilot
    if pilot.at == "merged":  # states are known by their digests, however they were found
        states = states_to_merge(pilot, onset.checkpoint)
        pilot = dataclasses.replace(pilot, merge_load=tuple(state.digest for state in states),
                                    merge_last=0)
    return ComparisonKey(
        onset.checkpoint.digest, onset.digests_of(onset.pool), onset.digests_of(onset.valid),
        tuple(setting.test_digests.values()), setting.config.lr_wsd_decay_iters, sketch.seed,
        onset.job.batch.global_batch_size, onset.job.model, onset.job.optimizer,
        pilot,
        dataclasses.replace(sketch.without_micro_batch(), seed=SketchConfig().seed),
        setting.measure.curvature, setting.selection,
        onset.job.precision)


def _paths(setting: Setting) -> dict:
    """As they were given: what repeats the comparison needs them."""
    return {"load": str(setting.onset.checkpoint.path),
            "data_path": list(setting.onset.pool.prefixes),
            "valid_data_path": list(setting.onset.valid.prefixes),
            "test_data_path": list(setting.config.test_data_path)}


def _before(setting: Setting) -> dict:
    """Losses of the checkpoint itself, and its size."""
    path, job = setting.folder / "before.json", setting.onset.job
    if not parallel.on_rank_zero(path.is_file):
        with grid.model_parallel(job.layout, job.num_model_chunks):
            chunks = model.build(job)
            checkpoint.load_model(setting.onset.checkpoint.path, chunks)
            losses = {**_losses(setting, chunks), "parameters": shards.num_parameters(chunks)}
        parallel.on_rank_zero(lambda: files.write_json(path, losses))
    return parallel.on_rank_zero(lambda: files.read_json(path))


def _losses(setting: Setting, chunks) -> dict:
    # Of the validation sets no loss is asked for: the selections were made for them.
    return set_losses(chunks, setting.onset.job.model, setting.onset.job.batch, valid=(),
                      test=setting.config.test_data_path)


@dataclass(frozen=True)
class _Run:
    """One arm at one seed."""

    setting: Setting
    arm: str
    seed: int

    @property
    def folder(self) -> Path:
        return self.setting.arm_folder(self.arm, self.seed)


def _run_arm(run: _Run, case: Case | None, before: dict) -> None:
    setting, folder, onset = run.setting, run.folder, run.setting.onset
    chosen, masks, problem = parallel.on_rank_zero(lambda: _choose(run, case))
    began = time.perf_counter()
    with grid.model_parallel(onset.job.layout, onset.job.num_model_chunks):
        request = blend.BlendRequest.for_job(
            onset.job, setting.config.lr_wsd_decay_iters, run.seed, folder / "cache",
            onset.checkpoint.tokenizer_digest)
        dataset, _ = blend.build_blend(_blend(run), masks, request)
        chunks = model.build(onset.job)
        try:
            decay(Decay(onset.job, onset.checkpoint, [Segment(0, dataset)],
                        setting.config.lr_wsd_decay_iters, folder, f"{run.arm} {run.seed}",
                        load_optim=onset.checkpoint.has_optimizer,
                        recipe=find_arm(run.arm).recipe), chunks)
            seconds = time.perf_counter() - began
            after = _losses(setting, chunks)
            if not np.isfinite(list(after["test"].values())).all():
                raise FloatingPointError("the losses after annealing are not finite")
        except FloatingPointError as error:  # the other arms and seeds go on; it is not tried again
            why = str(error)
            parallel.on_rank_zero(lambda: files.write_json(folder / "failed.json", {"error": why}))
            parallel.say(f"{run.arm}, seed {run.seed}: {why}")
            return
    parallel.on_rank_zero(lambda: _write_result(
        run, {"arm": run.arm, "seed": run.seed, "before": before, "after": after,
              "seconds": seconds, "problem": problem}, chosen))


def _blend(run: _Run) -> Blend:
    """The pools, each by its tokens, or one of them as half of what is seen."""
    pool, dataset = run.setting.onset.pool, find_arm(run.arm).dataset
    if not dataset:
        return Blend(pool.prefixes)
    tokens = np.array([pool.num_labels[first:end].sum() for first, end in itertools.pairwise(
        pool.first)], dtype=float)
    is_it = np.array(list(indexed.prefix_names(pool.prefixes).values())) == dataset
    return Blend(pool.prefixes, (tokens / tokens.sum() / 2 + is_it / 2).tolist())


def _choose(run: _Run, case: Case | None) -> tuple[np.ndarray, dict, dict | None]:
    """(sample numbers, masks, what the solver said) of what the arm takes (rank 0)."""
    assert case is not None  # on rank 0
    setting = run.setting
    shutil.rmtree(run.folder, ignore_errors=True)  # of an annealing that was killed
    with solve_step.in_terms_of_flags():
        positions, found = find_arm(run.arm).take(case)
    candidates, = arrays.read_named(setting.seed_folder(case.seed) / "samples.npz",
                                    ["candidates"], arrays.MAKE_AGAIN)
    chosen = candidates[positions]
    problem = None if found is None else {
        "stiff_cost": found.stiff_cost, "stiff_budget": found.stiff_budget,
        "objective_value": found.objective, "status": found.status}
    pool = setting.onset.pool
    return chosen, masks_of(pool, setting.onset.digests_of(pool), chosen), problem


def _write_result(run: _Run, result: dict, chosen: np.ndarray) -> None:
    parts = composition(run.setting.onset.pool, chosen)
    with files.written_whole(run.folder / "chosen.npy") as file:
        np.save(file, chosen)
    shutil.rmtree(run.folder / "cache", ignore_errors=True)
    files.write_json(run.folder / "result.json", {
        **result, "composition": {name: vars(part) for name, part in parts.items()}})
    mean = mean_test_loss(result["after"]["test"])
    print(f"{result['arm']}, seed {result['seed']}: mean test loss {mean:.4f}", flush=True)


def _report(setting: Setting, chosen: list[str]) -> None:
    """Everything that is made of the results (rank 0)."""
    there = {path.name for path in (setting.folder / "arms").glob("*")} | set(chosen)
    record.write_record(setting, REFERENCE, [
        *(name for name in REGISTRY if name in there),
        *sorted(name for name in there if name.startswith(DATASET))])
    found = summarise(setting.folder)
    write_summary(found, setting.folder / "comparison.json")
    comparison_page.write_page(found, setting.folder / "report.html")
    text = markdown.results([found])
    with files.written_whole(setting.folder / "results.md", "w") as file:
        file.write(text)
    print(f"{text}\nreport: {setting.folder / 'report.html'}", flush=True)
