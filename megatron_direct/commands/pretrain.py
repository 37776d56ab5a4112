"""``megatron-direct pretrain``: the stable phase of a warmup-stable-decay schedule.

It makes the checkpoint at the onset of annealing that the embedded run selects at. A team brings a
checkpoint of its own instead.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from megatron_direct.config import (
    BatchConfig,
    Execution,
    Job,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
)
from megatron_direct.data import blend_files, checks
from megatron_direct.data.blend_plan import Blend
from megatron_direct.mcore import blend, checkpoint, grid, model, shards, training, training_folder
from megatron_direct.mcore.object_storage import read_object_stores
from megatron_direct.runtime import parallel
from megatron_direct.runtime.manifest import Artefact, Key, State
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.settings import Settings, flag
from megatron_direct.steps.onset import dataset_digests


@dataclass(frozen=True)
class PretrainConfig(Settings):
    """Pre-training."""

    data_path: tuple = flag((), "indexed datasets: prefixes, or alternating weights and prefixes",
                            nargs="+", required=True)
    save: str = flag("", "folder for checkpoints and metrics", required=True)
    train_iters: int = flag(300, "iterations of the stable phase, warm-up included", at_least=1)
    save_interval: int = flag(100, "iterations between checkpoints", at_least=1)
    object_storage_cache_path: str = flag(
        "", "local folder for copies of the indexes of s3:// and msc:// datasets")


@dataclass(frozen=True)
class PretrainRequest:
    pretrain: PretrainConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    layout: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    precision: Precision = field(default_factory=Precision)
    execution: Execution = field(default_factory=Execution)


@dataclass(frozen=True)
class CheckpointKey(Key):
    """What the weights at the end of the stable phase depend on."""

    prefix_digests: tuple[str, ...]
    weights: tuple[float, ...] | None
    train_iters: int
    tokenizer_digest: str | None
    model: ModelConfig
    optimizer: OptimizerConfig
    global_batch_size: int
    seed: int
    precision: Precision = field(default_factory=Precision)


def pretrain(request: PretrainRequest) -> None:
    """Trains, or carries on where a killed run with the same flags left its last checkpoint."""
    config = request.pretrain
    read_object_stores(config.object_storage_cache_path)
    asked = blend_files.parse_data_path(config.data_path)
    digests = dataset_digests(asked.prefixes)
    vocab_size, tokenizer_digest = checks.require_one_vocabulary(
        asked.prefixes, request.model.vocab_size, None)
    job = Job(dataclasses.replace(request.model, vocab_size=vocab_size), request.layout,
              request.optimizer, request.batch, request.precision, request.execution)
    job.require_runs_on(parallel.world_size(), trains=True)
    key = CheckpointKey(
        tuple(digests[prefix] for prefix in asked.prefixes),
        None if asked.weights is None else tuple(asked.weights), config.train_iters,
        tokenizer_digest, job.model, job.optimizer, job.batch.global_batch_size, job.batch.seed,
        job.precision)
    run, artefact = RunDirectory(config.save), Artefact(config.save, "a checkpoint", "--save")
    with run.entered("pretrain", request):
        state = parallel.on_rank_zero(lambda: artefact.state(key))
        if state is State.FINISHED:
            parallel.say(f"{config.save} has already been trained for {config.train_iters} "
                         "iterations.")
            return
        if state is State.NEW:
            parallel.on_rank_zero(lambda: artefact.begin(key))
        with grid.model_parallel(job.layout, job.num_model_chunks):
            _train(config, job, asked, tokenizer_digest)
        parallel.on_rank_zero(lambda: artefact.finish(key))


def _train(config: PretrainConfig, job: Job, asked: Blend, tokenizer_digest: str | None) -> None:
    batch = job.batch
    dataset, _ = blend.build_blend(asked, {}, blend.BlendRequest.for_job(
        job, config.train_iters, batch.seed, Path(config.save) / "cache", tokenizer_digest))
    chunks = model.build(job, seed=batch.seed)
    parallel.say(f"model with {shards.num_parameters(chunks):,} parameters")
    trainer = training.make_trainer(chunks, job.optimizer, batch, job.execution)
    found = parallel.on_rank_zero(lambda: training_folder.latest(config.save))
    start = 0 if found is None else checkpoint.load_training(
        found, chunks, trainer.optimizer, trainer.scheduler)
    log = training.MetricsLog(Path(config.save) / "metrics.jsonl", start)
    arguments = {**vars(job.model), **vars(job.optimizer), **vars(batch), **vars(job.precision),
                 "data_path": list(config.data_path), "train_iters": config.train_iters,
                 "tokenizer_digest": tokenizer_digest}

    def after_step(step: training.Step) -> None:
        log.write(step)
        is_last = step.iteration == config.train_iters
        stops = not is_last and parallel.stop_is_agreed()
        is_due = is_last or step.iteration % config.save_interval == 0
        if is_due or stops:
            training_folder.note_due(config.save, step.iteration, is_due=is_due)
            checkpoint.save(config.save, step.iteration, chunks, trainer.optimizer,
                            trainer.scheduler, arguments)
        if stops:
            parallel.stop()

    training.train(trainer, training.Feed(dataset, batch, start * batch.global_batch_size),
                   range(start + 1, config.train_iters + 1), "pretrain", after_step)
    log.close()
