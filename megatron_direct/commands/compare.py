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
from dataclasses import dataclass, field
from pathlib import Path

from megatron_direct.commands.requests import LossesKey, SelectionRequest
from megatron_direct.comparison import ceiling, record
from megatron_direct.comparison.arms import BY_DOMAIN, DATASET, REGISTRY, find_arm
from megatron_direct.comparison.earlier_calls import (
    given_paths,
    paths_of_all_calls,
    require_same_names,
    require_same_proxy,
)
from megatron_direct.comparison.measurements import (
    CompareConfig,
    Setting,
    domain_names,
    measured_case,
)
from megatron_direct.comparison.replicates import (
    Replicate,
    losses_on_test_sets,
    run_together,
    sharing_annealings,
    states_of_training,
    with_ceiling,
)
from megatron_direct.comparison.summarise import summarise
from megatron_direct.comparison.summary import write_summary
from megatron_direct.config import Execution
from megatron_direct.data import indexed
from megatron_direct.errors import UserError
from megatron_direct.evaluation.tokenizers import tokenizer_of
from megatron_direct.mcore import checkpoint, grid, model, shards
from megatron_direct.reports import comparison_page, markdown
from megatron_direct.runtime import files, parallel
from megatron_direct.runtime.manifest import Artefact, State
from megatron_direct.runtime.run_directory import RunDirectory, locked
from megatron_direct.selection.auto import FEWEST_VALID
from megatron_direct.steps import selection_request
from megatron_direct.steps.extend import num_drawn_valid
from megatron_direct.steps.onset import Onset, OnsetConfig, dataset_digests
from megatron_direct.steps.pilot import states_to_merge
from megatron_direct.steps.sketch import SketchConfig

REFERENCE = "random"


@dataclass(frozen=True)
class CompareRequest(SelectionRequest):
    compare: CompareConfig
    onset: OnsetConfig
    execution: Execution = field(default_factory=Execution)


@dataclass(frozen=True, kw_only=True)
class ComparisonKey(LossesKey):
    """Arms and seeds are no part of it: more may be added later. The seed of the hashes is left at
    its default, and so is where the rows lie."""

    first_seed: int


def compare(request: CompareRequest) -> None:
    """Measures, selects and anneals what is not there yet, and writes the report; all ranks call
    this."""
    setting = _setting(request)
    chosen = _arms(setting)
    run, artefact = RunDirectory(setting.folder), Artefact(setting.folder, "a comparison")
    key = _key(setting)
    if setting.config.only_replicate is not None:  # others are at work beside this one
        with run.entered("compare", request, waits=True):
            before = _begin(setting, chosen, artefact, key)
        _run_seeds(setting, chosen, before)
        return
    with run.entered("compare", request):
        before = _begin(setting, chosen, artefact, key)
        _run_seeds(setting, chosen, before)
        parallel.on_rank_zero(lambda: artefact.finish(key, paths_of_all_calls(setting, artefact)))
        parallel.on_rank_zero(lambda: _report(setting, chosen))


def _begin(setting: Setting, chosen: list[str], artefact: Artefact, key: ComparisonKey) -> dict:
    """What all seeds share; the losses of the checkpoint."""
    def begin() -> None:
        if artefact.state(key) is State.NEW:
            artefact.begin(key, given_paths(setting))
        require_same_names(setting, artefact)
        if setting.proxy is not None and any("proxy" in find_arm(name).needs for name in chosen):
            require_same_proxy(setting.folder / "proxy.json", setting.proxy)

    parallel.on_rank_zero(begin)
    return _before(setting)


def _run_seeds(setting: Setting, chosen: list[str], before: dict) -> None:
    for seed in setting.seeds_of_this_call:
        with locked(setting.seed_folder(seed), "compare"):
            _run_seed(setting, chosen, seed, before)


def _run_seed(setting: Setting, chosen: list[str], seed: int, before: dict) -> None:
    missing = parallel.on_rank_zero(lambda: [name for name in chosen if not any(
        (setting.arm_folder(name, seed) / file).is_file()
        for file in ("result.json", "failed.json"))])
    if not missing:
        return
    case = measured_case(setting, seed, {need for name in missing
                                         for need in find_arm(name).needs})
    if any(ceiling.NAME in find_arm(name).needs for name in missing):
        case = with_ceiling(setting, case)
    losses = {key: before[key] for key in ("valid", "test")}
    for names in sharing_annealings(missing):
        run_together([Replicate(setting, find_arm(name), seed, losses) for name in names], case)


