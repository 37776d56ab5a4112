"""Products of every operator on Megatron models, in every layout, against plain torch.

The truth is ``PlainGPT`` under ordinary autograd, in double precision, on one process.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
import tiny_models
import torch
from plain_gpt import PlainGPT
from ranks import LAYOUTS, Layout, on_layout
from tiny_models import VOCAB_SIZE
from weights import assemble, fill_by_hash, pieces

from megatron_direct.config import Job, ModelConfig, ParallelConfig
from megatron_direct.curvature.fisher import FisherOperator
from megatron_direct.curvature.gauss_newton import GaussNewtonOperator
from megatron_direct.curvature.hessian import HessianOperator
from megatron_direct.curvature.krylov import SymmetricOperator
from megatron_direct.curvature.lanczos import leading_eigenpairs, residual_norms
from megatron_direct.curvature.symmetry import check_symmetry
from megatron_direct.curvature.thick_restart import Target
from megatron_direct.curvature.vectors import ParameterSpace
from megatron_direct.data.samples import MicroBatchLimits, PassShape, Samples
from megatron_direct.errors import UserError
from megatron_direct.mcore import dual_functions, grid
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import parameter_shards

OPERATORS = {"hessian": HessianOperator, "gauss-newton": GaussNewtonOperator}
ALL_OPERATORS = {**OPERATORS, "fisher": FisherOperator}
# Double precision rounds at 1e-16, sums of some thousand terms lose two or three digits; the bar
# leaves three more. Single precision likewise, from 6e-8.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}
MICRO_BATCH = MicroBatchLimits(3, 16)  # of 3, and of 2 of the longest
MODELS = {name: tiny_models.MODELS[name] for name in (
    "gpt2-tied", "gpt2-untied", "llama-tied", "llama-untied", "neox", "starcoder", "qwen3",
    "minicpm3", "hybrid-tied", "nemotron-h")}
# Small enough for the whole matrix: 1,192 parameters.
SMALL = dataclasses.replace(MODELS["llama-tied"], hidden_size=8, ffn_hidden_size=8,
                            make_vocab_size_divisible_by=16)


@functools.cache
def _documents() -> list[np.ndarray]:
    """Thirteen of uneven lengths, two of them cut: uneven shares, and padding."""
    generator = np.random.default_rng(0)
    return [generator.integers(0, VOCAB_SIZE, n) for n in (2, 3, 3, 4, 5, 6, 7, 8, 9, 9, 9, 12, 20)]


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    path = str(tmp_path_factory.mktemp("data") / "valid")
    builder = IndexedDatasetBuilder(path + ".bin", dtype=np.int32)
    for document in _documents():
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(path + ".idx")
    return path


def _build(model: ModelConfig, layout: ParallelConfig, prefix: str, dtype=torch.float64):
    chunks = models.build(Job(model, layout), spec="local", dtype=dtype)
    shards = parameter_shards(chunks)
    fill_by_hash(shards)
    return chunks, ParameterSpace(shards), Samples([prefix], model.seq_length, VOCAB_SIZE)


def _operator(kind: str, model, layout, prefix, micro_batch=MICRO_BATCH):
    chunks, space, samples = _build(model, layout, prefix)
    return OPERATORS[kind](chunks, space, samples, samples.usable, micro_batch)


def _plain(whole: dict[str, np.ndarray], model: ModelConfig):
    torch.set_num_threads(1)
    plain = PlainGPT(model, {name: matrix.shape for name, matrix in whole.items()})
    return plain, plain.flatten(whole)


def _truth(kind: str, plain: PlainGPT, weights: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    if kind == "fisher":
        gradients = torch.stack([torch.func.grad(plain.loss)(weights, [document])
                                 for document in _documents()])
        return gradients.T @ (gradients @ vector) / len(gradients)
    if kind == "hessian":
        return torch.autograd.functional.hvp(
            lambda w: plain.loss(w, _documents()), weights, vector)[1]
    logits = lambda w: torch.cat(plain.all_logits(w, _documents()))  # noqa: E731
    values, transpose = torch.func.vjp(logits, weights)
    _, tangent = torch.func.jvp(logits, (weights,), (vector,))
    p = torch.softmax(values, -1)
    through_loss = p * tangent - p * (p * tangent).sum(-1, keepdim=True)
    return transpose(through_loss / len(values))[0]


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


# --- every layout -----------------------------------------------------------------------------


def _losses_in_given_precision(patch: pytest.MonkeyPatch) -> None:
    """Megatron rounds logits to single precision for the loss, and with it the Fisher's products;
    the other operators have a cross entropy of their own."""
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy

    patch.setattr(VocabParallelCrossEntropy, "calculate_logits_max",
                  staticmethod(lambda logits: (logits.clone(), logits.amax(-1))))


def _products(model, layout, prefix):
    """This rank's weights and, for each precision and operator, products and their asymmetry."""
    found = {}
    for dtype in TOLERANCE:
        chunks, space, samples = _build(model, layout, prefix, dtype)
        u, v = space.random_signs(1), space.random_signs(2)
        for kind, operator in ALL_OPERATORS.items():
            # The second product of an exact operator takes up what the first has kept.
            room = () if kind == "fisher" else (1 << 30,)
            matvec = operator(chunks, space, samples, samples.usable, MICRO_BATCH,
                              *room).matvec
            with pytest.MonkeyPatch.context() as patch:
                _losses_in_given_precision(patch)
                hu, hv = matvec(u), matvec(v)
            scale = (space.dot(u, u) * space.dot(hv, hv)) ** 0.5
            found[kind, dtype] = (pieces(space.shards, space.split(hv)),
                                  abs(space.dot(u, hv) - space.dot(v, hu)) / scale)
        if dtype == torch.float64:
            found["weights"] = pieces(space.shards, [s.parameter for s in space.shards])
            found["vector"] = pieces(space.shards, space.split(v))
    return found


