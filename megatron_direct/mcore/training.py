"""Megatron's own training step, for pre-training and annealing alike.

DistributedDataParallel, the optimizer (the distributed one too), OptimizerParamScheduler and the
pipeline schedule are Megatron-Core's. Here they are put together, fed and watched.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megatron_direct.config import BatchConfig, Execution, OptimizerConfig
from megatron_direct.mcore import grid
from megatron_direct.mcore.compiled_layers import CompiledLayers
from megatron_direct.runtime import attendance, files, host, parallel


@dataclass
class Trainer:
    """A model being trained. ``chunks`` are bare, ``wrapped`` in DistributedDataParallel.

    compiled: layers that an iteration runs compiled, if any.
    """

    chunks: list[torch.nn.Module]
    wrapped: list[Any]
    optimizer: Any
    scheduler: Any
    compiled: CompiledLayers | None = None


def make_trainer(chunks: Sequence[torch.nn.Module], optimizer: OptimizerConfig,
                 batch: BatchConfig, execution: Execution | None = None) -> Trainer:
    """Wraps the chunks; the schedule is the stable phase until ``anneal_over`` is called."""
    from megatron.core.distributed import (
        DistributedDataParallel,
        DistributedDataParallelConfig,
        finalize_model_grads,
    )
    from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
    from megatron.core.optimizer import get_megatron_optimizer

    transformer_config: Any = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=optimizer.use_distributed_optimizer)
    wrapped = [DistributedDataParallel(transformer_config, ddp_config, chunk,
                                       disable_bucketing=index > 0)
               for index, chunk in enumerate(chunks)]
    megatron_optimizer = get_megatron_optimizer(MegatronOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.adam_beta1,
        adam_beta2=optimizer.adam_beta2,
        adam_eps=optimizer.adam_eps,
        clip_grad=optimizer.clip_grad,
        bf16=transformer_config.bf16,
        params_dtype=transformer_config.params_dtype,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
    ), wrapped)
    transformer_config.finalize_model_grads_func = finalize_model_grads
    transformer_config.grad_scale_func = megatron_optimizer.scale_loss
    scheduler = _scheduler(megatron_optimizer, optimizer, optimizer.lr_warmup_iters *
                           batch.global_batch_size)
    compiled = CompiledLayers(chunks) if execution and execution.torch_compile else None
    return Trainer(list(chunks), wrapped, megatron_optimizer, scheduler, compiled)


@dataclass(frozen=True)
class DecaySteps:
    """The D of a WSD schedule. onset: the schedule's steps, in samples, at its beginning; done:
    iterations of it that are past; iterations: all of them."""

    onset: int
    done: int
    iterations: int


def anneal_over(trainer: Trainer, optimizer: OptimizerConfig, batch: BatchConfig,
                steps: DecaySteps) -> None:
    """Lets the learning rate decay from here on."""
    # A checkpoint's optimizer brings what it was saved with; of the rates, the schedule prefers it.
    for group in trainer.optimizer.param_groups:
        group["max_lr"], group["min_lr"] = optimizer.lr, optimizer.min_lr
        group["betas"] = (optimizer.adam_beta1, optimizer.adam_beta2)
        group["eps"] = optimizer.adam_eps
    decay = steps.iterations * batch.global_batch_size
    trainer.scheduler = _scheduler(trainer.optimizer, optimizer, 0,
                                   decay_ends=steps.onset + decay, decay_steps=decay)
    trainer.scheduler.step(steps.onset + steps.done * batch.global_batch_size)


def _scheduler(megatron_optimizer, optimizer: OptimizerConfig, warmup_steps: int,
               decay_ends: int | None = None, decay_steps: int | None = None):
    """Megatron counts the schedule's steps in samples, not in iterations."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        megatron_optimizer,
        init_lr=0.0,
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=decay_ends or warmup_steps + 1,
        lr_decay_style="constant" if decay_ends is None else "WSD",
        start_wd=optimizer.weight_decay,
        end_wd=optimizer.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=decay_steps,
        lr_wsd_decay_style=optimizer.lr_wsd_decay_style,
    )


@dataclass(frozen=True)
class Step:
    """What one iteration reports. loss: mean over the tokens of the global batch."""

    iteration: int
    loss: float
    lr: float
    grad_norm: float | None