def _setting(request: CompareRequest) -> Setting:
    config, selection = request.compare, request.selection
    if selection.sketch_rows == "spread":
        raise UserError("--sketch-rows spread is not supported by compare, which solves with all "
                        "rows on rank 0. Leave the flag out, and compare on a smaller pool.")
    if request.sketch.sketch_share < 1:
        raise UserError("--sketch-share is not supported by compare, which takes gradients of all "
                        "samples: its arm direct-share shows what a tenth of them gives. Leave the "
                        "flag out.")
    onset = request.open(request.onset, config.test_data_path, execution=request.execution)
    # Most arms select no sample twice.
    selection_request.check_number(dataclasses.replace(selection, max_count=1),
                                   len(onset.pool.usable))
    if config.tokenizer_model:
        parallel.kept_on_rank_zero(
            lambda: tokenizer_of(config.tokenizer_model, onset.checkpoint, onset.job.model))
    return Setting(config, Path(request.onset.run_dir), onset,
                   dataclasses.replace(request.measure, pilot=request.pilot.in_one_spelling()),
                   selection, dataset_digests(config.test_data_path), _proxy(request))


def _proxy(request: CompareRequest) -> Onset | None:
    """The smaller model, which is as its checkpoint says."""
    if not request.compare.proxy_load:
        return None
    its_own = dataclasses.replace(request, given=dataclasses.replace(request.given, model={}))
    return its_own.open(dataclasses.replace(request.onset, load=request.compare.proxy_load),
                        request.compare.test_data_path)


def _arms(setting: Setting) -> list[str]:
    """Those asked for and the reference, or all that can be had here."""
    asked = list(dict.fromkeys(setting.config.arms))
    chosen = asked or [name for name in REGISTRY if name != ceiling.NAME]
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
    if setting.proxy is None:
        obstacles.append(([name for name in chosen if "proxy" in find_arm(name).needs],
                          "no smaller model is there to select for this one",
                          "Give its checkpoint with --proxy-load, or leave these arms out."))
    num_valid = num_drawn_valid(setting.measure.sketch, setting.onset)
    if num_valid < FEWEST_VALID:
        obstacles.append(([name for name in chosen if "share" in find_arm(name).needs],
                          f"they are judged by one half of the validation set and the other, for "
                          f"which its {num_valid} samples are too few: it takes {FEWEST_VALID}",
                          "Give more validation data, or leave these arms out."))
    if not setting.onset.checkpoint.has_readable_optimizer:
        obstacles.append((
            [name for name in chosen if "adam-sketches" in find_arm(name).needs],
            f"{setting.onset.checkpoint.path} holds no second moments of Adam that can "
            "be read in another layout",
            "Save it with its optimizer (with Megatron-LM and the distributed optimizer: "
            "--dist-ckpt-optim-fully-reshardable), or leave these arms out."))
    of_average = [name for name in chosen if find_arm(name).recipe is None
                  or "merged" in find_arm(name).needs]
    if of_average:
        try:
            states_of_training(setting)
        except UserError as error:
            obstacles.append((of_average, str(error), "Or leave these arms out."))
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
    return ComparisonKey.of(
        onset, dataclasses.replace(setting.measure, pilot=pilot, sketch=dataclasses.replace(
            sketch, seed=SketchConfig().seed)),
        setting.selection.wherever_rows_lie(),
        tuple(setting.test_digests.values()),
        lr_wsd_decay_iters=setting.config.lr_wsd_decay_iters, first_seed=sketch.seed)


def _before(setting: Setting) -> dict:
    """Losses of the checkpoint itself, and its size."""
    path, job = setting.folder / "before.json", setting.onset.job
    if not parallel.on_rank_zero(path.is_file):
        with grid.model_parallel(job.layout, job.num_model_chunks):
            chunks = model.build(job.of_main_loss)
            checkpoint.load_model(setting.onset.checkpoint.path, chunks)
            losses = {**losses_on_test_sets(setting, chunks),
                      "parameters": shards.num_parameters(chunks)}
        parallel.on_rank_zero(lambda: files.write_json(path, losses))
    return parallel.on_rank_zero(lambda: files.read_json(path))


def _with_earlier_seeds(setting: Setting) -> Setting:
    """A call for fewer seeds than there are results of does not lose the others."""
    first = setting.seeds[0]
    found = [int(path.parent.name) - first + 1
             for path in (setting.folder / "arms").glob("*/*/result.json")]
    return dataclasses.replace(setting, config=dataclasses.replace(
        setting.config, num_seeds=max([setting.config.num_seeds, *found])))


def _report(setting: Setting, chosen: list[str]) -> None:
    """Everything that is made of the results, those of earlier calls included (rank 0)."""
    setting = _with_earlier_seeds(setting)
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
