"""Kernels for a GPU against torch's operations: by Triton's interpreter where there is no GPU."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from devices import on_device
from indexed_files import random_documents, write_dataset

from megatron_direct.config import Job, ModelConfig, ParallelConfig, Precision
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.gradients import layers
from megatron_direct.gradients.hashes import Hashes
from megatron_direct.gradients.per_sample import GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import ParameterShard, parameter_shards
from megatron_direct.runtime import gpu_kernels

pytest.importorskip("triton")
pytestmark = pytest.mark.gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16)
MODEL = ModelConfig(num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=2,
                    ffn_hidden_size=48, vocab_size=90, seq_length=24, qk_layernorm=True,
                    make_vocab_size_divisible_by=32)


def _axis(indices, size: int):
    rows = torch.as_tensor(list(indices), device=DEVICE)
    shard = ParameterShard("w", torch.nn.Parameter(torch.zeros(len(rows), 3, device=DEVICE)), rows,
                           torch.arange(3, device=DEVICE), (len(rows), 3), True, True,
                           of_vocabulary=True)
    return Hashes.draw(shard, size, seed=4).rows


def _drawn(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


# One block and several, whole and not; k no power of two; a rank's slice that begins within a
# block, and rows in no order, of which several share a bucket.
@pytest.mark.parametrize(("indices", "size"), [
    (range(5), 16), (range(16), 16), (range(55), 16), (range(60), 24), (range(10, 50), 16),
    ([40, 3, 41, 4, 42, 5], 16), ([0, 16, 32, 48, 64], 16)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_count_sketches(indices, size, dtype, tokens):
    from megatron_direct.gradients import count_sketch_kernel

    axis = _axis(indices, size)
    values = _drawn(3, tokens, 2 * axis.width, dtype=dtype).transpose(0, 1)[..., ::2]
    table = count_sketch_kernel.slices_table(axis.buckets, axis.signs, size)
    expected = torch.zeros(tokens, 3, size, device=DEVICE)
    for index, (bucket, sign) in enumerate(zip(axis.buckets, axis.signs, strict=True)):
        expected[..., bucket] += sign * values[..., index].float()
    for out in DTYPES:
        places = torch.full((3, 2 * tokens, size), 9.0, device=DEVICE, dtype=out)
        count_sketch_kernel.write_count_sketches(values, table, places[:, tokens:].transpose(0, 1))
        assert (places[:, :tokens] == 9).all(), "written elsewhere"
        found = places[:, tokens:].transpose(0, 1).float()
        # Half a unit in the last of 8 bits, where it is rounded to bfloat16. The interpreter cuts
        # the other bits off.
        bar = 1e-6 if out == torch.float32 else 2**-8 * (1.001 if DEVICE == "cuda" else 2)
        assert ((found - expected).abs() <= bar * expected.abs() + 1e-6).all()


def test_a_sketch_of_more_buckets_than_the_kernel_takes():
    from megatron_direct.gradients import count_sketch_kernel

    axis = _axis(range(7), 2**14)
    assert count_sketch_kernel.slices_table(axis.buckets, axis.signs, axis.size) is None


@pytest.mark.parametrize("shape", [(70, 3, 20), (37, 2, 5, 12), (1, 1, 130)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("centred", [True, False])
def test_gradients_of_norms(shape, dtype, centred):
    from megatron_direct.gradients import norm_kernel

    inputs, grads = _drawn(*shape, dtype=dtype) + 0.5, _drawn(*shape, dtype=dtype).flip(0)
    of_weight, of_bias = norm_kernel.sums_over_tokens(inputs, grads, 1e-5, centred)
    expected = layers.over_tokens(grads * layers.normalised(inputs, 1e-5, centred))
    torch.testing.assert_close(of_weight, expected, atol=3e-5, rtol=1e-5)
    assert (of_bias is not None) == centred
    if centred:
        torch.testing.assert_close(of_bias, layers.over_tokens(grads), atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(DEVICE == "cuda", reason="tests/gpu/test_rows.py compares these with the CPU's")
def test_rows_of_a_model_with_all_kernels(tmp_path):
    """Rotary embeddings, losses, norms of layers and of heads, and every factor."""
    prefix = write_dataset(tmp_path / "pool", random_documents(4, 90, seed=1, longest=20))
    with_kernels, without = (on_device("cpu", _sketched, prefix, takes) for takes in (True, False))
    for found, expected in zip(with_kernels[:2], without[:2], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert {"count_sketch_kernel", "norm_kernel", "rotary_kernel", "swiglu_kernel",
            "cross_entropy_kernel"} <= with_kernels[2]
    assert not without[2]


def _sketched(prefix: str, takes: bool) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """[n, k] rows, [n] losses, and the kernels that were imported."""
    gpu_kernels.apply_to = lambda tensor: takes  # in a process of its own
    chunks = models.build(Job(MODEL, ParallelConfig(), precision=Precision()))
    shards, samples = parameter_shards(chunks), Samples([prefix], 24, 90)
    gradients = GradientModel(chunks, shards, Sketch(shards, 64, 5),
                              micro_batch=MicroBatchLimits(2))
    found = list(sketch_samples(gradients, samples, samples.usable))
    rows, losses = (np.concatenate([part[place] for part in found]) for place in (0, 2))
    return rows, losses, {name.rpartition(".")[2] for name in sys.modules
                          if name.startswith("megatron_direct.") and name.endswith("_kernel")}
