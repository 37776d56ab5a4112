"""``megatron-direct anneal``: the decay phase over the masked blend, and what it came to.

An *arm* is one annealing: ``direct`` over the run's selection, ``random`` over as many samples
drawn at random. Arms start from one checkpoint, optimizer included, and see the same number of
tokens in batches of the same order of work under the same schedule; only the masks differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_direct.config import (
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    flag,
    flag_name,
)
from megatron_direct.data import checks, indexed
from megatron_direct.data.blend_plan import BLEND_WEIGHTS, MAX_EPOCHS, Blend
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.evaluation.losses import dataset_losses
from megatron_direct.gradients import store
from megatron_direct.mcore import blend, checkpoint, grid, model, training
from megatron_direct.runtime import files, parallel
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.selection.baselines import random_selection
from megatron_direct.steps import solve as selection_stage

ARMS = ("direct", "random")


@dataclass(frozen=True)
class AnnealConfig:
    """Annealing."""

    run_dir: str = flag("", "folder of a finished select", required=True)
    selection: str = flag("direct", "the arm: the run's selection, or a random one of its size",
                          choices=ARMS)
    lr_wsd_decay_iters: int = flag(
        100, "iterations of the annealing, over which the learning rate decays")
    data_path: tuple = flag(
        (), "the blend: prefixes, or weights and prefixes by turns; what is no pool of the run is "
        "seen whole; left out: the pools, each weighted by the tokens that its mask leaves",
        nargs="+")
    data_args_path: str = flag("", "file with what --data-path would say")
    per_split_data_args_path: str = flag(
        "", "JSON file with a --data-path for train, valid (null, or the run's own) and test "
        "(reported as --test-data-path is)")
    blend_weights: str = flag(
        "keep", "keep the weights of the blend, or rescale each to the tokens that its mask leaves",
        choices=BLEND_WEIGHTS)
    max_epochs: float = flag(
        MAX_EPOCHS, "refuse to see a pool more often; up to four epochs of repeated data do about "
        "as much good as fresh data (Muennighoff et al. 2023)")
    test_data_path: tuple = flag((), "indexed datasets whose loss is reported", nargs="+")
    save_interval: int = flag(50, "iterations between checkpoints")
    load_optim: bool = flag(True, "carry on with the checkpoint's optimizer state; "
                                  "--no-load-optim: begin with an empty one")


def arm_folder(run_dir: str | Path, arm: str) -> Path:
    return Path(run_dir) / "anneal" / arm


def anneal(config: AnnealConfig, given: dict[type, dict], layout: ParallelConfig) -> None:
    """Anneals one arm, or carries on where a killed run left its last checkpoint.

    given: the optimizer and batch flags that were given, by dataclass; the rest is as the
    checkpoint was trained.
    """
    run = RunDirectory(config.run_dir)
    selected = parallel.on_rank_zero(lambda: run.stage("select"))["identity"]
    start_from = checkpoint.require(selected["load"])
    carried = checkpoint.read_args(start_from)
    architecture = ModelConfig(**checkpoint.architecture(selected))
    optimizer = OptimizerConfig(**carried_over(OptimizerConfig, carried, given))
    batch = BatchConfig(**carried_over(BatchConfig, carried, given))
    _require_same_optimizer(config, optimizer, carried)
    layout.check(architecture, parallel.world_size())
    batch.num_microbatches(layout.data_parallel_size(parallel.world_size()))
    pools = selected["data_path"]
    (prefixes, weights), test_data_path = _blend(config, selected)
    _require_unchanged(selected, start_from, pools)
    checks.require_one_vocabulary(prefixes, architecture.vocab_size,
                                    carried.get("tokenizer_digest"))

    identity = {**vars(architecture), **vars(optimizer), **vars(batch), **vars(config),
                "run_dir": None, "save_interval": None,
                "checkpoint_digest": selected["checkpoint_digest"],
                "dataset_digests": parallel.on_rank_zero(
                    lambda: {prefix: indexed.dataset_digest(prefix) for prefix in prefixes})}
    stage = f"anneal {config.selection}"
    folder = arm_folder(config.run_dir, config.selection)
    if parallel.on_rank_zero(lambda: run.begin(stage, identity, vars(layout))):
        parallel.say(f"{folder} is already annealed.")
        return
    with grid.model_parallel(layout, layout.num_model_chunks(architecture)):
        masks = _masks(config, pools, architecture, batch, run.path, folder)
        num_sequences = config.lr_wsd_decay_iters * batch.global_batch_size
        dataset, parts = blend.build_blend(
            prefixes, weights, masks, seq_length=architecture.seq_length,
            num_sequences=num_sequences, seed=batch.seed, cache=folder / "cache",
            blend_weights=config.blend_weights, max_epochs=config.max_epochs,
            vocabulary=blend.Vocabulary(architecture.vocab_size,
                                        str(carried.get("tokenizer_digest"))))
        for part in parts:
            parallel.say(f"{config.selection}: {part}")
        chunks = model.build(architecture, layout)
        found: dict[str, dict] = {}

        def measure(when: str) -> None:
            found[when] = losses(selected["valid_data_path"], test_data_path, chunks, architecture,
                                 batch)

        decay(chunks, dataset, start_from, optimizer, batch, config.lr_wsd_decay_iters, folder,
              description=f"anneal {config.selection}", load_optim=config.load_optim,
              save_interval=config.save_interval, before=lambda: measure("before"))
        measure("after")
    parallel.on_rank_zero(lambda: files.write_json(folder / "result.json", {
        "arm": config.selection, **found,
        "tokens": num_sequences * architecture.seq_length,
        "blend": [vars(part) for part in parts]}))
    parallel.on_rank_zero(lambda: run.finish(stage))


def decay(chunks, dataset, start_from: Path, optimizer: OptimizerConfig, batch: BatchConfig,
          iterations: int, folder: Path, *, description: str, load_optim: bool = True,
          save_interval: int | None = None, before: Callable[[], None] = lambda: None) -> None:
    """Trains ``chunks`` over the dataset while the learning rate decays; all ranks call this.

    chunks: bare and without weights of any worth: those of the checkpoint ``start_from`` are
    loaded, with its optimizer unless ``load_optim`` is False. folder: for ``metrics.jsonl`` and,
    every ``save_interval`` iterations and at the end, checkpoints, from the newest of which a run
    that was killed carries on; None: no checkpoints. before: called when the weights are loaded.
    """
    trainer = training.make_trainer(chunks, optimizer, batch)
    if load_optim:
        checkpoint.load_training(start_from, chunks, trainer.optimizer, trainer.scheduler)
    else:
        checkpoint.load_model(start_from, chunks)
    onset = trainer.scheduler.num_steps
    before()
    resumed = checkpoint.latest(folder / "checkpoints") if save_interval else None
    done = 0 if resumed is None else checkpoint.load_training(
        resumed, chunks, trainer.optimizer, trainer.scheduler)
    training.anneal_over(trainer, optimizer, onset, done, iterations, batch)
    log = training.MetricsLog(folder / "metrics.jsonl", done)
    args = {**checkpoint.read_args(start_from), **vars(optimizer), **vars(batch)}

    def after_step(step: training.Step) -> None:
        log.write(step)
        if save_interval and (step.iteration % save_interval == 0 or step.iteration == iterations):
            checkpoint.save(folder / "checkpoints", step.iteration, chunks, trainer.optimizer,
                            trainer.scheduler, args)

    training.train(trainer, dataset, batch, range(done + 1, iterations + 1),
                   first_sequence=done * batch.global_batch_size, description=description,
                   after_step=after_step)
    log.close()


def _blend(config: AnnealConfig, selected: dict) -> tuple[Blend, list[str]]:
    """(the blend, the datasets whose loss is reported), from the one flag that gives them."""
    pools, test = selected["data_path"], list(config.test_data_path)
    data_path = list(config.data_path) if list(config.data_path) != pools else []
    given = [flag_name(name) for name, value in (
        ("data_path", data_path), ("data_args_path", config.data_args_path),
        ("per_split_data_args_path", config.per_split_data_args_path)) if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} both say what the blend is. Leave out either.")
    if config.data_args_path:
        return blend.read_data_args(config.data_args_path), test
    if not config.per_split_data_args_path:
        return blend.parse_data_path(data_path or pools), test
    splits = blend.read_per_split_data_args(config.per_split_data_args_path)
    if splits["train"] is None:
        raise UserError(f"{config.per_split_data_args_path} gives no train blend. Add one.")
    if splits["valid"] and sorted(splits["valid"][0]) != sorted(selected["valid_data_path"]):
        raise UserError(f"{config.per_split_data_args_path} validates on "
                        f"{', '.join(splits['valid'][0])}, but the selection was made for "
                        f"{', '.join(selected['valid_data_path'])}. Set valid to null.")
    return splits["train"], test or (splits["test"][0] if splits["test"] else [])


def losses(valid: list[str], test: list[str], chunks, architecture: ModelConfig,
           batch: BatchConfig) -> dict[str, dict[str, float]]:
    """Of every validation and test set, by name; all ranks call this."""
    return {name: dataset_losses(chunks, prefixes, architecture.seq_length,
                                          architecture.vocab_size, batch.micro_batch_size)
            for name, prefixes in (("valid", valid), ("test", test))}


def _masks(config: AnnealConfig, prefixes, architecture: ModelConfig, batch: BatchConfig,
           run_path: Path, folder: Path):
    """The arm's masks; a random arm's are drawn and written first."""
    if config.selection == "direct":
        return selection_stage.load_masks(run_path, prefixes)

    def draw():
        samples = Samples(prefixes, architecture.seq_length, architecture.vocab_size)
        pool = store.load(run_path / "sketches" / "pool")
        count = files.read_json(run_path / "selection.json")["num_select"]
        chosen = random_selection(pool.samples[pool.finite], count, batch.seed)
        names = indexed.prefix_names(prefixes)
        for prefix, mask in selection_stage.masks_of(samples, chosen).items():
            mask.with_run(str(folder)).save(selection_stage.mask_path(folder, names[prefix]))
        files.write_json(folder / "composition.json",
                         selection_stage.composition(samples, chosen))

    parallel.on_rank_zero(draw)
    return selection_stage.load_masks(folder, prefixes)


def carried_over(kind: type, carried: dict, given: dict[type, dict]) -> dict:
    """A dataclass's values: as given, else as the checkpoint was trained, else the default."""
    names = kind.__dataclass_fields__
    return {**{n: carried[n] for n in names if n in carried}, **given.get(kind, {})}


def _require_same_optimizer(config: AnnealConfig, optimizer: OptimizerConfig, carried: dict,
                            ) -> None:
    name = "use_distributed_optimizer"
    if config.load_optim and carried.get(name, getattr(optimizer, name)) != getattr(optimizer,
                                                                                   name):
        raise UserError(
            f"the checkpoint's optimizer was saved with {flag_name(name)} {carried[name]}: its "
            "state is laid out in another way. Leave the flag as it was, or add --no-load-optim.")


def _require_unchanged(selected: dict, start_from: Path, prefixes) -> None:
    """Raises UserError if the checkpoint or a pool is not what the selection was made on."""
    if parallel.on_rank_zero(lambda: checkpoint.digest(start_from)) != \
            selected["checkpoint_digest"]:
        raise UserError(f"{start_from} is not the checkpoint that the selection was made at. "
                        "Run select again in a new --run-dir.")
    for prefix in prefixes:
        digest = parallel.on_rank_zero(lambda prefix=prefix: indexed.dataset_digest(prefix))
        if digest != selected["dataset_digests"][prefix]:
            raise UserError(f"{prefix} has changed since the selection was made. "
                            "Run select again in a new --run-dir.")
