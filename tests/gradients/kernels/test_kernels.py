"""Every kernel computes the sketch by its definition, and the choice among them.

The truth is made in double precision from the gradients themselves, one entry at a time.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_direct.gradients.hashes import Hashes
from megatron_direct.gradients.kernels import (
    KERNELS,
    cheapest,
    costs,
    frames,
    kept_axis,
    segments,
)
from megatron_direct.gradients.kernels.entries import ByEntries, sketches
from megatron_direct.gradients.kernels.frames import ByFrames
from megatron_direct.gradients.kernels.kept_axis import ByKeptAxis
from megatron_direct.gradients.kernels.kernel import Work
from megatron_direct.gradients.kernels.spectra import BySpectra
from megatron_direct.gradients.pieces import Entries, OuterProducts, RoutedOuterProducts, RowSums
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore.shards import ParameterShard

SIZE = 32
# float32 products and sums of some hundred terms round to less than this part of a sketch's norm.
ROUNDING = 2e-6
CPU = torch.device("cpu")
_FLOATS = (torch.float32, torch.bfloat16)


def _shard(outputs, inputs, name="w", of_vocabulary=False, device="cpu"):
    return ParameterShard(name, torch.nn.Parameter(torch.zeros(outputs, inputs, device=device)),
                          torch.arange(outputs, device=device), torch.arange(inputs, device=device),
                          (outputs, inputs), True, True, of_vocabulary=of_vocabulary)


def _hashes(outputs, inputs, name="w", narrowed=False) -> Hashes:
    hashes = Hashes.draw(_shard(outputs, inputs, name, of_vocabulary=not narrowed), SIZE, seed=3)
    assert (hashes.narrowed is not None) == narrowed
    return hashes


def _truth(matrices, hashes: Hashes, size: int = SIZE) -> np.ndarray:
    """[n, k] of matrices [n, rows, columns]: each entry, times its signs, at its coordinate."""
    sums = np.zeros((len(matrices), size))
    rows, columns = hashes.rows, hashes.columns
    coordinates = (rows.buckets[:, None] + columns.buckets).numpy() % size
    signs = (rows.signs[:, None] * columns.signs).numpy()
    for total, matrix in zip(sums, matrices.double().numpy(), strict=True):
        np.add.at(total, coordinates, matrix * signs)
    return sums


def _in_double(piece):
    def double(value):
        return value.double() if getattr(value, "dtype", None) in _FLOATS else value

    return type(piece)(**{name: double(value) for name, value in vars(piece).items()}).matrices()


def _pieces(outputs, inputs, tokens, dtype=torch.float32) -> dict:
    """Of 5 samples, one of them without any token of the routed piece."""
    generator = torch.Generator().manual_seed(2)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    routed = 3 * tokens
    owners = torch.randint(0, 4, (routed,), generator=generator)
    return {
        "dense": OuterProducts(draw(tokens, 5, inputs), draw(tokens, 5, outputs)),
        "routed": RoutedOuterProducts(draw(routed, inputs), draw(routed, outputs), owners, 5),
        "lookup": RowSums(torch.randint(0, outputs, (tokens, 5), generator=generator),
                          torch.rand(tokens, 5, generator=generator) < 0.7,
                          draw(tokens, 5, inputs), outputs),
    }


def _taken(kind, outputs, inputs, tokens, dtype=torch.float32):
    """(a name, a piece, its hashes) of all that a kernel takes on a CPU: narrowed, and not."""
    for narrowed in (False, True):
        hashes = _hashes(outputs, inputs, narrowed=narrowed)
        for name, piece in _pieces(outputs, inputs, tokens, dtype).items():
            if kind.takes(piece, hashes, "cpu"):
                yield f"{name}, {narrowed = }", piece, hashes


def _error(found, truth):
    return np.linalg.norm(found.double().numpy() - truth) / np.linalg.norm(truth)


@pytest.fixture(params=[*(kernel.name for kernel in KERNELS), "frames, buffered",
                        "kept axis, as on a GPU"])
def kind(request, monkeypatch):
    """Each kernel, and what some of them do on a GPU."""
    name, *other_way = request.param.split(", ")
    if other_way == ["buffered"]:
        monkeypatch.setattr(frames, "BUFFERED_TOKENS", {"cpu": 50, "cuda": 50})
    elif other_way:
        monkeypatch.setattr(kept_axis, "_count_sketch", lambda axis, values: (
            kept_axis.count_sketch_by_product(axis, values) if values.dtype == torch.bfloat16
            else axis.count_sketch(values)))
    return next(kernel for kernel in KERNELS if kernel.name == name)


# Axes below, at and above k = 32, and of several blocks; one token, fewer and more than the buffer.
SHAPES = [(12, 7, 9), (32, 32, 5), (50, 41, 3), (5, 64, 20), (100, 32, 70), (7, 90, 1)]


@pytest.mark.parametrize(("outputs", "inputs", "tokens"), SHAPES)
def test_a_kernel_computes_the_sketch(kind, outputs, inputs, tokens):
    for name, piece, hashes in _taken(kind, outputs, inputs, tokens):
        kernel = kind(5, SIZE, CPU)
        kernel.add(0, piece, hashes)
        assert _error(kernel.total(), _truth(_in_double(piece), hashes)) < ROUNDING, name


@pytest.mark.parametrize(("outputs", "inputs", "tokens"), SHAPES)
def test_layers_and_micro_batches_add_up(kind, outputs, inputs, tokens):
    """Several layers, in two micro-batches that come in turns, as in an interleaved pipeline."""
    kernel = kind(12, SIZE, CPU)
    truth = np.zeros((12, SIZE))
    layers = [_hashes(outputs, inputs, name, narrowed)
              for name, narrowed in (("a", kind is ByKeptAxis), ("b", True), ("c", False))]
    for first, hashes in ((0, layers[0]), (0, layers[1]), (6, layers[0]), (0, layers[2]),
                          (6, layers[1]), (6, layers[2])):
        for piece in _pieces(outputs, inputs, tokens).values():
            if not kind.takes(piece, hashes, "cpu"):
                continue
            kernel.add(first, piece, hashes)
            truth[first: first + 5] += _truth(_in_double(piece), hashes)
    assert _error(kernel.total(), truth) < ROUNDING
    assert _error(kernel.total(), truth) < ROUNDING, "asked for twice"


def test_pieces_of_a_part_of_the_samples(kind):
    """With expert parallelism a dense piece has some of the samples of a routed one."""
    truth = np.zeros((11, SIZE))
    kernel = kind(11, SIZE, CPU)
    generator = torch.Generator().manual_seed(0)
    for first, count in ((4, 2), (1, 10), (4, 2), (6, 2), (1, 10)):
        piece = OuterProducts(torch.randn(6, count, 20, generator=generator),
                              torch.randn(6, count, 30, generator=generator))
        hashes = _hashes(30, 20, narrowed=kind is ByKeptAxis)
        kernel.add(first, piece, hashes)
        truth[first: first + count] += _truth(_in_double(piece), hashes)
    assert _error(kernel.total(), truth) < ROUNDING


def test_bfloat16_pieces(kind):
    """Against the same numbers in double precision.

    Rounding a factor's count sketch to bfloat16 errs by up to 2^-8 of it, by 0.16 % in the root
    mean square: both factors together by 0.23 % of a sketch. The bar is 1 %.
    """
    for name, piece, hashes in _taken(kind, 60, 40, 30, torch.bfloat16):
        kernel = kind(5, SIZE, CPU)
        kernel.add(0, piece, hashes)
        total = kernel.total()
        assert total.dtype == torch.float32
        assert _error(total, _truth(_in_double(piece), hashes)) < (
            0.01 if kind in (ByFrames, ByKeptAxis) else ROUNDING), name


def test_pieces_of_two_dtypes_are_not_rounded():
    """The gradients of a router come in float32, its inputs in bfloat16."""
    piece = _pieces(8, 40, 30, torch.bfloat16)["dense"]
    piece = OuterProducts(piece.inputs, piece.output_grads.float() + 1e-4)
    for kind, narrowed in ((ByFrames, False), (ByKeptAxis, True)):
        hashes, kernel = _hashes(8, 40, narrowed=narrowed), kind(5, SIZE, CPU)
        kernel.add(0, piece, hashes)
        assert _error(kernel.total(), _truth(_in_double(piece), hashes)) < ROUNDING


@pytest.mark.parametrize("narrowed", [False, True])
def test_entries_by_gathers(narrowed, monkeypatch):
    """What is done on a GPU, where additions at a coordinate have no order."""
    scale = torch.rand(40, 33, generator=torch.Generator().manual_seed(1))
    hashes = _hashes(40, 33, narrowed=narrowed)
    pieces = _pieces(40, 33, 9)
    for name in ("dense", "routed"):
        kernel = ByEntries(5, SIZE, CPU)
        monkeypatch.setattr(kernel, "_gathers", True)
        kernel.add(0, pieces[name], hashes, scale)
        truth = _truth(_in_double(pieces[name]) * scale.double(), hashes)
        assert _error(kernel.total(), truth) < ROUNDING, name
    matrices = pieces["dense"].matrices()
    assert _error(sketches(matrices, hashes), _truth(matrices, hashes)) < ROUNDING


def test_vectors_and_scales():
    generator = torch.Generator().manual_seed(4)
    vector, matrix = _shard(50, 1, "b"), _shard(40, 33)
    scales = {name: torch.rand(shape, generator=generator)
              for name, shape in (("b", (50,)), ("w", (40, 33)))}
    grads = Entries(torch.randn(5, 50, generator=generator))
    sketch = Sketch([vector, matrix], SIZE, 3, scales)
    truth = _truth(grads.matrices() * scales["b"][:, None], Hashes.draw(vector, SIZE, 3))
    assert _error(sketch.of_piece(vector, grads), truth) < ROUNDING
    for name, piece in _pieces(40, 33, 9).items():
        truth = _truth(_in_double(piece) * scales["w"].double(), Hashes.draw(matrix, SIZE, 3))
        assert _error(sketch.of_piece(matrix, piece), truth) < ROUNDING, name


@pytest.mark.parametrize("of_factors", [BySpectra, ByFrames, ByKeptAxis],
                         ids=lambda kind: kind.name)
def test_factors_refuse_a_scale(of_factors):
    assert not of_factors.applies_scale and ByEntries.applies_scale
    piece, scale = _pieces(40, 33, 9)["dense"], torch.ones(40, 33)
    with pytest.raises(AssertionError, match="cannot be scaled"):
        of_factors(5, SIZE, CPU).add(0, piece, _hashes(40, 33), scale)


def test_what_is_not_finite_stays_with_its_sample(kind):
    for name, piece, hashes in _taken(kind, 40, 20, 9):
        routed = isinstance(piece, RoutedOuterProducts)
        for value in (float("nan"), float("inf")):
            grads = piece.output_grads.clone()
            spoilt = piece.samples == 2 if routed else (slice(None), 2)
            grads[spoilt] = value
            kernel = kind(5, SIZE, CPU)
            kernel.add(0, dataclasses.replace(piece, output_grads=grads), hashes)
            finite = kernel.total().isfinite().all(1)
            assert finite.tolist() == [True, True, False, True, True], name


class _NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a GPU, or take a shape from its numbers."""

    _WAITS = ("_local_scalar_dense", "item", "nonzero", "unique", "_unique2", "masked_select",
              "bincount", "is_nonzero", "equal", "repeat_interleave")

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        assert function.overloadpacket.__name__ not in self._WAITS, function
        return function(*arguments, **(keywords or {}))


