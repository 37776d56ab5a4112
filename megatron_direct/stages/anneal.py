"""``megatron-direct anneal``: the decay phase over the masked blend, and what it came to.

An *arm* is one annealing: ``direct`` over the run's selection, ``random`` over as many samples
drawn at random. Arms start from one checkpoint, optimizer included, and see the same number of
tokens in batches of the same order of work under the same schedule; only the masks differ.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_direct import checkpoint, evaluate, files, model, parallel, training
from megatron_direct.config import (
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    flag,
    flag_name,
)
from megatron_direct.data import blend, indexed
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients import store
from megatron_direct.run import RunDirectory
from megatron_direct.selection.baselines import random_selection
from megatron_direct.stages import selection as selection_stage

ARMS = ("direct", "random")


@dataclass(frozen=True)
class AnnealConfig:
    """Annealing."""

    run_dir: str = flag("", "folder of a finished select", required=True)
    selection: str = flag("direct", "the arm: the run's selection, or a random one of its size",
                          choices=ARMS)
    lr_wsd_decay_iters: int = flag(
        100, "iterations of the annealing, over which the learning rate decays")
    data_weights: tuple = flag(
        (), "weight of each pool in the blend; left out: the tokens its mask leaves", nargs="+",
        type=float)
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
    optimizer = OptimizerConfig(**_carried(OptimizerConfig, carried, given))
    batch = BatchConfig(**_carried(BatchConfig, carried, given))
    _require_same_optimizer(config, optimizer, carried)
    layout.check(architecture, parallel.world_size())
    prefixes = selected["data_path"]
    if config.data_weights and len(config.data_weights) != len(prefixes):
        raise UserError(f"--data-weights has {len(config.data_weights)} numbers for "
                        f"{len(prefixes)} pools. Give one for each.")
    _require_unchanged(selected, start_from, prefixes)

    identity = {**vars(architecture), **vars(optimizer), **vars(batch), **vars(config),
                "run_dir": None, "save_interval": None,
                "checkpoint_digest": selected["checkpoint_digest"]}
    stage = f"anneal {config.selection}"
    folder = arm_folder(config.run_dir, config.selection)
    if parallel.on_rank_zero(lambda: run.begin(stage, identity, vars(layout))):
        parallel.say(f"{folder} is already annealed.")
        return
    with parallel.model_parallel(layout, layout.num_model_chunks(architecture)):
        batch.num_microbatches(parallel.data_size())
        masks = _masks(config, prefixes, architecture, batch, run.path, folder)
        num_sequences = config.lr_wsd_decay_iters * batch.global_batch_size
        dataset, parts = blend.build_blend(
            prefixes, config.data_weights or None, masks, seq_length=architecture.seq_length,
            num_sequences=num_sequences, seed=batch.seed, cache=folder / "cache",
            vocabulary=blend.Vocabulary(architecture.vocab_size,
                                        str(carried.get("tokenizer_digest"))))
        for part in parts:
            parallel.say(f"{config.selection}: {part.prefix}: {part.documents} documents, "
                         f"{part.tokens} tokens, seen {part.epochs:.2f} times")
        chunks = model.build(architecture, layout)
        before, after = _train(config, optimizer, batch, chunks, dataset, start_from, folder,
                               lambda: _losses(config, selected, chunks, architecture, batch))
    parallel.on_rank_zero(lambda: files.write_json(folder / "result.json", {
        "arm": config.selection, "before": before, "after": after,
        "tokens": num_sequences * architecture.seq_length,
        "blend": [vars(part) for part in parts]}))
    parallel.on_rank_zero(lambda: run.finish(stage))


def _train(config: AnnealConfig, optimizer: OptimizerConfig, batch: BatchConfig, chunks, dataset,
           start_from: Path, folder: Path, losses) -> tuple[dict, dict]:
    """Losses before and after the annealing."""
    trainer = training.make_trainer(chunks, optimizer, batch)
    if config.load_optim:
        checkpoint.load_training(start_from, chunks, trainer.optimizer, trainer.scheduler)
    else:
        checkpoint.load_model(start_from, chunks)
    onset = trainer.scheduler.num_steps
    before = losses()
    resumed = checkpoint.latest(folder / "checkpoints")
    done = 0 if resumed is None else checkpoint.load_training(
        resumed, chunks, trainer.optimizer, trainer.scheduler)
    training.anneal_over(trainer, optimizer, onset, done, config.lr_wsd_decay_iters, batch)
    log = training.MetricsLog(folder / "metrics.jsonl", done)
    args = {**checkpoint.read_args(start_from), **vars(optimizer), **vars(batch)}

    def after_step(step: training.Step) -> None:
        log.write(step)
        if step.iteration % config.save_interval == 0 or \
                step.iteration == config.lr_wsd_decay_iters:
            checkpoint.save(folder / "checkpoints", step.iteration, chunks, trainer.optimizer,
                            trainer.scheduler, args)

    training.train(trainer, dataset, batch, range(done + 1, config.lr_wsd_decay_iters + 1),
                   first_sequence=done * batch.global_batch_size,
                   description=f"anneal {config.selection}", after_step=after_step)
    log.close()
    return before, losses()


def _losses(config: AnnealConfig, selected: dict, chunks, architecture: ModelConfig,
            batch: BatchConfig) -> dict[str, dict[str, float]]:
    return {name: evaluate.dataset_losses(chunks, list(prefixes), architecture.seq_length,
                                          architecture.vocab_size, batch.micro_batch_size)
            for name, prefixes in (("valid", selected["valid_data_path"]),
                                   ("test", config.test_data_path))}


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
            mask.save(selection_stage.mask_path(folder, names[prefix]))
        files.write_json(folder / "composition.json",
                         selection_stage.composition(samples, chosen))

    parallel.on_rank_zero(draw)
    return selection_stage.load_masks(folder, prefixes)


def _carried(kind: type, carried: dict, given: dict[type, dict]) -> dict:
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
