"""The layer spec "fused" against "local": the same numbers, without a matrix of all scores."""

from __future__ import annotations

import pytest
import torch
from indexed_files import random_documents, write_dataset
from ranks import Layout, RankError, on_layout
from spec_parity import PARITY, build_filled, errors
from tiny_models import MODELS, VOCAB_SIZE, has_hybrid_latent_layers

from megatron_direct.curvature.requirements import require_exact_products
from megatron_direct.mcore.specs.fused import causal_attention


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "pool",
                         random_documents(20, VOCAB_SIZE, seed=1, longest=14))


_ONE, _TP, _BOTH, _SP = Layout(), Layout(tp=2), Layout(tp=2, pp=2), Layout(tp=2, sp=True)
_CASES = [*((name, _ONE) for name in MODELS),
          *(("llama-tied", layout) for layout in (_TP, _BOTH, _SP)),
          ("qwen3", _TP), ("gpt2-tied", _BOTH), ("minicpm3", _SP), ("deepseek-v3", _SP)]
# What else tensor parallelism takes: query groups that it divides, experts and latents by sequence.
_SLOW = [(name, layout) for name, model in MODELS.items() for layout in (_TP, _BOTH, _SP)
         if (name, layout) not in _CASES and name != "starcoder"
         and (layout.sp or not (model.num_experts or model.multi_latent_attention))]


@pytest.mark.parametrize(("name", "layout"), [
    *_CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in _SLOW)], ids=str)
def test_the_specs_agree(name, layout, prefix):
    if name == "hybrid-latent" and not has_hybrid_latent_layers():
        pytest.skip("hybrid models have latent attention since megatron-core 0.19")
    for found in on_layout(layout, errors, MODELS[name], prefix):
        assert all(error < PARITY for error in found.values()), found


@pytest.mark.parametrize(("heads", "groups", "width", "value_width"), [
    (4, 4, 8, 8), (4, 2, 8, 8), (6, 1, 5, 5), (4, 4, 10, 5), (4, 4, 5, 12)])
def test_causal_attention_against_its_definition(heads, groups, width, value_width):
    """In double precision, output and gradients; 1e-12 leaves three digits for their sums."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(7, 3, count, size, dtype=torch.float64, generator=generator, requires_grad=True)
        for count, size in ((heads, width), (groups, width), (groups, value_width)))
    found = causal_attention(query, key, value, 0.3)
    scores = torch.einsum("sbgrc,tbgc->bgrst", query.unflatten(2, (groups, -1)), key) * 0.3
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    expected = torch.einsum("bgrst,tbgd->sbgrd",
                            scores.masked_fill(future, -torch.inf).softmax(-1), value).flatten(2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    direction = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    for ours, theirs in zip(*(torch.autograd.grad((x * direction).sum(), (query, key, value))
                              for x in (found, expected)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def _largest_kept(model, layout, spec, length) -> int:
    """Entries of the largest tensor that a layer keeps for its backward pass."""
    chunk, = build_filled(model, layout, spec)
    sizes = []

    def keep(tensor):
        sizes.append(tensor.numel())
        return tensor

    hidden = torch.randn(length, 1, model.hidden_size, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk.decoder.layers[0](hidden, attention_mask=None,
                                rotary_pos_emb=chunk.rotary_pos_emb(length))
    return max(sizes)


@pytest.mark.parametrize("name", ["llama-tied", "qwen3"])
def test_no_matrix_of_scores_is_kept(name):
    length, model = 256, MODELS[name]
    kept = {spec: on_layout(Layout(), _largest_kept, model, spec, length)[0]
            for spec in ("local", "fused")}
    assert kept["local"] >= length * length * model.num_attention_heads
    assert kept["fused"] < length * length, "it grows with s, not with s x s"
    twice, = on_layout(Layout(), _largest_kept, model, "fused", 2 * length)
    assert twice == 2 * kept["fused"]


def _require_exact(model, layout, spec):
    require_exact_products(build_filled(model, layout, spec))


def test_exact_products_refuse_a_fused_attention():
    on_layout(Layout(), _require_exact, MODELS["llama-tied"], "local")
    with pytest.raises(RankError, match='local layer spec.*or use --curvature fisher'):
        on_layout(Layout(), _require_exact, MODELS["llama-tied"], "fused")