@functools.cache
def _expected(model: ModelConfig, prefix: str):
    """Weights, vector and true products, from one rank's weights and vector."""
    rank = on_layout(Layout(), _products, model, prefix)[0]
    plain, weights = _plain(assemble([rank["weights"]]), model)
    vector = plain.flatten(assemble([rank["vector"]]))
    return plain, weights, vector, {kind: _truth(kind, plain, weights, vector)
                                    for kind in ALL_OPERATORS}


_DEFAULT = (("llama-tied", Layout()), ("llama-tied", Layout(tp=2, pp=2)),
            ("llama-tied", Layout(dp=2)), ("llama-tied", Layout(pp=2, vp=1)),
            ("gpt2-untied", Layout()), ("gpt2-untied", Layout(pp=2)),
            ("gpt2-untied", Layout(tp=2, sp=True)), ("qwen3", Layout(tp=2)),
            ("minicpm3", Layout(tp=2, sp=True)), ("hybrid-tied", Layout(pp=2)),
            ("nemotron-h", Layout(tp=2, sp=True)))


def _grid():
    """Every layout and model; by default each layout with one or more of them, a GPT-2 in three,
    and norms of queries and latents where they are cut; the rest with the slow."""
    for layout in [Layout(), *LAYOUTS]:
        for name, model in MODELS.items():
            if layout.vp and model.hybrid_layer_pattern:
                continue  # new in megatron-core 0.17
            if layout.vp:  # two chunks of one layer on each of two stages
                model = dataclasses.replace(model, num_layers=4)
            if layout.tp > 1 and (name == "starcoder" or name == "minicpm3" and not layout.sp):
                continue  # refused: one key for all heads, latents without sequence parallelism
            default = (name, layout) in _DEFAULT
            slow = () if default else pytest.mark.slow
            yield pytest.param(layout, model, id=f"{layout}-{name}", marks=slow)


@pytest.mark.parametrize(("layout", "model"), _grid())
def test_products_match_plain_torch(layout, model, prefix):
    plain, weights, vector, truth = _expected(model, prefix)
    ranks = on_layout(layout, _products, model, prefix)
    whole = {key: plain.flatten(assemble([rank[key] for rank in ranks]))
             for key in ("weights", "vector")}
    assert torch.equal(whole["weights"], weights)
    assert torch.equal(whole["vector"], vector)
    for dtype, tolerance in TOLERANCE.items():
        for kind in ALL_OPERATORS:
            product = plain.flatten(assemble([rank[kind, dtype][0] for rank in ranks]))
            assert _error(product, truth[kind]) < tolerance, (kind, dtype)
            assert max(rank[kind, dtype][1] for rank in ranks) < tolerance, (kind, dtype)


