"""bfloat16 as Megatron trains with it: gradients near float32's, training that resumes exactly."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from indexed_files import random_documents, write_dataset
from ranks import Layout, on_layout
from scipy.stats import spearmanr
from tiny_models import MODELS, VOCAB_SIZE
from weights import fill_by_hash

from megatron_direct import solve_selection
from megatron_direct.config import BatchConfig, Job, ModelConfig, OptimizerConfig, Precision
from megatron_direct.curvature.fisher import FisherOperator
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.hooks import PieceHooks
from megatron_direct.gradients.per_sample import GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import checkpoint, passes, training, training_folder
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import parameter_shards
from megatron_direct.mcore.specs import local
from megatron_direct.steps.curvature_config import CurvatureConfig, require_precision

BF16, FP32 = Precision(bf16=True), Precision()
# Wide enough that sums have some terms: rounding of a unit in 2^9 averages out in them.
MODEL = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, num_query_groups=2,
                    ffn_hidden_size=96, vocab_size=VOCAB_SIZE, seq_length=32,
                    make_vocab_size_divisible_by=32)
EXPERTS = dataclasses.replace(MODEL, num_experts=4, moe_ffn_hidden_size=48,
                              untie_embeddings_and_output_weights=True)
_LAYOUTS = [Layout(), Layout(tp=2, pp=2), Layout(dp=2), Layout(tp=2, sp=True),
            *(pytest.param(layout, marks=pytest.mark.slow)
              for layout in (Layout(tp=2), Layout(pp=2, vp=1)))]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "pool",
                         random_documents(96, VOCAB_SIZE, seed=1, longest=33))


# --- gradients --------------------------------------------------------------------------------


def _rows(model, layout, prefix, precision) -> dict[int, np.ndarray]:
    chunks = models.build(Job(model, layout, precision=precision))
    shards = parameter_shards(chunks)
    fill_by_hash(shards, scale=0.1)
    samples = Samples([prefix], model.seq_length, VOCAB_SIZE)
    gradients = GradientModel(chunks, shards, Sketch(shards, 512, 5),
                              micro_batch=MicroBatchLimits(4))
    return {number: row for rows, numbers, _ in sketch_samples(gradients, samples, samples.usable)
            for number, row in zip(numbers.tolist(), rows, strict=True)}


def _rows_in(layout, prefix, precision, model=MODEL) -> np.ndarray:
    found: dict[int, np.ndarray] = {}
    for rows in on_layout(layout, _rows, model, prefix, precision):
        found |= rows
    return np.stack([found[number] for number in sorted(found)])


def _errors(rows: np.ndarray, exact: np.ndarray) -> np.ndarray:
    return np.linalg.norm(rows - exact, axis=1) / np.linalg.norm(exact, axis=1)


@pytest.fixture(scope="module")
def exact(prefix) -> np.ndarray:
    return _rows_in(Layout(), prefix, FP32)


def _cosines(rows: np.ndarray) -> np.ndarray:
    mean = rows.mean(0)
    return rows @ mean / (np.linalg.norm(rows, axis=1) * np.linalg.norm(mean))


def _selected(rows: np.ndarray) -> np.ndarray:
    found = solve_selection(rows.T.astype(np.float64), np.zeros(len(rows)), len(rows) // 4,
                            stiff_budget=1.0, objective="alignment",
                            target=rows.mean(0).astype(np.float64))
    return found.indices


@pytest.mark.parametrize("layout", _LAYOUTS, ids=str)
def test_rows_are_those_of_float32_to_rounding(layout, prefix, exact):
    """bfloat16 keeps 8 bits: 0.4 % a rounding, of which a sum averages most away."""
    rows = _rows_in(layout, prefix, BF16)
    assert rows.dtype == np.float32
    assert 1e-4 < _errors(rows, exact).max() < 0.02
    assert spearmanr(_cosines(rows), _cosines(exact)).statistic >= 0.999
    # Samples next to the margin may change places: their scores are nearer than rounding.
    assert len(np.intersect1d(_selected(rows), _selected(exact))) >= len(exact) // 4 - 1


@pytest.fixture(scope="module")
def exact_of_experts(prefix) -> np.ndarray:
    return _rows_in(Layout(), prefix, FP32, EXPERTS)


@pytest.mark.parametrize("router", [None, "fp32"])
@pytest.mark.parametrize("layout", [
    Layout(dp=2, ep=2),
    pytest.param(Layout(tp=2, dp=2, ep=2, sp=True), marks=pytest.mark.slow)], ids=str)
def test_rows_of_experts_are_those_of_float32_but_for_tokens_between_two(
        layout, router, prefix, exact_of_experts):
    """A token whose second and third expert are nearly equal may go to the other one: that moves
    the rows of a fifth of the samples by up to 0.13, on one rank as well, and the rest by
    rounding."""
    model = dataclasses.replace(EXPERTS, moe_router_dtype=router)
    rows = _rows_in(layout, prefix, BF16, model)
    errors = _errors(rows, exact_of_experts)
    assert 1e-4 < np.median(errors) < 0.02 and np.mean(errors < 0.02) > 0.7
    assert errors.max() < 0.3
    assert spearmanr(_cosines(rows), _cosines(exact_of_experts)).statistic >= 0.998


@pytest.mark.parametrize("name", [None, "fp32", "fp64"])
def test_logits_have_the_precision_that_the_router_was_trained_with(name, monkeypatch):
    """To the last bit those of Megatron's own function, which its router calls on a GPU alone; so
    are the gradients."""
    from megatron.core.transformer.moe import moe_utils

    # Without Transformer Engine it does not come to be asked for.
    monkeypatch.setattr(moe_utils, "te_general_gemm", None, raising=False)
    dtype = {None: torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}[name]
    generator = torch.Generator().manual_seed(0)
    found = []
    weight, inputs = (torch.randn(shape, generator=generator).bfloat16()
                      for shape in ((8, 64), (5, 2, 64)))
    for ours in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (inputs, weight)]
        router = SimpleNamespace(config=SimpleNamespace(moe_router_dtype=name), bias=None,
                                 weight=leaves[1])
        logits = local.router_class().gating(router, leaves[0]) if ours else \
            moe_utils.router_gating_linear(*leaves, None, dtype)
        assert logits.dtype == dtype
        logits.square().sum().backward()
        found.append([logits.detach(), *(leaf.grad for leaf in leaves)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def _pieces_and_product(model, layout, prefix):
    chunks = models.build(Job(model, layout, precision=BF16))
    shards = parameter_shards(chunks)
    fill_by_hash(shards, scale=0.1)
    samples = Samples([prefix], model.seq_length, VOCAB_SIZE)
    batch = next(passes.of_samples(chunks, samples, samples.usable, MicroBatchLimits(4)))
    seen = {}
    for dtype in (None, torch.float32):
        seen[dtype] = found = []

        def add(_micro_batch, _shard, piece, found=found):
            found.append({value.dtype for value in vars(piece).values()
                          if torch.is_tensor(value) and value.is_floating_point()})

        with PieceHooks(chunks, shards, add, dtype) as hooks:
            losses = passes.run_pass(chunks, batch, backward=True, before_forward=hooks.begin)
    space = ParameterSpace(shards)
    vector = space.random_signs(3)
    product = FisherOperator(chunks, space, samples, samples.usable,
                             MicroBatchLimits(4)).matvec(vector)
    return seen, losses.dtype, vector.dtype, product.dtype


def test_losses_and_vectors_are_in_float32_and_pieces_as_asked_for(prefix):
    (seen, losses, vector, product), = on_layout(Layout(), _pieces_and_product, MODEL, prefix)
    assert losses == vector == product == torch.float32
    assert {torch.bfloat16} in seen[None]
    assert all(dtypes == {torch.float32} for dtypes in seen[torch.float32])


# --- training ---------------------------------------------------------------------------------


def _sequences(count: int, length: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB_SIZE, (count, length + 1), generator=generator)
    return [{"tokens": row[:-1], "labels": row[1:], "loss_mask": torch.ones(length),
             "position_ids": torch.arange(length)} for row in tokens]


_BATCH = BatchConfig(micro_batch_size=2, global_batch_size=8)


def _trainer(model, layout, precision, distributed):
    chunks = models.build(Job(model, layout, precision=precision), seed=3)
    return training.make_trainer(chunks, OptimizerConfig(
        lr=1e-2, lr_warmup_iters=1, use_distributed_optimizer=distributed), _BATCH)


def _train(trainer, model, iterations) -> list[tuple[float, float | None]]:
    steps = []
    first = (iterations.start - 1) * _BATCH.global_batch_size
    training.train(trainer, training.Feed(_sequences(48, model.seq_length), _BATCH, first),
                   iterations, "train", steps.append)
    return [(step.loss, step.grad_norm) for step in steps]


def _main_parameters(trainer) -> list[np.ndarray]:
    parts = getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer])
    return [p.detach().numpy().copy() for part in parts
            for group in part.optimizer.param_groups for p in group["params"]]


def _train_save_and_resume(model, layout, folder, precision, distributed):
    trainer = _trainer(model, layout, precision, distributed)
    _train(trainer, model, range(1, 4))
    checkpoint.save(folder, 3, trainer.chunks, trainer.optimizer, trainer.scheduler,
                    {**vars(model), **vars(precision)})
    unbroken = _train(trainer, model, range(4, 7))
    resumed = _trainer(model, layout, precision, distributed)
    newest = training_folder.latest(folder)
    assert checkpoint.load_training(newest, resumed.chunks, resumed.optimizer,
                                    resumed.scheduler) == 3
    dtypes = {p.dtype for chunk in resumed.chunks for p in chunk.parameters()}
    return unbroken, _train(resumed, model, range(4, 7)), dtypes, \
        [m.dtype for m in _main_parameters(resumed)], \
        all(np.array_equal(a, b) for a, b in zip(*map(_main_parameters, (trainer, resumed)),
                                                 strict=True))


@pytest.mark.parametrize(("layout", "distributed"), [
    (Layout(), False), pytest.param(Layout(tp=2, pp=2), False, marks=pytest.mark.slow),
    (Layout(dp=2), True),
    pytest.param(Layout(tp=2, sp=True), False, marks=pytest.mark.slow),
    pytest.param(Layout(pp=2, vp=1), True, marks=pytest.mark.slow)], ids=str)
def test_training_in_bf16_resumes_exactly(layout, distributed, tmp_path):
    for unbroken, resumed, dtypes, main_dtypes, same in on_layout(
            layout, _train_save_and_resume, MODEL, str(tmp_path), BF16, distributed):
        assert resumed == unbroken
        assert dtypes == {torch.bfloat16} and set(main_dtypes) == {np.dtype(np.float32)}
        assert same, "the main parameters, which are finer than the weights, went on as they were"


def test_experts_train_and_resume_in_bf16(tmp_path):
    layout, model = Layout(dp=2, ep=2), MODELS["deepseek-v3"]
    for unbroken, resumed, *_ in on_layout(layout, _train_save_and_resume, model, str(tmp_path),
                                           BF16, False):
        assert resumed == unbroken


def _save(model, layout, folder, precision):
    trainer = _trainer(model, layout, precision, distributed=False)
    _train(trainer, model, range(1, 3))
    checkpoint.save(folder, 2, trainer.chunks, trainer.optimizer, trainer.scheduler,
                    {**vars(model), **vars(precision)})
    return _main_parameters(trainer), _train(trainer, model, range(3, 4))


def _load(model, layout, folder, precision):
    found = checkpoint.open_checkpoint(folder)
    trainer = _trainer(model, layout, precision, distributed=False)
    checkpoint.load_training(found.path, trainer.chunks, trainer.optimizer, trainer.scheduler)
    return found.settings(Precision, {}), _main_parameters(trainer), \
        _train(trainer, model, range(3, 4))


@pytest.mark.parametrize(("saved", "loaded"), [(FP32, BF16), (BF16, FP32)], ids=str)
def test_a_checkpoint_goes_on_in_the_other_precision(saved, loaded, tmp_path):
    (before, (expected,)), = on_layout(Layout(), _save, MODEL, str(tmp_path), saved)
    (carried, after, (found,)), = on_layout(Layout(), _load, MODEL, str(tmp_path), loaded)
    assert carried == saved, "the default is the checkpoint's own"
    for a, b in zip(before, after, strict=True):
        # Weights in float32 are the main parameters; those of bfloat16 are main ones, rounded.
        np.testing.assert_allclose(a, b, rtol=0 if saved == FP32 else 2**-8, atol=1e-30)
    # The two precisions differ by 7e-5 here, and a model that loaded nothing by 1.4e-2.
    np.testing.assert_allclose(found, expected, rtol=1e-3)


# --- what needs float32 -----------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["hessian", "gauss-newton"])
def test_exact_products_are_refused_in_bf16(curvature):
    with pytest.raises(UserError, match=f"--curvature {curvature} needs float32.*--no-bf16"):
        require_precision(CurvatureConfig(curvature=curvature), BF16)
    require_precision(CurvatureConfig(curvature=curvature), FP32)


@pytest.mark.parametrize("curvature", ["fisher", "sketched-fisher"])
def test_fisher_products_run_in_bf16(curvature):
    require_precision(CurvatureConfig(curvature=curvature), BF16)
