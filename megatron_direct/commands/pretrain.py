"""``megatron-direct pretrain``: the stable phase of a warmup-stable-decay schedule.

It makes the checkpoint at the onset of annealing that the embedded run selects at. A team brings a
checkpoint of its own instead.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from megatron_direct.config import (
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    flag,
)
from megatron_direct.data import checks
from megatron_direct.mcore import blend, checkpoint, grid, model, training
from megatron_direct.runtime import parallel
from megatron_direct.runtime.run_directory import RunDirectory


@dataclass(frozen=True)
class PretrainConfig:
    """Pre-training."""

    data_path: tuple = flag((), "indexed datasets: prefixes, or weights and prefixes by turns",
                            nargs="+", required=True)
    save: str = flag("", "folder for checkpoints and metrics", required=True)
    train_iters: int = flag(300, "iterations of the stable phase, warm-up included")
    save_interval: int = flag(100, "iterations between checkpoints")


def pretrain(config: PretrainConfig, architecture: ModelConfig, layout: ParallelConfig,
             optimizer: OptimizerConfig, batch: BatchConfig) -> None:
    """Trains, or carries on where a killed run with the same flags left its last checkpoint."""
    prefixes, weights = blend.parse_data_path(config.data_path)
    vocab_size, tokenizer_digest = checks.require_one_vocabulary(
        prefixes, architecture.vocab_size, None)
    architecture = dataclasses.replace(architecture, vocab_size=vocab_size)
    layout.check(architecture, parallel.world_size())
    batch.num_microbatches(layout.data_parallel_size(parallel.world_size()))
    identity = {**vars(architecture), **vars(optimizer), **vars(batch), "data_path":
                list(config.data_path), "train_iters": config.train_iters,
                "tokenizer_digest": tokenizer_digest}
    run = RunDirectory(config.save)
    if parallel.on_rank_zero(lambda: run.begin("pretrain", identity, vars(layout))):
        parallel.say(f"{config.save} is already trained for {config.train_iters} iterations.")
        return
    with grid.model_parallel(layout, layout.num_model_chunks(architecture)):
        dataset, _ = blend.build_blend(
            prefixes, weights, {}, seq_length=architecture.seq_length,
            num_sequences=config.train_iters * batch.global_batch_size, seed=batch.seed,
            vocabulary=blend.Vocabulary(vocab_size, str(tokenizer_digest)),
            cache=Path(config.save) / "cache")
        chunks = model.build(architecture, layout, seed=batch.seed)
        parallel.say(f"model with {model.num_parameters(chunks):,} parameters")
        trainer = training.make_trainer(chunks, optimizer, batch)
        found = checkpoint.latest(config.save)
        start = 0 if found is None else checkpoint.load_training(
            found, chunks, trainer.optimizer, trainer.scheduler)
        log = training.MetricsLog(Path(config.save) / "metrics.jsonl", start)

        def after_step(step: training.Step) -> None:
            log.write(step)
            if step.iteration % config.save_interval == 0 or step.iteration == config.train_iters:
                checkpoint.save(config.save, step.iteration, chunks, trainer.optimizer,
                                trainer.scheduler, identity)

        training.train(trainer, dataset, batch, range(start + 1, config.train_iters + 1),
                       first_sequence=start * batch.global_batch_size,
                       description="pretrain", after_step=after_step)
        log.close()
    parallel.on_rank_zero(lambda: run.finish("pretrain"))
