"""``megatron-direct compare``: does selection help here, and which?

Arms (:mod:`megatron_direct.comparison.arms`) fork from one checkpoint and are annealed with the
same tokens, schedule, batches and order of work. Each seed is a replicate: of the hashes, of the
draw of validation samples, of what is drawn at random, and of the order of the data. The losses
that count are of test sets that no selection saw.

    RUN_DIR/seeds/S        sketches and curvature of one seed, shared by all arms
    RUN_DIR/arms/ARM/S     what the arm chose, and its losses; what is there is not done again
    RUN_DIR/comparison.json, results.md, report.html      made anew at the end of each call
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import numpy as np

from megatron_direct.commands import anneal
from megatron_direct.commands.evaluate import tokenizer_of
from megatron_direct.commands.select import (
    SelectConfig,
    identity_of,
    identity_of_pilot,
    model_of,
    require_validation_samples,
)
from megatron_direct.comparison.arms import BY_DOMAIN, Case
from megatron_direct.comparison.arms import REGISTRY as ARMS
from megatron_direct.comparison.measurements import (
    CompareConfig,
    Setting,
    domain_names,
    measured,
    onset_folder,
)
from megatron_direct.comparison.run_results import mean_test_loss
from megatron_direct.comparison.summarise import summarise
from megatron_direct.comparison.summary import write_summary
from megatron_direct.config import (
    BatchConfig,
    OptimizerConfig,
    ParallelConfig,
)
from megatron_direct.data import checks, indexed
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.mcore import blend, checkpoint, grid, model
from megatron_direct.reports import comparison_page as page
from megatron_direct.reports import markdown
from megatron_direct.runtime import files, parallel
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.selection.treatment import SelectionConfig
from megatron_direct.steps import solve as selection_stage
from megatron_direct.steps.curvature import CurvatureConfig
from megatron_direct.steps.pilot import PilotConfig

REFERENCE = "random"


def compare(config: CompareConfig, select: SelectConfig, curvature: CurvatureConfig,
            selection: SelectionConfig, pilot: PilotConfig, given_architecture: dict,
            layout: ParallelConfig, given: dict[type, dict]) -> None:
    """Measures, selects and anneals what is not there yet, and writes the report.

    given: the optimizer and batch flags that were given, by dataclass; the rest is as the
    checkpoint was trained.
    """
    unknown = [name for name in config.arms if name not in ARMS]
    if unknown:
        raise UserError(f"--arms {' '.join(unknown)}: there is no such arm. There are "
                        f"{', '.join(ARMS)}.")
    setting = _setting(config, select, curvature, selection, pilot, given_architecture, layout,
                       given)
    arms = _arms(setting)
    run = RunDirectory(select.run_dir)
    parallel.on_rank_zero(lambda: run.begin("compare", _identity(setting), vars(layout)))
    before = _before(setting)
    for seed in setting.seeds:
        missing = parallel.on_rank_zero(
            lambda seed=seed: [name for name in arms if not any(
                (_arm_folder(setting, name, seed) / file).is_file()
                for file in ("result.json", "failed.json"))])
        if missing:
            case = measured(setting, seed, {need for name in missing
                                             for need in ARMS[name].needs})
            for name in missing:
                _run_arm(setting, name, seed, case, {key: before[key] for key in ("valid", "test")})
    parallel.on_rank_zero(lambda: _report(setting, arms))
    parallel.on_rank_zero(lambda: run.finish("compare"))


def _setting(config, select, curvature, selection, pilot, given_architecture, layout, given,
             ) -> Setting:
    pools, valid = list(select.data_path), list(select.valid_data_path)
    checks.require_disjoint(pool=pools, validation=valid, test=list(config.test_data_path))
    found = checkpoint.require(select.load)
    carried = checkpoint.read_args(found)
    architecture = model_of(found, given_architecture, [*pools, *valid, *config.test_data_path])
    if config.tokenizer_model:
        parallel.kept_on_rank_zero(
            lambda: tokenizer_of(config.tokenizer_model, found, architecture))
    if selection.sketch_rows == "spread":
        raise UserError("--sketch-rows spread: compare solves with all rows on rank 0. Leave the "
                        "flag out, and compare on a smaller pool.")
    layout.check(architecture, parallel.world_size())
    samples, valid_samples = (Samples(prefixes, architecture.seq_length, architecture.vocab_size)
                              for prefixes in (pools, valid))
    require_validation_samples(valid_samples)
    selection_stage.parse_quotas(selection.quotas, list(indexed.prefix_names(pools).values()))
    batch = BatchConfig(**anneal.carried_over(BatchConfig, carried, given))
    batch.num_microbatches(layout.data_parallel_size(parallel.world_size()))
    return Setting(
        config, select, curvature, selection, pilot, architecture, layout,
        OptimizerConfig(**anneal.carried_over(OptimizerConfig, carried, given)), batch,
        found, checkpoint.has_optimizer(found), str(carried.get("tokenizer_digest")), samples,
        valid_samples,
        selection_stage.num_to_select(selection, len(samples.usable)))


def _arms(setting: Setting) -> list[str]:
    """Those asked for and the reference, or all that can be had here."""
    asked = list(setting.config.arms)
    arms = asked or list(ARMS)
    pools, valid = (set(domain_names(samples))
                    for samples in (setting.samples, setting.valid_samples))
    obstacles = []  # (arms that cannot be had, why, remedy)
    if not pools & valid:
        obstacles.append((
            [name for name in arms if name in BY_DOMAIN],
            f"no domain of the validation sets ({', '.join(sorted(valid))}) is one of the pools' "
            f"({', '.join(sorted(pools))})",
            "Domains are named by the cards that tools/preprocess_selection.py writes, or else by "
            "the last part of a prefix: name the datasets alike, or leave these arms out."))
    if not setting.has_optimizer:
        obstacles.append((
            [name for name in arms if "adam-sketches" in ARMS[name].needs],
            f"{setting.checkpoint} holds no second moments of Adam",
            "Save it with its optimizer, or leave these arms out."))
    for names, why, remedy in obstacles:
        if names and asked:
            raise UserError(f"--arms {' '.join(names)}: {why}. {remedy}")
        if names:
            parallel.say(f"{', '.join(names)}: left out, since {why}.")
        arms = [name for name in arms if name not in names]
    if REFERENCE not in arms:
        parallel.say(f"{REFERENCE} is added: the others are compared with it.")
        arms.insert(0, REFERENCE)
    return arms


def _identity(setting: Setting) -> dict:
    """What the figures depend on (rank 0). Arms and seeds are not: more may be added later."""
    select, config = setting.select, setting.config
    pilot = identity_of_pilot(setting.pilot, setting.optimizer, setting.batch)
    return {
        **identity_of(select, setting.architecture, setting.curvature, setting.selection,
                      setting.checkpoint, pilot),
        **vars(setting.optimizer), **vars(setting.batch), "seed": select.seed,
        "num_select": setting.num_select, "lr_wsd_decay_iters": config.lr_wsd_decay_iters,
        "test_data_path": list(config.test_data_path),
        "test_digests": {prefix: indexed.dataset_digest(prefix)
                         for prefix in config.test_data_path},
    }


def _before(setting: Setting) -> dict:
    """Losses of the checkpoint itself, and its size."""
    path = setting.folder / "before.json"
    if not parallel.on_rank_zero(path.is_file):
        with grid.model_parallel(setting.layout, setting.layout.num_model_chunks(
                setting.architecture)):
            chunks = model.build(setting.architecture, setting.layout)
            checkpoint.load_model(setting.checkpoint, chunks)
            losses = {**_losses(setting, chunks), "parameters": model.num_parameters(chunks)}
        parallel.on_rank_zero(lambda: files.write_json(path, losses))
    return parallel.on_rank_zero(lambda: files.read_json(path))


def _losses(setting: Setting, chunks) -> dict:
    # Of the validation sets no loss is asked for: the selections were made for them.
    return anneal.losses([], list(setting.config.test_data_path), chunks, setting.architecture,
                         setting.batch)


def _run_arm(setting: Setting, name: str, seed: int, case: Case | None, before: dict) -> None:
    folder = _arm_folder(setting, name, seed)
    chosen, masks, problem = parallel.on_rank_zero(lambda: _choose(setting, name, folder, case))
    begun = time.perf_counter()
    with grid.model_parallel(setting.layout,
                                 setting.layout.num_model_chunks(setting.architecture)):
        dataset, _ = blend.build_blend(
            list(setting.select.data_path), None, masks,
            seq_length=setting.architecture.seq_length, num_sequences=_num_sequences(setting),
            seed=seed, cache=folder / "cache", vocabulary=blend.Vocabulary(
                setting.architecture.vocab_size, setting.tokenizer_digest))
        chunks = model.build(setting.architecture, setting.layout)
        try:
            anneal.decay(chunks, dataset, setting.checkpoint, setting.optimizer, setting.batch,
                         setting.config.lr_wsd_decay_iters, folder, description=f"{name} {seed}",
                         load_optim=setting.has_optimizer)
            seconds = time.perf_counter() - begun
            after = _losses(setting, chunks)
            if not np.isfinite(list(after["test"].values())).all():
                raise FloatingPointError("the losses after annealing are not finite")
        except FloatingPointError as error:  # the other arms and seeds go on; it is not tried again
            why = str(error)
            parallel.on_rank_zero(lambda: files.write_json(folder / "failed.json", {"error": why}))
            parallel.say(f"{name}, seed {seed}: {why}")
            return
    parallel.on_rank_zero(lambda: _write_result(
        setting, folder, {"arm": name, "seed": seed, "before": before, "after": after,
                          "seconds": seconds, "problem": problem}, chosen))


def _choose(setting: Setting, name: str, folder: Path, case: Case,
            ) -> tuple[np.ndarray, dict, dict | None]:
    """(sample numbers, masks, what the solver said) of what the arm takes (rank 0)."""
    shutil.rmtree(folder, ignore_errors=True)  # of an annealing that was killed
    with selection_stage.in_terms_of_flags(setting.selection):
        positions, found = ARMS[name].take(case)
    with np.load(setting.folder / "seeds" / str(case.seed) / "samples.npz") as arrays:
        chosen = arrays["candidates"][positions]
    problem = None if found is None else {
        "stiff_cost": found.stiff_cost, "stiff_budget": found.stiff_budget,
        "objective_value": found.objective, "status": found.status}
    return chosen, selection_stage.masks_of(setting.samples, chosen), problem


def _write_result(setting: Setting, folder: Path, result: dict, chosen: np.ndarray) -> None:
    composition = selection_stage.composition(setting.samples, chosen)
    with files.written_whole(folder / "chosen.npy") as file:
        np.save(file, chosen)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    files.write_json(folder / "result.json", {**result, "composition": composition})
    mean = mean_test_loss(result["after"]["test"])
    print(f"{result['arm']}, seed {result['seed']}: mean test loss {mean:.4f}", flush=True)


def _arm_folder(setting: Setting, name: str, seed: int) -> Path:
    return setting.folder / "arms" / name / str(seed)


def _num_sequences(setting: Setting) -> int:
    return setting.config.lr_wsd_decay_iters * setting.batch.global_batch_size


def _report(setting: Setting, arms: list[str]) -> None:
    """Everything that is made of the results (rank 0)."""
    done = [name for name in ARMS if name in arms or (setting.folder / "arms" / name).is_dir()]
    seconds = {seed: _seconds(setting, setting.folder / "seeds" / str(seed))
               for seed in setting.seeds}
    annealing = [files.read_json(path)["seconds"]
                 for path in sorted(setting.folder.glob("arms/*/*/result.json"))]
    names = {key: list(indexed.prefix_names(list(prefixes)).values()) for key, prefixes in (
        ("pools", setting.select.data_path), ("valid", setting.select.valid_data_path),
        ("test", setting.config.test_data_path))}
    tokens = _num_sequences(setting) * setting.architecture.seq_length
    files.write_json(setting.folder / "setting.json", {
        "name": setting.config.name or setting.folder.name, "num_select": setting.num_select,
        "num_candidates": len(setting.samples.usable),
        "parameters": files.read_json(setting.folder / "before.json")["parameters"],
        "iterations": setting.config.lr_wsd_decay_iters, "tokens": tokens,
        "seeds": setting.seeds, **names, "reference": REFERENCE, "default_arm": "direct",
        "arms": {name: ARMS[name].description for name in done},
        "tokenizer_model": setting.config.tokenizer_model,
        "shared_seconds": seconds, "annealing_seconds": float(np.median(annealing)),
        "passes_of_selection": {
            name: _passes(setting, ARMS[name].needs, seconds, np.median(annealing) / tokens)
            for name in done},
    })
    if setting.config.tokenizer_model:
        files.write_json(setting.folder / "texts.json", _texts(setting))
    found = summarise(setting.folder)
    write_summary(found, setting.folder / "comparison.json")
    page.write_page(found, setting.folder / "report.html")
    text = markdown.results([found])
    with files.written_whole(setting.folder / "results.md", "w") as file:
        file.write(text)
    print(f"{text}\nreport: {setting.folder / 'report.html'}", flush=True)


def _seconds(setting: Setting, folder: Path) -> dict[str, dict[str, float]]:
    """What each measurement of a seed took, stage by stage; not of one that was broken off."""
    return {name: files.read_json(path / "seconds.json") for name, path in (
        ("onset", onset_folder(setting, folder)), ("select", folder),
        ("adam-sketches", folder / "adam"))
        if (path / "seconds.json").is_file()}


def _passes(setting: Setting, needs: tuple[str, ...], seconds: dict[int, dict],
            seconds_per_token: float) -> float | None:
    """What an arm's choice takes, in passes of training over the pool; None if that is not known.
    """
    pass_over_pool = seconds_per_token * setting.samples.num_labels.sum()
    costs = {"losses": 1 / 3}  # a forward pass: of three passes over the layers
    for need in needs:
        took = [sum(of_seed[need].values()) for of_seed in seconds.values() if need in of_seed]
        if took:
            costs[need] = float(np.median(took)) / pass_over_pool
    return sum(costs[need] for need in needs) if all(need in costs for need in needs) else None


def _texts(setting: Setting, count: int = 6) -> dict[str, list[dict]]:
    """Some samples that the first seed's direct takes, and some that it leaves, drawn at random."""
    decode = tokenizer_of(setting.config.tokenizer_model, setting.checkpoint,
                          setting.architecture).decode
    seed = setting.seeds[0]
    path = _arm_folder(setting, "direct", seed) / "chosen.npy"
    if not path.is_file():
        return {"picked": [], "dropped": []}
    names = indexed.prefix_names(setting.samples.prefixes)
    with np.load(setting.folder / "seeds" / str(seed) / "samples.npz") as arrays:
        candidates, losses = arrays["candidates"], arrays["loss"]
    chosen, rng = np.load(path), np.random.default_rng(seed)

    def some(numbers: np.ndarray) -> list[dict]:
        drawn = rng.choice(numbers, min(count, len(numbers)), replace=False)
        return [{"text": decode(setting.samples.tokens(int(number))),
                 "pool": names[setting.samples.prefixes[int(setting.samples.dataset_of(number))]],
                 "loss": float(losses[candidates == number][0]),
                 "labels": int(setting.samples.num_labels[number])} for number in drawn]

    return {"picked": some(chosen), "dropped": some(np.setdiff1d(candidates, chosen))}