# --- matrix products that are kept ---------------------------------------------------------------


def _with_room(model, layout, prefix, kind, rooms):
    """Products with two vectors, one after the other, by operators with so much room each; and
    how much of it they took."""
    chunks, space, samples = _build(model, layout, prefix, torch.float32)
    products, taken = [], []
    for room in rooms:
        operator = OPERATORS[kind](chunks, space, samples, samples.usable, MICRO_BATCH, room)
        products.append([operator.matvec(space.random_signs(seed)) for seed in (1, 2, 1)])
        taken.append(operator.kept.num_bytes)
    return products, taken


@pytest.mark.parametrize(("kind", "layout"), [
    ("hessian", Layout()), ("gauss-newton", Layout(pp=2, vp=1)),
    pytest.param("gauss-newton", Layout(), marks=pytest.mark.slow),
    pytest.param("hessian", Layout(tp=2, sp=True), marks=pytest.mark.slow),
    pytest.param("gauss-newton", Layout(tp=2, sp=True), marks=pytest.mark.slow),
    pytest.param("hessian", Layout(pp=2, vp=1), marks=pytest.mark.slow)], ids=str)
def test_kept_products_change_no_bit(kind, layout, prefix):
    model = dataclasses.replace(MODELS["llama-tied"], num_layers=4)
    plenty, little = 1 << 30, 10_000
    for products, taken in on_layout(layout, _with_room, model, prefix, kind, (0, little, plenty)):
        assert taken[0] == 0 < taken[1] <= little < taken[2] / 2
        for first, second, again in products:
            assert torch.equal(first, again) and not torch.equal(first, second)
            assert torch.equal(first, products[0][0]) and torch.equal(second, products[0][1])


# --- the whole matrix -------------------------------------------------------------------------


def _columns(model, layout, prefix, kind, picked):
    """Weights, and the products with the unit vectors that have their one in ``picked``."""
    operator = _operator(kind, model, layout, prefix)
    space = operator.space
    columns = []
    for index in picked:
        unit = torch.zeros(space.dimension, dtype=torch.float64)
        unit[index] = 1.0
        columns.append(pieces(space.shards, space.split(operator.matvec(unit))))
    return pieces(space.shards, [s.parameter for s in space.shards]), columns


def _leading(model, layout, prefix, kind, count):
    operator = _operator(kind, model, layout, prefix, micro_batch=MicroBatchLimits(8))
    space = operator.space
    found = leading_eigenpairs(SymmetricOperator(operator.matvec, space),
                               Target(count, tol=1e-7, max_matvecs=1000), space.random_signs(0))
    residuals = residual_norms(operator.matvec, found.eigenvalues, found.eigenvectors,
                               dot=space.dot)
    gram = space.inner_products(found.eigenvectors, found.eigenvectors)
    vectors = [pieces(space.shards, space.split(w)) for w in found.eigenvectors]
    return found.converged, found.eigenvalues, residuals, gram, vectors


@functools.cache
def _dense(kind: str, prefix: str):
    """The plain model and its matrix, by one product of autograd a column."""
    weights, _ = on_layout(Layout(), _columns, SMALL, prefix, kind, ())[0]
    plain, weights = _plain(assemble([weights]), SMALL)
    identity = torch.eye(len(weights), dtype=torch.float64)
    if kind == "hessian":
        gradient = torch.func.grad(lambda w: plain.loss(w, _documents()))
        return plain, torch.func.vmap(lambda v: torch.func.jvp(gradient, (weights,), (v,))[1],
                                      chunk_size=128)(identity)
    jacobian = torch.func.jacrev(
        lambda w: torch.cat(plain.all_logits(w, _documents())), chunk_size=256)(weights)
    with torch.no_grad():
        p = torch.softmax(torch.cat(plain.all_logits(weights, _documents())), -1)
        loss_hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
        return plain, torch.einsum("tvi,tvw,twj->ij", jacobian, loss_hessian, jacobian) / len(p)