def test_no_pass_waits_for_the_device(kind, monkeypatch):
    monkeypatch.setattr(segments, "_segment_sums", segments._reduced)  # as on a GPU
    vector, taken = _hashes(40, 1), list(_taken(kind, 40, 20, 9))
    with pytest.raises(AssertionError), _NoWaiting():
        taken[0][1].inputs.sum().item()
    for _, piece, hashes in taken:  # tables are made
        kind(5, SIZE, CPU).add(0, piece, hashes)
    kernel = kind(5, SIZE, CPU)
    with _NoWaiting():
        for _, piece, hashes in taken:
            kernel.add(0, piece, hashes)
        if kind is ByEntries:
            kernel.add(0, Entries(torch.ones(5, 40)), vector)
        kernel.total()


def test_the_choice_depends_on_shapes():
    """On a CPU it is clear which is the fastest for layers far from each other in width."""
    narrow, wide = _shard(128, 128), _shard(2816, 512)
    vocabulary = _shard(8192, 512, of_vocabulary=True)
    for shard, expected in ((narrow, ByEntries), (wide, ByKeptAxis), (vocabulary, BySpectra)):
        hashes = Hashes.draw(shard, 2048, 3)
        piece = _pieces(len(shard.rows), len(shard.columns), 64)["dense"]
        assert cheapest(piece, hashes, "cpu", scaled=False) is expected
        assert cheapest(piece, hashes, "cpu", scaled=True) is ByEntries
        vector = Entries(torch.ones(5, len(shard.rows)))
        for device_type in ("cpu", "cuda"):
            assert cheapest(vector, hashes, device_type, scaled=False) is ByEntries


