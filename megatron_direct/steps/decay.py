"""Training while the learning rate decays: the annealing, in segments, and its pilot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_direct.config import BatchConfig, Job, ModelConfig
from megatron_direct.evaluation.losses import dataset_losses
from megatron_direct.mcore import checkpoint, training
from megatron_direct.mcore.checkpoint import Checkpoint


@dataclass(frozen=True)
class Segment:
    """A stretch of the annealing over one dataset, up to where the next one begins."""

    first_iteration: int
    dataset: Any


@dataclass(frozen=True)
class Decay:
    """One annealing.

    start: its weights, and its optimizer unless ``load_optim`` is False, are begun with. segments:
    in the order of their first iterations, of which the first is 0. folder: for ``metrics.jsonl``
    and, every ``save_interval`` iterations and at the end, checkpoints; None: no checkpoints.
    stop: the iteration up to which it is trained for now, if not to its end.
    """

    job: Job
    start: Checkpoint
    segments: Sequence[Segment]
    iterations: int
    folder: Path
    description: str
    load_optim: bool = True
    save_interval: int | None = None
    stop: int | None = None

    @property
    def last(self) -> int:
        return self.iterations if self.stop is None else self.stop

    def stretches(self, done: int) -> list[tuple[Segment, range]]:
        """(segment, its iterations counted from 1) of what is left after ``done`` iterations."""
        ends = [segment.first_iteration for segment in self.segments[1:]] + [self.last]
        left = [(segment, range(max(segment.first_iteration, done) + 1, end + 1))
                for segment, end in zip(self.segments, ends, strict=True)]
        return [(segment, iterations) for segment, iterations in left if iterations]


def decay(plan: Decay, chunks: Sequence[torch.nn.Module],
          when_loaded: Callable[[], None] = lambda: None) -> None:
    """Trains ``chunks``, bare and without weights of any worth; all ranks call this.

    A run that was killed carries on from its newest checkpoint. when_loaded: called once the
    weights of ``plan.start`` are in the chunks.
    """
    optimizer, batch = plan.job.optimizer, plan.job.batch
    trainer = training.make_trainer(chunks, optimizer, batch)
    if plan.load_optim:
        checkpoint.load_training(plan.start.path, chunks, trainer.optimizer, trainer.scheduler)
    else:
        checkpoint.load_model(plan.start.path, chunks)
        trainer.optimizer.reload_model_params()
    onset = trainer.scheduler.num_steps
    when_loaded()
    folder = plan.folder / "checkpoints"
    resumed = checkpoint.latest(folder) if plan.save_interval else None
    done = 0 if resumed is None else checkpoint.load_training(
        resumed, chunks, trainer.optimizer, trainer.scheduler)
    training.anneal_over(trainer, optimizer, batch, training.DecaySteps(onset, done,
                                                                       plan.iterations))
    log = training.MetricsLog(plan.folder / "metrics.jsonl", done)
    arguments = {**plan.start.arguments, **vars(optimizer), **vars(batch),
                 **vars(plan.job.precision)}

    def after_step(step: training.Step) -> None:
        log.write(step)
        if plan.save_interval and (step.iteration % plan.save_interval == 0
                                   or step.iteration == plan.last):
            checkpoint.save(folder, step.iteration, chunks, trainer.optimizer, trainer.scheduler,
                            arguments)

    for segment, iterations in plan.stretches(done):
        training.train(trainer, training.Feed(
            segment.dataset, batch,
            first_sequence=(iterations.start - 1 - segment.first_iteration)
            * batch.global_batch_size), iterations, plan.description, after_step)
    log.close()


def set_losses(chunks: Sequence[torch.nn.Module], model: ModelConfig, batch: BatchConfig,
               **sets: Sequence[str]) -> dict[str, dict[str, float]]:
    """Mean loss per token on each dataset of each set (valid, test), by name; all ranks call this.
    """
    return {name: dataset_losses(chunks, prefixes, model, batch.micro_batch_size)
            for name, prefixes in sets.items()}