@pytest.mark.parametrize("kind", [pytest.param("hessian", marks=pytest.mark.slow), "gauss-newton"])
def test_columns_of_the_matrix(kind, prefix):
    plain, matrix = _dense(kind, prefix)
    names = list(plain.shapes)
    picked = range(0, len(matrix), 29)
    _, columns = on_layout(Layout(), _columns, SMALL, prefix, kind, picked)[0]
    order = [name for name, *_ in columns[0]]
    # Positions of the flat local vector's entries in the plain model's order of names.
    numbers = dict(zip(names, torch.arange(len(matrix)).split(
        [rows * columns for rows, columns in plain.shapes.values()]), strict=True))
    positions = torch.cat([numbers[name] for name in order])
    found = torch.stack([plain.flatten(assemble([column])) for column in columns])
    assert _error(found, matrix[positions[list(picked)]]) < TOLERANCE[torch.float64]


@pytest.mark.parametrize(("kind", "layout"), [
    pytest.param("hessian", Layout(), marks=pytest.mark.slow),
    pytest.param("hessian", Layout(tp=2, pp=2), marks=pytest.mark.slow),
    ("gauss-newton", Layout()),
    pytest.param("gauss-newton", Layout(tp=2, pp=2), marks=pytest.mark.slow),
], ids=str)
def test_leading_eigenpairs(kind, layout, prefix):
    plain, matrix = _dense(kind, prefix)
    values, vectors = torch.linalg.eigh(matrix)
    norm = float(values.abs().max())  # of the Hessian here the negative edge
    values, vectors = values.flip(0)[:16], vectors.flip(1)[:, :16]
    ranks = on_layout(layout, _leading, SMALL, prefix, kind, 16)
    converged, found, residuals, gram, _ = ranks[0]
    assert converged
    np.testing.assert_allclose(found, values, rtol=1e-6)
    assert residuals.max() <= 1e-7 * norm
    np.testing.assert_allclose(gram, np.eye(16), atol=1e-10)
    basis = torch.stack([plain.flatten(assemble([rank[4][j] for rank in ranks]))
                         for j in range(16)])
    # The sum of squared cosines of the angles between the subspaces is 16 if they are the same.
    assert float((basis @ vectors).square().sum()) == pytest.approx(16, abs=1e-4)


@pytest.mark.slow
def test_gauss_newton_is_positive_semi_definite_and_the_hessian_is_not(prefix):
    """So the dense matrices that operators are held to are what they should be."""
    smallest = {kind: torch.linalg.eigvalsh(_dense(kind, prefix)[1]) for kind in OPERATORS}
    largest = float(smallest["gauss-newton"][-1])
    assert float(smallest["gauss-newton"][0]) > -1e-13 * largest
    assert float(smallest["hessian"][0]) < -1e-3 * largest


def test_central_differences_of_gradients_agree(prefix):
    plain, weights, vector, truth = _expected(MODELS["llama-tied"], prefix)
    gradient = torch.func.grad(lambda w: plain.loss(w, _documents()))
    # The error of step h is h^2 / 6 times the fourth derivative, plus rounding / h.
    step = 1e-4 / vector.norm()
    ahead, behind = gradient(weights + step * vector), gradient(weights - step * vector)
    difference = (ahead - behind) / (2 * step)
    assert _error(difference, truth["hessian"]) < 1e-6


# --- negative controls ------------------------------------------------------------------------


def _with_stock_functions(model, layout, prefix):
    operator = _operator("hessian", model, layout, prefix)
    with pytest.MonkeyPatch.context() as patch, \
            pytest.raises((RuntimeError, NotImplementedError)) as caught:
        patch.setattr(dual_functions, "_replacements", lambda chunks, rules: ())
        operator.matvec(operator.space.random_signs(2))
    return str(caught.value)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=str)
def test_stock_functions_have_no_tangents(layout, prefix):
    for message in on_layout(layout, _with_stock_functions, MODELS["llama-tied"], prefix):
        assert "forward" in message


