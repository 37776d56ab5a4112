"""Hooks that stay for many passes."""

from __future__ import annotations

import torch
from ranks import Layout, on_layout
from tiny_models import MODELS

from megatron_direct.config import Job
from megatron_direct.gradients.hooks import PieceHooks
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import parameter_shards


def _run(chunk, seed, backward=True):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 50, (2, 8), generator=generator)
    positions = torch.arange(8).expand(2, -1)
    loss = chunk(tokens, positions, None, labels=tokens).sum()
    if backward:
        loss.backward()


def _gradients(shards):
    """(consumer, gradients by name and micro-batch that it will have added up)."""
    found = {}

    def add(micro_batch, shard, piece):
        key = (shard.name, micro_batch)
        found[key] = found.get(key, 0) + piece.matrices()

    return add, found


def _many_passes(model, layout):
    chunks = models.build(Job(model, layout))
    shards = parameter_shards(chunks)
    apart = []
    for seed in (1, 2):
        add, found = _gradients(shards)
        with PieceHooks(chunks, shards, add) as hooks:
            hooks.begin(seed)
            _run(chunks[0], seed)
        apart.append(found)
    together = []
    with PieceHooks(chunks, shards) as hooks:
        _run(chunks[0], 1, backward=False)  # unwatched
        for seed in (1, 2):
            add, found = _gradients(shards)
            hooks.begin_pass(add)
            hooks.begin(seed)
            _run(chunks[0], seed)
            hooks.begin_pass(None)
            _run(chunks[0], 3, backward=False)
            together.append(found)
    assert all(parameter.requires_grad for parameter in chunks[0].parameters())
    assert not any(module._forward_hooks for module in chunks[0].modules())
    for found, expected in zip(together, apart, strict=True):
        assert found.keys() == expected.keys() and len(found) == len(shards)
        for key, matrices in expected.items():
            assert torch.equal(found[key], matrices), key
    name = shards[0].name
    return bool((apart[0][name, 1] != apart[1][name, 2]).any())


def test_hooks_stay_while_consumers_change():
    differ, = on_layout(Layout(), _many_passes, MODELS["gpt2-untied"])
    assert differ, "the two passes were of different tokens"