def test_what_a_gpu_is_expected_to_choose():
    """Its products are so fast that they win wherever there is enough to multiply."""
    table = costs.of("cuda")
    for outputs, inputs, tokens, samples in ((3072, 1024, 1024, 8), (1024, 2752, 1024, 8),
                                             (28672, 4096, 4096, 2)):
        buckets = (128, 2048) if outputs > inputs else (2048, 128)
        work = Work(tokens, outputs, inputs, *buckets, 2048, samples, "cuda", bf16=True)
        assert ByKeptAxis.cost(work, table) < ByEntries.cost(work, table)
    work = Work(1024, 50304, 1024, 2048, 2048, 2048, 8, "cuda", bf16=True)
    assert min(KERNELS, key=lambda kind: kind.cost(work, table)) is ByFrames
    lookup = _pieces(40, 20, 9)["lookup"]
    assert cheapest(lookup, _hashes(40, 20), "cuda", scaled=False) is not ByEntries, "in no order"


def test_a_kernel_that_is_not_used_takes_no_memory():
    shard, piece = _shard(16, 8), _pieces(16, 8, 9)["dense"]
    sums = Sketch([shard], SIZE, 3).sums(5, CPU)
    assert not sums._kernels and not sums.total().any()
    sums.add(shard, piece, 0)
    assert list(sums._kernels) == [
        cheapest(piece, _hashes(16, 8, narrowed=True), "cpu", scaled=False)]