def _double_backward(model, layout, prefix):
    """The product by ordinary double backward through Megatron's own functions."""
    chunks, space, samples = _build(model, layout, prefix)
    parameters = [shard.parameter for shard in space.shards]
    parts = space.split(space.random_signs(2))
    total = int(samples.num_labels.sum())
    product = [torch.zeros_like(parameter) for parameter in parameters]
    for (batch,) in samples.passes(samples.usable, PassShape(MICRO_BATCH)):
        losses = chunks[0](batch.tokens, batch.position_ids, None, labels=batch.labels)
        loss = (losses * batch.loss_mask).sum().double() / total
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        # Of replicated parameters each rank holds a copy, which counts once in <gradient, v>.
        slope = sum((g * v).sum() for g, v, shard in zip(gradient, parts, space.shards, strict=True)
                    if shard.owned)
        for sum_so_far, addend in zip(
                product, torch.autograd.grad(slope, parameters, allow_unused=True), strict=True):
            sum_so_far += 0 if addend is None else addend
    return pieces(space.shards, product)


def test_double_backward_through_stock_functions_is_wrong(prefix):
    plain, _, _, truth = _expected(MODELS["llama-tied"], prefix)
    ranks = on_layout(Layout(), _double_backward, MODELS["llama-tied"], prefix)
    assert _error(plain.flatten(assemble(ranks)), truth["hessian"]) > 0.1


def _without(name):
    """Replacements but one, which leaves Megatron's function in place, tangents passed through."""
    every = dual_functions._replacements

    def all_but_one(chunks, rules):
        for owner, attribute, replacement in every(chunks, rules):
            if attribute == name:
                yield owner, attribute, dual_functions._Applied(lambda tensor, *_: tensor)
            else:
                yield owner, attribute, replacement

    return all_but_one


def _with_copy_as_identity(model, layout, prefix):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dual_functions, "_replacements", _without("_CopyToModelParallelRegion"))
        operator = _operator("hessian", model, layout, prefix)
        space = operator.space
        product = operator.matvec(space.random_signs(2))
        with pytest.raises(UserError, match="not symmetric: .* largest for "):
            check_symmetry(operator.matvec, space)
    assert check_symmetry(operator.matvec, space) < 1e-12
    sharded = [s for s in space.shards if getattr(s.parameter, "tensor_model_parallel", False)]
    parts = {s.name: part for s, part in zip(space.shards, space.split(product), strict=True)}
    return pieces(sharded, [parts[s.name] for s in sharded])


def test_a_collective_without_its_transpose_is_wrong_and_not_symmetric(prefix):
    plain, _, _, truth = _expected(MODELS["llama-tied"], prefix)
    found = assemble(on_layout(Layout(tp=2), _with_copy_as_identity, MODELS["llama-tied"], prefix))
    expected = plain.unflatten(truth["hessian"])
    errors = [_error(torch.from_numpy(found[name]), expected[name]) for name in found]
    assert max(errors) > 0.1


# --- bad input, and what is left behind ---------------------------------------------------------


def _fail_within_a_product(model, layout, prefix):
    import torch.nn.functional as functional
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    def state():
        return (functional.layer_norm, mappings._CopyToModelParallelRegion,
                DotProductAttention.forward, operator._chunks[0].config.activation_func,
                [shard.parameter.grad for shard in operator.space.shards])

    operator = _operator("hessian", model, layout, prefix)
    before, vector = state(), operator.space.random_signs(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operator._chunks[0].decoder.layers[1], "forward", None)
        with pytest.raises(TypeError):
            operator.matvec(vector)
    assert state() == before
    again = operator.matvec(vector)
    assert torch.equal(again, operator.matvec(vector))
    assert state() == before


def test_functions_are_put_back_when_a_product_fails(prefix):
    on_layout(Layout(), _fail_within_a_product, SMALL, prefix)


def _poisoned(model, layout, prefix, kind):
    chunks, space, samples = _build(model, layout, prefix)
    operator = ALL_OPERATORS[kind](chunks, space, samples, samples.usable, MICRO_BATCH)
    token = _documents()[7][0]
    shard = next(s for s in operator.space.shards if "word_embeddings" in s.name)
    with torch.no_grad():
        shard.parameter[shard.rows == int(token)] = torch.inf
    with pytest.raises(UserError) as caught:
        operator.matvec(operator.space.random_signs(0))
    assert all(shard.parameter.requires_grad for shard in operator.space.shards)
    return str(caught.value)


