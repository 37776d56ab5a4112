"""Sketches of every sample's gradient, and Fisher products, in every layout.

The truth is ``PlainGPT`` under ordinary autograd, one sample at a time, in double precision; its
gradients are sketched entry by entry from the definition of the hashes.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from indexed_files import random_documents, write_dataset
from plain_gpt import PlainGPT
from ranks import LAYOUTS, Layout, RankError, on_layout
from weights import assemble, fill_by_hash, pieces

from megatron_direct import hashing, parallel
from megatron_direct import model as models
from megatron_direct.config import ModelConfig
from megatron_direct.curvature.fisher import FisherOperator
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.samples import Samples
from megatron_direct.gradients.compute import sketch_samples
from megatron_direct.gradients.hooks import PieceHooks
from megatron_direct.gradients.sketch import Sketch

VOCAB_SIZE, SKETCH_SIZE, SEED, MICRO_BATCH_SIZE = 48, 64, 5, 4
_sizes = {"num_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "vocab_size": VOCAB_SIZE,
          "seq_length": 8, "make_vocab_size_divisible_by": 32}
_gpt2 = _sizes | {"normalization": "LayerNorm", "swiglu": False, "add_bias_linear": True,
                  "position_embedding_type": "learned_absolute"}
_llama = _sizes | {"num_query_groups": 2, "ffn_hidden_size": 24}
MODELS = {
    "gpt2-tied": ModelConfig(**_gpt2),
    "llama-tied": ModelConfig(**_llama),
    "llama-untied": ModelConfig(**_llama, untie_embeddings_and_output_weights=True),
}
# fp32 products and sums of some thousand terms, in an order that differs with the layout, round to
# 1e-6 of a sketch's norm; the bars are 1e-5 against autograd and 1e-4 between layouts.
AGAINST_AUTOGRAD = 1e-5


@functools.cache
def _documents():
    return random_documents(64, VOCAB_SIZE, seed=1, longest=14)


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "pool", _documents())


def _on_ranks(model, layout, prefix):
    """This rank's rows by sample, its losses, and one Fisher product."""
    chunks = models.build(model, layout)
    shards = models.parameter_shards(chunks)
    fill_by_hash(shards)
    samples = Samples([prefix], model.seq_length, VOCAB_SIZE)
    sketch = Sketch(shards, SKETCH_SIZE, SEED)
    rows, losses = {}, {}
    for sketches, numbers, values in sketch_samples(chunks, shards, sketch, samples,
                                                    samples.usable, MICRO_BATCH_SIZE):
        rows.update(zip(numbers.tolist(), sketches, strict=True))
        losses.update(zip(numbers.tolist(), values.tolist(), strict=True))
    space = ParameterSpace(shards)
    operator = FisherOperator(chunks, space, samples, samples.usable, MICRO_BATCH_SIZE)
    vector = space.random_signs(3)
    of_vector = parallel.sum_over_model(sketch.of_vector(space.split(vector), shards))
    return {"rows": rows, "losses": losses, "sketch of vector": of_vector.numpy(),
            "weights": pieces(shards, [s.parameter for s in shards]),
            "vector": pieces(shards, space.split(vector)),
            "product": pieces(shards, space.split(operator.matvec(vector))),
            "frozen": [s.name for s in shards if not s.parameter.requires_grad],
            "dimension": space.dimension}


def _sketch_entry_by_entry(matrices: dict[str, np.ndarray]) -> np.ndarray:
    """The definition: entry (r, c) goes to (h1(r) + h2(c)) mod k with sign s1(r) s2(c)."""
    total = np.zeros(SKETCH_SIZE)
    for name, matrix in matrices.items():
        row, column = (hashing.hash64(hashing.stream(SEED, axis, name), torch.arange(count)).numpy()
                       for axis, count in zip(("row", "column"), matrix.shape, strict=True))
        low = (1 << 62) - 1
        place = ((row & low)[:, None] % SKETCH_SIZE + (column & low)[None] % SKETCH_SIZE)
        sign = np.where(row < 0, -1, 1)[:, None] * np.where(column < 0, -1, 1)[None]
        np.add.at(total, place % SKETCH_SIZE, matrix * sign)
    return total


