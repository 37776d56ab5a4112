"""A short annealing over the whole pool, at whose end gradients and curvature are taken.

At the onset of annealing the learning rate is high, and the weights rattle about above the valley
of the loss: most of the validation gradient points down its walls, which is where any data would
take the model once the learning rate falls. A short decay over the pool as it is takes these common
directions out; what is left of the gradients is what one sample teaches and another does not.

The pilot's weights serve the measurements alone: the annealing itself begins at the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_direct.commands import anneal
from megatron_direct.config import (
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    flag,
)
from megatron_direct.mcore import blend, checkpoint, grid, model
from megatron_direct.runtime import parallel


@dataclass(frozen=True)
class PilotConfig:
    """Pilot annealing."""

    pilot_iters: int = flag(
        20, "iterations of a pilot annealing over the whole pool, at whose end gradients are "
        "taken; 0: gradients at the checkpoint itself")


def measured_at(config: PilotConfig, found: Path, folder: Path, architecture: ModelConfig,
                layout: ParallelConfig, optimizer: OptimizerConfig, batch: BatchConfig,
                pools: list[str], tokenizer_digest: str | None, seed: int) -> Path:
    """The checkpoint at which gradients are taken; all ranks call this.

    found: the checkpoint at the onset; folder: for the pilot's checkpoint and metrics. A pilot that
    is there already is not run again, one that was killed begins anew.
    """
    if config.pilot_iters == 0:
        return found
    done = parallel.on_rank_zero(lambda: checkpoint.latest(folder / "checkpoints"))
    if done is None:
        with grid.model_parallel(layout, layout.num_model_chunks(architecture)):
            dataset, _ = blend.build_blend(
                pools, None, {}, seq_length=architecture.seq_length,
                num_sequences=config.pilot_iters * batch.global_batch_size, seed=seed,
                cache=folder / "cache", vocabulary=blend.Vocabulary(
                    architecture.vocab_size, str(tokenizer_digest)))
            chunks = model.build(architecture, layout)
            anneal.decay(chunks, dataset, found, optimizer, batch, config.pilot_iters, folder,
                         description="pilot", load_optim=checkpoint.has_optimizer(found),
                         save_interval=config.pilot_iters)
        done = checkpoint.latest(folder / "checkpoints")
    return done
