"""A checkpoint of a tiny model in training, and what its training goes on to do.

``save`` trains, saves with the optimizer, and trains on; ``resume`` reads the checkpoint in another
layout, or with another megatron-core, and trains on from there: the losses must be the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ranks import Layout, on_layout
from tiny_models import MODELS, VOCAB_SIZE
from weights import assemble, fill_by_hash, fill_expert_bias, pieces

from megatron_direct.config import BatchConfig, Job, ModelConfig, OptimizerConfig

BATCH = BatchConfig(micro_batch_size=2, global_batch_size=8)
STEPS = 3  # before the checkpoint, and as many after it

# Sums are taken in another order in another layout, and Adam's first steps divide by small numbers.
LOSS_RTOL = 2e-4


@dataclass(frozen=True)
class Case:
    """A model of ``tiny_models``, and the layouts that its checkpoint is written and read in."""

    model: str
    written: Layout
    read: Layout
    distributed_optimizer: bool = False

    def __str__(self) -> str:
        optimizer = "-distributed" if self.distributed_optimizer else ""
        return f"{self.model}-{self.written}-to-{self.read}{optimizer}"


CASES = [
    Case("llama-tied", Layout(tp=2), Layout(pp=2)),
    Case("gpt2-untied", Layout(dp=2), Layout(tp=2), distributed_optimizer=True),
    Case("qwen2-moe", Layout(), Layout(tp=2, sp=True)),
    Case("deepseek-v3", Layout(tp=2, sp=True), Layout()),
    Case("nemotron-h", Layout(tp=2), Layout(pp=2), distributed_optimizer=True),
]


@dataclass(frozen=True)
class Trained:
    """The whole model's weights at the checkpoint, and the losses of the steps after it."""

    weights: dict[str, np.ndarray]
    losses: list[float]


def save(case: Case, folder: Path) -> Trained:
    return _whole(on_layout(case.written, _save, MODELS[case.model], case, str(folder)))


def resume(case: Case, folder: Path) -> Trained:
    return _whole(on_layout(case.read, _resume, MODELS[case.model], case, str(folder)))


def require_equal(found: Trained, expected: Trained) -> None:
    """Weights to the last bit; losses as sums in another order allow."""
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        np.testing.assert_array_equal(found.weights[name], weight)
    np.testing.assert_allclose(found.losses, expected.losses, rtol=LOSS_RTOL)


def _whole(ranks: list) -> Trained:
    return Trained(assemble([weights for weights, _ in ranks]), ranks[0][1])


def _save(model, layout, case, folder):
    from megatron_direct.mcore import checkpoint
    from megatron_direct.mcore.shards import parameter_shards

    chunks, trainer = _trainer(model, layout, case)
    fill_by_hash(parameter_shards(chunks), scale=0.2)
    fill_expert_bias(chunks)
    trainer.optimizer.reload_model_params()
    train_on(trainer, model, 0)
    checkpoint.save(folder, STEPS, chunks, trainer.optimizer, trainer.scheduler,
                    {**vars(model), "lr": 1e-3})
    return _weights(chunks), train_on(trainer, model, STEPS)


def _resume(model, layout, case, folder):
    from megatron_direct.mcore import checkpoint

    found = checkpoint.open_checkpoint(folder)
    assert found.has_optimizer and found.iteration == STEPS
    assert found.arguments["lr"] == 1e-3
    carried = found.settings(ModelConfig, {})
    assert carried == model
    chunks, trainer = _trainer(carried, layout, case)
    iteration = checkpoint.load_training(found.path, chunks, trainer.optimizer, trainer.scheduler)
    return _weights(chunks), train_on(trainer, carried, iteration)


def _trainer(model, layout, case):
    from megatron_direct.mcore import model as models
    from megatron_direct.mcore import training

    chunks = models.build(Job(model, layout), seed=5)
    optimizer = OptimizerConfig(lr=1e-3, lr_warmup_iters=2 * STEPS,
                                use_distributed_optimizer=case.distributed_optimizer)
    return chunks, training.make_trainer(chunks, optimizer, BATCH)


def _weights(chunks):
    from megatron_direct.mcore.shards import parameter_shards

    shards = parameter_shards(chunks)
    # Copied: training goes on in the same memory.
    return pieces(shards, [shard.parameter.detach().clone() for shard in shards])


def train_on(trainer, model, done: int) -> list[float]:
    """STEPS steps after ``done`` of them; their losses."""
    from megatron_direct.mcore import training

    feed = training.Feed(_sequences(model.seq_length), BATCH, done * BATCH.global_batch_size)
    steps = []
    training.train(trainer, feed, range(done + 1, done + STEPS + 1), "", steps.append)
    return [step.loss for step in steps]


def _sequences(length: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    count = 2 * STEPS * BATCH.global_batch_size
    tokens = torch.randint(0, VOCAB_SIZE, (count, length + 1), generator=generator)
    return [{"tokens": row[:-1], "labels": row[1:], "loss_mask": torch.ones(length),
             "position_ids": torch.arange(length)} for row in tokens]