@dataclass(frozen=True)
class Feed:
    """Sequences of a dataset in order, from number ``first_sequence`` on, in batches."""

    dataset: Sequence
    batch: BatchConfig
    first_sequence: int = 0

    def micro_batches(self, iteration: int) -> Iterator[tuple[torch.Tensor, ...]]:
        """This rank's of an iteration, counted from 0, one at a time: (tokens, labels, loss_mask,
        position_ids), each [b, s]. They come in the order of Megatron-LM's sampler: ranks side by
        side."""
        size = self.batch.micro_batch_size
        consumed = self.first_sequence + iteration * self.batch.global_batch_size
        for number in range(self.batch.num_microbatches(grid.data_size())):
            start = consumed + (number * grid.data_size() + grid.data_rank()) * size
            rows = [self.dataset[index] for index in range(start, start + size)]
            yield tuple(host.to_device(torch.stack([row[key] for row in rows]))
                        for key in ("tokens", "labels", "loss_mask", "position_ids"))


def train(trainer: Trainer, feed: Feed, iterations: range, description: str,
          after_step: Callable[[Step], None]) -> None:
    """Iterations over the feed. iterations: the numbers that the steps are reported under.

    Raises FloatingPointError, on all ranks, when the loss is not finite.
    """
    progress = tqdm(iterations, desc=description, unit="it",
                    disable=None if parallel.is_rank_zero() else True)
    for index, iteration in enumerate(progress):
        attendance.at(f"{description}, iteration {iteration}")
        loss, grad_norm = _step(trainer, feed, index)
        if trainer.compiled is not None:
            trainer.compiled.report()
        # Before the state is saved: a gradient that is not finite has spoilt the weights already.
        for what, value in (("loss", loss), ("norm of the gradient", grad_norm)):
            if value is not None and not math.isfinite(value):
                raise FloatingPointError(f"the {what} of iteration {iteration} is {value}. "
                                         "Lower --lr, or check the data.")
        lr = trainer.optimizer.param_groups[0]["lr"]
        trainer.scheduler.step(feed.batch.global_batch_size)
        progress.set_postfix(loss=f"{loss:.3f}")
        after_step(Step(iteration, loss, lr, grad_norm))


def _step(trainer: Trainer, feed: Feed, index: int) -> tuple[float, float | None]:
    from megatron.core.pipeline_parallel import get_forward_backward_func

    for chunk in trainer.wrapped:
        chunk.zero_grad_buffer()
    trainer.optimizer.zero_grad()
    sums = torch.zeros(2, dtype=torch.float64, device=host.device())  # loss, tokens
    config: Any = trainer.chunks[0].config

    def forward_step(iterator, chunk):
        tokens, labels, loss_mask, positions = next(iterator)
        # Prediction heads add their own loss to the gradients, of the labels that count.
        for_heads = {"loss_mask": loss_mask} if config.mtp_num_layers else {}
        output = chunk(tokens, positions, None, labels=labels, **for_heads)

        def loss_sum(token_losses):
            loss, count = (token_losses * loss_mask).sum(), loss_mask.sum()
            sums.add_(torch.stack([loss.detach(), count]).double())
            return loss, count.int(), {}

        return output, loss_sum

    # Each chunk reads the batch for itself, one micro-batch at a time.
    batches = [feed.micro_batches(index) for _ in trainer.wrapped]
    first = next(batches[0])
    batches[0] = itertools.chain([first], batches[0])
    with contextlib.nullcontext() if trainer.compiled is None else trainer.compiled.in_place():
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=batches,
            model=trainer.wrapped,
            num_microbatches=feed.batch.num_microbatches(grid.data_size()),
            seq_length=first[0].shape[1],
            micro_batch_size=feed.batch.micro_batch_size,
        )
    _, grad_norm, _ = trainer.optimizer.step()
    loss, tokens = grid.sum_over_data(grid.share_from_last_stage(sums)).tolist()
    return loss / tokens, None if grad_norm is None else float(grad_norm)


class MetricsLog:
    """``metrics.jsonl``: one line an iteration, on rank 0; a resumed run carries on behind
    the iteration it resumes from."""

    def __init__(self, path: Path, resumed_after: int):
        self._file = None
        if parallel.is_rank_zero():
            kept = [line for line in read_metrics(path) if line["iteration"] <= resumed_after]
            with files.written_whole(path, "w") as file:
                file.writelines(json.dumps(line) + "\n" for line in kept)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115

    def write(self, step: Step) -> None:
        if self._file is not None:
            files.append(self._file, (json.dumps(vars(step)) + "\n").encode())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics file; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]
