"""Training while the learning rate decays: the annealing, in segments, and its pilot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_direct.config import BatchConfig, Job, ModelConfig
from megatron_direct.evaluation.losses import dataset_losses
from megatron_direct.mcore import checkpoint, training, training_folder
from megatron_direct.mcore.checkpoint import Checkpoint
from megatron_direct.runtime import parallel
from megatron_direct.settings import flag_name


@dataclass(frozen=True)
class Segment:
    """A stretch of the annealing over one dataset, up to where the next one begins."""

    first_iteration: int
    dataset: Any


@dataclass(frozen=True)
class Recipe:
    """How the weights come to rest.

    final: learning rate at the end, as a share of the one at the beginning: 1 keeps it constant;
    None: as --min-lr says. average: the weights at the end are the mean of those after each of the
    last iterations, this share of them; 0: they are the last ones.
    """

    final: float | None = None
    average: float = 0.0


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
    recipe: Recipe = field(default_factory=Recipe)
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


def _say_what_changes(plan: Decay) -> None:
    """Where the annealing does not go on as the training was."""
    reached, begins = plan.start.lr_reached, plan.job.optimizer.lr
    if reached is not None and reached < 0.99 * begins:
        parallel.say(f"{plan.description}: the learning rate begins at {begins:g}, but the "
                     f"training had come down to {reached:g} at {plan.start.path}. Give --lr "
                     f"{reached:g} to go on from there.")
    if plan.start.is_optimizer_of_one_layout and not plan.load_optim:
        parallel.say(f"{plan.description}: with a fresh optimizer, for that of {plan.start.path} "
                     "lies as in one layout. Save with --dist-ckpt-optim-fully-reshardable to go "
                     "on with it.")
    dropped = [flag_name(name) for name in ("hidden_dropout", "attention_dropout")
               if plan.start.arguments.get(name)]
    if dropped:
        parallel.say(f"{plan.description}: without dropout, which the training had "
                     f"({', '.join(dropped)})")


def decay(plan: Decay, chunks: Sequence[torch.nn.Module],
          when_loaded: Callable[[], object] = lambda: None,
          before_averaging: Callable[[], object] = lambda: None) -> None:
    """Trains ``chunks``, bare and without weights of any worth; all ranks call this.

    A run that was killed carries on from its newest checkpoint. when_loaded: called once the
    weights of ``plan.start`` are in the chunks; before_averaging: at the end, while the last
    weights still are.
    """
    optimizer, batch, recipe = plan.job.optimizer, plan.job.batch, plan.recipe
    assert not (recipe.average and plan.save_interval), "a mean of states is not saved"
    if recipe.final is not None:
        optimizer = dataclasses.replace(optimizer, min_lr=recipe.final * optimizer.lr)
    trainer = training.make_trainer(chunks, optimizer, batch, plan.job.execution)
    if plan.load_optim:
        checkpoint.load_training(plan.start.path, chunks, trainer.optimizer, trainer.scheduler)
    else:
        checkpoint.load_model(plan.start.path, chunks)
        trainer.optimizer.reload_model_params()
    onset = trainer.scheduler.num_steps
    _say_what_changes(plan)
    when_loaded()
    folder = plan.folder / "checkpoints"
    resumed = parallel.on_rank_zero(lambda: training_folder.latest(folder)) \
        if plan.save_interval else None
    done = 0 if resumed is None else checkpoint.load_training(
        resumed, chunks, trainer.optimizer, trainer.scheduler)
    training.anneal_over(trainer, optimizer, batch, training.DecaySteps(onset, done,
                                                                       plan.iterations))
    average = _Average(chunks) if recipe.average else None
    log = training.MetricsLog(plan.folder / "metrics.jsonl", done)
    arguments = {**plan.start.arguments, **vars(optimizer), **vars(batch),
                 **vars(plan.job.precision)}

    def after_step(step: training.Step) -> None:
        log.write(step)
        if average is not None and step.iteration > (1 - recipe.average) * plan.iterations:
            average.add()
        is_last = step.iteration == plan.last
        stops = not is_last and parallel.stop_is_agreed()
        is_due = is_last or step.iteration % (plan.save_interval or 1) == 0
        if plan.save_interval and (is_due or stops):
            training_folder.note_due(folder, step.iteration, is_due=is_due)
            checkpoint.save(folder, step.iteration, chunks, trainer.optimizer, trainer.scheduler,
                            arguments)
        if stops:
            parallel.stop()

    for segment, iterations in plan.stretches(done):
        training.train(trainer, training.Feed(
            segment.dataset, batch,
            first_sequence=(iterations.start - 1 - segment.first_iteration)
            * batch.global_batch_size), iterations, plan.description, after_step)
    log.close()
    before_averaging()
    if average is not None:
        average.write()


class _Average:
    """The mean of the weights of this rank's chunks, of all times that they were added."""

    def __init__(self, chunks: Sequence[torch.nn.Module]):
        self._parameters = [parameter for chunk in chunks for parameter in chunk.parameters()]
        self._sums = [torch.zeros_like(parameter, dtype=torch.float32)
                      for parameter in self._parameters]
        self._count = 0

    def add(self) -> None:
        self._count += 1
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            total.add_(parameter.detach())

    def write(self) -> None:
        """Into the weights, if any were added."""
        for total, parameter in zip(self._sums, self._parameters, strict=True):
            if self._count:
                parameter.data.copy_(total / self._count)


def set_losses(chunks: Sequence[torch.nn.Module], model: ModelConfig, batch: BatchConfig,
               **sets: Sequence[str]) -> dict[str, dict[str, float]]:
    """Mean loss per token on each dataset of each set (valid, test), by name; all ranks call this.
    """
    return {name: dataset_losses(chunks, prefixes, model, batch.micro_batch_size)
            for name, prefixes in sets.items()}