def test_an_expert_without_tokens():
    shard = _shard(16, 8)
    piece = RoutedOuterProducts(torch.empty(0, 8), torch.empty(0, 16),
                                torch.empty(0, dtype=torch.int64), 5)
    for scales in (None, {"w": torch.ones(16, 8)}):
        found = Sketch([shard], SIZE, 3, scales).of_piece(shard, piece)
        assert found.shape == (5, SIZE) and not found.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "narrowed"), [(400, False), (200, True), (900, True)])
def test_on_a_gpu(kind, inputs, narrowed, dtype):
    """The same sketches, the same bytes every time, and no waiting."""
    size, named = 256, {"of_vocabulary": not narrowed}
    shard = _shard(600, inputs, **named)
    gpu_hashes = Hashes.draw(_shard(600, inputs, device="cuda", **named), size, 3)
    for name, piece in _pieces(600, inputs, 300, dtype).items():
        if not kind.takes(piece, gpu_hashes, "cuda"):
            continue
        moved = type(piece)(**{key: value.cuda() if torch.is_tensor(value) else value
                               for key, value in vars(piece).items()})
        totals = []
        for sync_mode in ("default", "error", "error"):  # tables are made in the first round
            kernel = kind(5, size, torch.device("cuda"))
            torch.cuda.set_sync_debug_mode(sync_mode)
            try:
                for _ in range(4):
                    kernel.add(0, moved, gpu_hashes)
                total = kernel.total()
            finally:
                torch.cuda.set_sync_debug_mode("default")
            totals.append(total.cpu())
        assert torch.equal(totals[1], totals[2]), name
        truth = 4 * _truth(_in_double(piece), Hashes.draw(shard, size, 3), size)
        in_bf16 = kind in (ByFrames, ByKeptAxis) and dtype == torch.bfloat16
        assert _error(totals[1], truth) < (0.01 if in_bf16 else 1e-5), name
