"""Sketches of every sample's gradient, and Fisher products: each family, in every layout.

The truth is ``PlainGPT`` under ordinary autograd, one sample at a time, in double precision; its
gradients are sketched entry by entry from the definition of the hashes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import numpy as np
import pytest
import torch
from indexed_files import random_documents, write_dataset
from plain_gpt import PlainGPT
from ranks import LAYOUTS, Layout, RankError, on_layout
from tiny_models import MODELS, VOCAB_SIZE, has_hybrid_latent_layers
from weights import assemble, fill_by_hash, fill_expert_bias, pieces

from megatron_direct.config import Job
from megatron_direct.curvature.fisher import FisherOperator
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients import hashing
from megatron_direct.gradients.hooks import PieceHooks
from megatron_direct.gradients.per_sample import GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import grid, passes
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import ParameterShard, parameter_shards

SKETCH_SIZE, SEED = 64, 5
MICRO_BATCH = MicroBatchLimits(5, 24)  # of 5, 4 and 3 of the 64 samples, so that shares are uneven
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
    chunks = models.build(Job(model, layout))
    shards = parameter_shards(chunks)
    fill_by_hash(shards)
    fill_expert_bias(chunks)
    samples = Samples([prefix], model.seq_length, VOCAB_SIZE)
    sketch = Sketch(shards, SKETCH_SIZE, SEED)
    rows, losses = {}, {}
    model = GradientModel(chunks, shards, sketch, micro_batch=MICRO_BATCH)
    for sketches, numbers, values in sketch_samples(model, samples, samples.usable):
        rows.update(zip(numbers.tolist(), sketches, strict=True))
        losses.update(zip(numbers.tolist(), values.tolist(), strict=True))
    space = ParameterSpace(shards)
    operator = FisherOperator(chunks, space, samples, samples.usable, MICRO_BATCH)
    vector = space.random_signs(3)
    of_vector = grid.sum_over_model(sketch.of_vector(space.split(vector), shards))
    return {"rows": rows, "losses": losses, "sketch of vector": of_vector.numpy(),
            "weights": pieces(shards, [s.parameter for s in shards]),
            "vector": pieces(shards, space.split(vector)),
            "product": pieces(shards, space.split(operator.matvec(vector))),
            "frozen": [s.name for s in shards if not s.parameter.requires_grad],
            "dimension": space.dimension}


def _hashes(axis: str, name: str, count: int, narrowed: bool) -> tuple[np.ndarray, np.ndarray]:
    """[count] buckets and signs by their definition: each block of k is permuted, or each of k / 16
    rotated."""
    size = SKETCH_SIZE // 16 if narrowed else SKETCH_SIZE
    signs = hashing.hash64(hashing.stream(SEED, f"{axis} sign", name), torch.arange(count)).numpy()
    blocks = np.arange(-(-count // size))
    seeds = hashing.hash64(hashing.stream(SEED, f"{axis} bucket", name), torch.from_numpy(blocks))
    orders = [(np.arange(size) + seed) % size if narrowed else
              np.argsort(hashing.hash64(seed, torch.arange(size)).numpy(), kind="stable")
              for seed in seeds.tolist()]
    return np.concatenate(orders)[:count], np.where(signs < 0, -1, 1)


def _sketch_entry_by_entry(matrices: dict[str, np.ndarray]) -> np.ndarray:
    """The definition: entry (r, c) goes to (h1(r) + h2(c)) mod k with sign s1(r) s2(c)."""
    total = np.zeros(SKETCH_SIZE)
    for name, matrix in matrices.items():
        (num_rows, num_columns), of_layer = matrix.shape, name.startswith("decoder.")
        narrowed = of_layer and min(matrix.shape) >= SKETCH_SIZE // 8
        rows, row_signs = _hashes("row", name, num_rows, narrowed and num_rows > num_columns)
        columns, column_signs = _hashes("column", name, num_columns,
                                        narrowed and num_rows <= num_columns)
        np.add.at(total, (rows[:, None] + columns) % SKETCH_SIZE,
                  matrix * row_signs[:, None] * column_signs)
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


# Experts live with tensor parallelism under sequence parallelism only, and so do latents.
_DENSE = LAYOUTS
_LATENT = [layout for layout in LAYOUTS if layout.tp == 1 or layout.sp]
_EXPERTS = [*_LATENT, Layout(dp=2, ep=2), Layout(tp=2, dp=2, ep=2, sp=True), Layout(dp=4, ep=2),
            Layout(pp=2, dp=2, ep=2)]
# Interleaved stages of hybrid models are new in 0.17.
_HYBRID = [layout for layout in _DENSE if layout.vp is None]
_HYBRID_EXPERTS = [layout for layout in _EXPERTS if layout.vp is None]
_FAMILIES = {
    "gpt2-tied": _DENSE, "gpt2-untied": _DENSE, "neox": _DENSE, "llama-tied": _DENSE,
    "llama-untied": _DENSE, "starcoder": [layout for layout in LAYOUTS if layout.tp == 1],
    "qwen3": _DENSE, "minicpm3": _LATENT, "mixtral": _EXPERTS, "qwen2-moe": _EXPERTS,
    "deepseek-v2-lite": _EXPERTS, "deepseek-v3": _EXPERTS,
    "hybrid-tied": _HYBRID, "hybrid-experts": _HYBRID_EXPERTS, "nemotron-h": _HYBRID,
    "hybrid-latent": [layout for layout in _LATENT if layout.vp is None],
}
# Each family on one rank, and where its layers are cut in a way that others' are not.
_DEFAULT = {
    *((name, Layout()) for name in _FAMILIES if name != "gpt2-untied"),
    *(("llama-tied", layout) for layout in LAYOUTS),
    ("gpt2-tied", Layout(tp=2, pp=2)), ("gpt2-tied", Layout(tp=2, sp=True)),
    ("neox", Layout(tp=2, pp=2)), ("starcoder", Layout(pp=2)), ("qwen3", Layout(tp=2)),
    ("qwen2-moe", Layout(dp=2, ep=2)), ("qwen2-moe", Layout(tp=2, dp=2, ep=2, sp=True)),
    ("deepseek-v3", Layout(dp=2, ep=2)), ("deepseek-v3", Layout(tp=2, sp=True)),
    ("hybrid-tied", Layout(tp=2, pp=2)), ("hybrid-experts", Layout(dp=2, ep=2)),
    ("nemotron-h", Layout(tp=2, sp=True)), ("nemotron-h", Layout(pp=2)),
}


def _cases():
    for name, layouts in _FAMILIES.items():
        for layout in [Layout(), *layouts]:
            marks = () if (name, layout) in _DEFAULT else pytest.mark.slow
            yield pytest.param(name, layout, id=f"{name}-{layout}", marks=marks)


@pytest.mark.parametrize(("name", "layout"), _cases())
def test_sketches_and_fisher_products(name, layout, prefix):
    if name == "hybrid-latent" and not has_hybrid_latent_layers():
        pytest.skip("hybrid models have latent attention since megatron-core 0.19")
    _check(on_layout(layout, _on_ranks, MODELS[name], prefix), name, prefix)


def _order_of_work(model, layout, prefix):
    """Passes as they begin, and their sums as they are waited for."""
    chunks = models.build(Job(model, layout))
    shards = parameter_shards(chunks)
    samples = Samples([prefix], model.seq_length, VOCAB_SIZE)
    gradients = GradientModel(chunks, shards, Sketch(shards, SKETCH_SIZE, SEED),
                              micro_batch=MICRO_BATCH)
    order = []
    run_pass, wait = passes.run_pass, grid.SumUnderWay.wait

    def passing(*arguments, **keywords):
        order.append("pass")
        return run_pass(*arguments, **keywords)

    def waiting(total):
        order.append("sum")
        return wait(total)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "run_pass", passing)
        patch.setattr(grid.SumUnderWay, "wait", waiting)
        for _ in sketch_samples(gradients, samples, samples.usable[:30]):
            pass
    return order


def test_a_passs_sums_are_waited_for_when_the_next_pass_is_done(prefix):
    for order in on_layout(Layout(tp=2), _order_of_work, MODELS["llama-tied"], prefix):
        num_passes = order.count("pass")
        assert num_passes > 2
        assert order == ["pass", *(num_passes - 1) * ["pass", "sum"], "sum"]


def _refuse_latent_layers(model, layout):
    with pytest.raises(UserError, match="has no latent attention .*Install 0.19 or later"):
        models.build(Job(model, layout))


def test_latent_attention_in_hybrid_models_is_refused_where_megatron_has_none():
    if has_hybrid_latent_layers():
        pytest.skip("this megatron-core has it")
    on_layout(Layout(), _refuse_latent_layers, MODELS["hybrid-latent"])


def _check(ranks, name, prefix):
    sketches, losses, plain, product, of_vector = _truth(name, prefix)
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


def _product_over_the_first_layer(model, layout, prefix):
    chunks = models.build(Job(model, layout))
    shards = parameter_shards(chunks)
    fill_by_hash(shards)
    space = ParameterSpace([s for s in shards if s.name.startswith("decoder.layers.0.")])
    samples = Samples([prefix], model.seq_length, VOCAB_SIZE)
    operator = FisherOperator(chunks, space, samples, samples.usable, MICRO_BATCH)
    product = operator.matvec(space.random_signs(3))
    return pieces(space.shards, space.split(product)), space.dot(product, product)


def test_a_pipeline_stage_without_any_of_the_parameters(prefix):
    model = MODELS["llama-tied"]
    one, = on_layout(Layout(), _product_over_the_first_layer, model, prefix)
    first, second = on_layout(Layout(pp=2), _product_over_the_first_layer, model, prefix)
    assert second[0] == [] and first[1] == second[1] == pytest.approx(one[1], rel=1e-5)
    expected, found = assemble([one[0]]), assemble([first[0], second[0]])
    assert expected.keys() == found.keys()
    for name, matrix in found.items():
        np.testing.assert_allclose(matrix, expected[name], atol=1e-5 * abs(expected[name]).max())


class _Stream:
    """Stands for a CUDA stream, where there is nothing to wait for."""

    def wait_stream(self, _other) -> None:
        pass

    def record_event(self) -> _Stream:
        return self

    def synchronize(self) -> None:
        pass


def _on_ranks_with_alltoall(model, layout, prefix):
    """The all-to-all dispatcher on the CPU: without streams, and with split sizes as gloo's."""
    from megatron.core.transformer.moe import token_dispatcher

    all_to_all = token_dispatcher.all_to_all

    def with_lists(group, tokens, *splits, **options):  # options: since 0.18
        return all_to_all(group, tokens, *(split.tolist() for split in splits), **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "current_stream", _Stream)
        patch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
        patch.setattr(token_dispatcher, "all_to_all", with_lists)
        layout = dataclasses.replace(layout, moe_token_dispatcher_type="alltoall")
        return _on_ranks(model, layout, prefix)


def test_tokens_dispatched_by_alltoall(prefix):
    layout = Layout(dp=2, ep=2)
    _check(on_layout(layout, _on_ranks_with_alltoall, MODELS["qwen2-moe"], prefix), "qwen2-moe",
           prefix)


def _with_a_layer_no_hook_knows(model, layout):
    chunks = models.build(Job(model, layout))
    chunks[0].decoder.extra = torch.nn.Conv1d(1, 1, 1)
    shards = parameter_shards(models.build(Job(model, layout)))
    odd = ParameterShard("decoder.extra.weight", chunks[0].decoder.extra.weight,
                         torch.arange(1), torch.arange(1), (1, 1), True, True)
    with PieceHooks(chunks, [*shards, odd], lambda *_: None):
        pass


def test_a_parameter_that_no_hook_covers_is_named():
    with pytest.raises(RankError, match="no gradient hook covers .*decoder.extra.weight"):
        on_layout(Layout(), _with_a_layer_no_hook_knows, MODELS["llama-tied"])
