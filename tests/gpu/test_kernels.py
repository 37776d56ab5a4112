"""On a GPU what it computes on the CPU: sketches of pieces of every kind, and fused attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from megatron_direct.gradients.hashes import Hashes
from megatron_direct.gradients.pieces import Entries, OuterProducts, RoutedOuterProducts, RowSums
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore.shards import ParameterShard
from megatron_direct.mcore.specs.fused import causal_attention

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SIZE, SAMPLES, TOKENS = 256, 3, 70


def _shard(rows: int, columns: int, device: str, of_vocabulary: bool = False,
           ) -> ParameterShard:
    return ParameterShard("w", torch.nn.Parameter(torch.zeros(rows, columns, device=device)),
                          torch.arange(rows, device=device), torch.arange(columns, device=device),
                          (rows, columns), True, True, of_vocabulary=of_vocabulary)


def _pieces(rows: int, columns: int, dtype: torch.dtype) -> dict:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    def numbers(below, *shape):
        return torch.randint(0, below, shape, generator=generator)

    return {
        "linear": OuterProducts(draw(TOKENS, SAMPLES, columns), draw(TOKENS, SAMPLES, rows)),
        "expert": RoutedOuterProducts(draw(50, columns), draw(50, rows), numbers(SAMPLES, 50),
                                      SAMPLES),
        "embedding": RowSums(numbers(rows, TOKENS, SAMPLES), numbers(2, TOKENS, SAMPLES).bool(),
                             draw(TOKENS, SAMPLES, columns), rows),
        "vector": Entries(draw(SAMPLES, rows)),
    }


def _moved(piece, device: str):
    return dataclasses.replace(piece, **{name: value.to(device) for name, value in
                                         vars(piece).items() if torch.is_tensor(value)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "expert", "embedding", "vector"])
@pytest.mark.parametrize(("rows", "columns"), [(40, 24), (300, 700)])
def test_sketches_of_pieces(kind, rows, columns, dtype):
    columns = 1 if kind == "vector" else columns
    piece = _pieces(rows, columns, dtype)[kind]
    found, expected = (
        Sketch([shard], SIZE, 7).of_piece(shard, _moved(piece, device)).cpu()
        for device in ("cuda", "cpu")
        for shard in [_shard(rows, columns, device, of_vocabulary=kind == "embedding")])
    # float32 sums in another order; bfloat16 factors may be rounded once more on their way.
    bar = 1e-5 if dtype == torch.float32 else 1e-2
    assert ((found - expected).norm(dim=1) <= bar * expected.norm(dim=1)).all()


SHAPES = [(torch.bfloat16, 4, 2, 64, 64), (torch.bfloat16, 4, 4, 24, 16),
          (torch.float32, 4, 2, 64, 64), (torch.float32, 4, 1, 10, 5), (torch.float32, 2, 2, 6, 6)]


def _heads(length: int, shape, device: str) -> list[torch.Tensor]:
    dtype, heads, groups, width, value_width = shape
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 2, count, size, generator=generator).to(device, dtype)
            .requires_grad_() for count, size in ((heads, width), (groups, width),
                                                  (groups, value_width))]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_and_its_gradients(shape):
    results = []
    for device in ("cuda", "cpu"):
        query, key, value = _heads(300, shape, device)
        context = causal_attention(query, key, value, 0.2)
        context.float().square().sum().backward()
        results.append([x.detach().float().cpu() for x in (context, query.grad, key.grad,
                                                           value.grad)])
    bar = 2e-2 if shape[0] == torch.bfloat16 else 1e-4
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= bar * expected.norm()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_holds_no_matrix_of_scores(shape):
    length = 4096
    heads = _heads(length, shape, "cuda")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    causal_attention(*heads, 0.2).float().sum().backward()
    torch.cuda.synchronize()
    scores = 2 * shape[1] * length * length * heads[0].element_size()
    assert torch.cuda.max_memory_allocated() - before < scores / 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [256, 1024, 2752, 5504])
def test_the_count_sketch_kernel_against_torch(width, dtype, monkeypatch):
    """The same sums of a few numbers in another order; and the same bytes from run to run."""
    from megatron_direct.gradients import hashes

    if not hashes.gpu_kernels.can_compile():
        pytest.skip("Triton cannot compile here")
    axis = Hashes.draw(_shard(width, 1, "cuda"), 2048, 3).rows
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(501, 3, width, generator=generator).to("cuda", dtype)
    found = []
    for by_kernel in (True, True, False):
        places = torch.empty(3, 501, 2048, dtype=dtype, device="cuda").transpose(0, 1)
        if not by_kernel:
            monkeypatch.setattr(hashes.gpu_kernels, "apply_to", lambda tensor: False)
        axis.write_count_sketch(values, places)
        found.append(places)
    assert torch.equal(found[0], found[1])
    bar = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found[0], found[2], atol=1e-6, rtol=bar)


def test_our_kernels_can_be_compiled_where_triton_is():
    pytest.importorskip("triton")
    from megatron_direct.runtime import gpu_kernels

    assert gpu_kernels.can_compile()