@pytest.mark.parametrize(("kind", "layout"), [
    ("hessian", Layout()), ("hessian", Layout(tp=2)), ("fisher", Layout()),
    ("fisher", Layout(tp=2))], ids=str)
def test_a_loss_that_is_not_finite_names_the_sample(kind, layout, prefix):
    token = _documents()[7][0]
    holders = [i for i, d in enumerate(_documents()) if token in d[:8][:max(len(d) - 1, 0)]]
    what = ", or its derivative, is" if kind == "hessian" else " is"
    for message in on_layout(layout, _poisoned, MODELS["gpt2-untied"], prefix, kind):
        assert message.startswith(
            tuple(f"the loss of validation sample {i}{what} not finite" for i in holders))


def _refusals(model, layout, prefix):
    chunks, space, samples = _build(model, layout, prefix)
    with pytest.raises(UserError, match="holds no samples.*--valid-data-path"):
        HessianOperator(chunks, space, samples, np.empty(0, np.int64), MicroBatchLimits(1))
    for field, value, match in (
            ("hidden_dropout", 0.1, "--hidden-dropout 0"),
            ("attention_dropout", 0.1, "--attention-dropout 0"),
            ("masked_softmax_fusion", True, "--no-masked-softmax-fusion"),
            ("bias_dropout_fusion", True, "--no-bias-dropout-fusion"),
            ("gradient_accumulation_fusion", True, "--no-gradient-accumulation-fusion"),
            ("cross_entropy_loss_fusion", True, "--cross-entropy-loss-fusion"),
            ("recompute_granularity", "full", "--recompute-granularity"),
            ("fp8", "hybrid", "--fp8-format")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks[0].config, field, value)
            for operator in OPERATORS.values():
                with pytest.raises(UserError, match=match):
                    operator(chunks, space, samples, samples.usable, MicroBatchLimits(1))
    for attribute, value, match in (
            ("layer_spec", dataclasses.replace(chunks[0].layer_spec, exact_products=False),
             "built from a spec without exact second derivatives.*--transformer-impl local"),
            ("foreign_norm", type("FusedNorm", (torch.nn.Module,), {"__module__": "apex.norms"})(),
             "has layers of apex.*--transformer-impl local"),
            ("wrapper", type("TENorm", (torch.nn.Module,), {
                "__module__": "megatron.core.extensions.transformer_engine"})(),
             "has layers of transformer_engine.*--curvature fisher")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks[0], attribute, value, raising=False)
            with pytest.raises(UserError, match=match):
                HessianOperator(chunks, space, samples, samples.usable, MicroBatchLimits(1))
    chunks[0].bfloat16()
    with pytest.raises(UserError, match="float32, but some are torch.bfloat16.*--bf16"):
        HessianOperator(chunks, space, samples, samples.usable, MicroBatchLimits(1))
    chunks[0].float().requires_grad_(False)
    with pytest.raises(UserError, match="some are frozen"):
        HessianOperator(chunks, space, samples, samples.usable, MicroBatchLimits(1))


def test_settings_without_exact_products_are_refused(prefix):
    on_layout(Layout(), _refusals, SMALL, prefix)


def _summed_in_parts(model, layout, prefix):
    chunks, space, samples = _build(model, layout, prefix)
    vector = space.random_signs(0)
    numbers = samples.usable
    first, second = (HessianOperator(chunks, space, samples, part, MicroBatchLimits(3))
                     for part in (numbers[:5], numbers[5:]))
    whole = HessianOperator(chunks, space, samples, numbers, MicroBatchLimits(4))
    assert whole.num_tokens == first.num_tokens + second.num_tokens
    parts = (first.num_tokens * first.matvec(vector) + second.num_tokens * second.matvec(vector))
    return _error(parts / whole.num_tokens, whole.matvec(vector)), grid.data_size()


def test_the_average_is_over_tokens_whatever_the_micro_batches(prefix):
    for error, _ in on_layout(Layout(dp=2), _summed_in_parts, SMALL, prefix):
        assert error < 1e-12