@functools.cache
def _truth(name: str, prefix: str):
    """Sketches [n, k] and losses of all samples, and F v, from one rank's weights."""
    torch.set_num_threads(1)
    one, = on_layout(Layout(), _on_ranks, MODELS[name], prefix)
    matrices = {key: m.astype(np.float64) for key, m in assemble([one["weights"]]).items()}
    plain = PlainGPT(MODELS[name], {key: m.shape for key, m in matrices.items()})
    weights = plain.flatten(matrices).requires_grad_(True)
    vector = plain.flatten({k: m.astype(np.float64) for k, m in assemble([one["vector"]]).items()})
    sketches, losses, gradients = [], [], []
    for document in _documents():
        tokens = np.concatenate(document)
        loss = plain.loss(weights, [tokens])
        gradient, = torch.autograd.grad(loss, weights)
        parts = plain.unflatten(gradient)
        sketches.append(_sketch_entry_by_entry({k: p.numpy() for k, p in parts.items()}))
        losses.append(loss.item())
        gradients.append(gradient)
    gradients = torch.stack(gradients)
    return (np.stack(sketches), np.array(losses), plain,
            gradients.T @ (gradients @ vector) / len(gradients),
            _sketch_entry_by_entry({k: p.numpy() for k, p in plain.unflatten(vector).items()}))


def _relative(found, expected):
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


CASES = [("llama-tied", Layout()), ("gpt2-tied", Layout()), ("llama-untied", Layout()),
         *(("llama-tied", layout) for layout in LAYOUTS),
         ("gpt2-tied", Layout(tp=2, pp=2)), ("gpt2-tied", Layout(tp=2, sp=True)),
         ("llama-untied", Layout(tp=2, pp=2))]


@pytest.mark.parametrize(("name", "layout"), CASES, ids=lambda value: str(value))
def test_sketches_and_fisher_products(name, layout, prefix):
    sketches, losses, plain, product, of_vector = _truth(name, prefix)
    ranks = on_layout(layout, _on_ranks, MODELS[name], prefix)
    rows = {}
    for rank in ranks:
        for number, row in rank["rows"].items():
            if number in rows:  # ranks of one copy of the model hold the same rows
                np.testing.assert_array_equal(row, rows[number])
            rows[number] = row
            assert rank["losses"][number] == pytest.approx(losses[number], rel=1e-5)
    found = np.stack([rows[number] for number in range(len(sketches))])
    assert _relative(found, sketches).max() < AGAINST_AUTOGRAD
    assert _relative(ranks[0]["sketch of vector"], of_vector) < AGAINST_AUTOGRAD

    def whole(key):
        matrices = assemble([rank[key] for rank in ranks])
        return plain.flatten({k: m.astype(np.float64) for k, m in matrices.items()}).numpy()

    assert _relative(whole("product"), product.numpy()) < 1e-4
    assert {rank["dimension"] for rank in ranks} == {product.numel()}
    assert not any(rank["frozen"] for rank in ranks), "the hooks thaw what they froze"


def _with_a_layer_no_hook_knows(model, layout):
    chunks = models.build(model, layout)
    chunks[0].decoder.extra = torch.nn.Conv1d(1, 1, 1)
    shards = models.parameter_shards(models.build(model, layout))
    odd = models.ParameterShard("decoder.extra.weight", chunks[0].decoder.extra.weight,
                                torch.arange(1), torch.arange(1), True, True)
    with PieceHooks(chunks, [*shards, odd], lambda *_: None):
        pass


def test_a_parameter_that_no_hook_covers_is_named():
    with pytest.raises(RankError, match="no gradient hook covers .*decoder.extra.weight"):
        on_layout(Layout(), _with_a_layer_no_hook_knows, MODELS["llama-tied"])
