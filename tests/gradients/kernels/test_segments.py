"""Sums over the tokens of each sample, against one sample at a time."""

from __future__ import annotations

import pytest
import torch

from megatron_direct.gradients.kernels import segments
from megatron_direct.gradients.kernels.segments import Blocks, Segments

# (samples of the tokens, number of samples): in no order, samples without tokens, one sample with
# all of them, and a single token.
CASES = {
    "mixed": (torch.randint(0, 5, (203,), generator=torch.Generator().manual_seed(1)), 5),
    "without some": (torch.tensor([7, 2, 2, 7, 7, 2] * 20), 9),
    "the last has all": (torch.full((150,), 6), 7),
    "the first has all": (torch.zeros(150, dtype=torch.int64), 7),
    "one token": (torch.tensor([1]), 3),
}


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return CASES[request.param]


@pytest.fixture(params=["as on a GPU", "as on a CPU"])
def segment_sums(request, monkeypatch):
    way = segments._reduced if request.param == "as on a GPU" else segments._added_one_by_one
    monkeypatch.setattr(segments, "_segment_sums", way)


def _values(samples, width):
    return torch.randn(len(samples), width, generator=torch.Generator().manual_seed(2))


def test_sums_of_tokens(case, segment_sums):
    samples, num_samples = case
    values = _values(samples, 3)
    found = Segments.of(samples, num_samples)
    truth = torch.stack([values[samples == n].double().sum(0) for n in range(num_samples)])
    in_order = values[found.order]
    torch.testing.assert_close(found.sums(in_order).double(), truth, atol=1e-5, rtol=0)
    parts = found.sums(in_order[:70]) + found.sums(in_order[70:], 70) if len(samples) > 70 else None
    if parts is not None:
        torch.testing.assert_close(parts.double(), truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("at_once", [2**19, 100])
def test_products_of_tokens(case, segment_sums, at_once, monkeypatch):
    monkeypatch.setattr("megatron_direct.gradients.hashes._AT_ONCE", {"cpu": at_once})
    samples, num_samples = case
    left, right = _values(samples, 6), _values(samples, 4)
    blocks = Blocks.of(Segments.of(samples, num_samples))
    sums = torch.ones(num_samples, 6, 4)
    blocks.add_products(sums, blocks.take(left), blocks.take(right),
                        lambda x, y: torch.bmm(x.mT, y))
    truth = torch.stack([left[samples == n].double().T @ right[samples == n].double()
                         for n in range(num_samples)])
    torch.testing.assert_close(sums.double() - 1, truth, atol=1e-4, rtol=0)
    assert blocks.tokens.numel() <= 1.5 * len(samples) + 16 * (3 * num_samples + 1)


def test_what_is_not_finite_stays_with_its_sample(segment_sums):
    samples = torch.tensor([0, 1, 2, 1, 0, 2, 1])
    values = _values(samples, 3)
    values[samples == 1] = torch.tensor([float("nan"), float("inf"), 1.0])
    found = Segments.of(samples, 3)
    sums = found.sums(values[found.order])
    blocks = Blocks.of(found)
    products = torch.zeros(3, 3, 3)
    blocks.add_products(products, blocks.take(values), blocks.take(values),
                        lambda x, y: torch.bmm(x.mT, y))
    for total in (sums, products.flatten(1)):
        assert total.isfinite().all(1).tolist() == [True, False, True]
