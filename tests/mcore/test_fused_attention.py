"""The layer spec "fused" against "local": the same numbers, without a matrix of all scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from indexed_files import random_documents, write_dataset
from ranks import Layout, RankError, on_layout
from tiny_models import MODELS, VOCAB_SIZE, has_hybrid_latent_layers
from weights import fill_by_hash, fill_expert_bias

from megatron_direct.config import Job
from megatron_direct.curvature.requirements import require_exact_products
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.gradients.per_sample import GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import model as models
from megatron_direct.mcore import passes
from megatron_direct.mcore.shards import parameter_shards
from megatron_direct.mcore.specs import SPECS
from megatron_direct.mcore.specs.fused import causal_attention

# Both compute in float32, in another order of sums: measured at 5e-7 and less.
PARITY = 1e-5


@pytest.fixture(scope="module")
def prefix(tmp_path_factory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data") / "pool",
                         random_documents(20, VOCAB_SIZE, seed=1, longest=14))


def _build(model, layout, spec):
    chunks = models.build(Job(model, layout), spec=spec)
    fill_by_hash(parameter_shards(chunks))
    fill_expert_bias(chunks)
    return chunks


def _logits(chunks, samples) -> list[np.ndarray]:
    """Of the first micro-batch, where the whole model is on this rank."""
    if chunks[0].config.pipeline_model_parallel_size > 1:
        return []
    batch, = next(passes.of_samples(chunks, samples, samples.usable, MicroBatchLimits(4)))
    with torch.no_grad():
        return [chunks[0](batch.tokens, batch.position_ids, None).numpy()]


def _computed(model, layout, prefix, spec) -> dict[str, list[np.ndarray]]:
    chunks = _build(model, layout, spec)
    samples, shards = Samples([prefix], model.seq_length, VOCAB_SIZE), parameter_shards(chunks)
    found = {"logits": _logits(chunks, samples), "losses": [], "sketches": []}
    for micro_batches in passes.of_samples(chunks, samples, samples.usable, MicroBatchLimits(4)):
        found["losses"].append(passes.run_pass(chunks, micro_batches, backward=True).numpy())
    found["gradients"] = [shard.parameter.grad.numpy() for shard in shards]
    for rows, _, _ in sketch_samples(GradientModel(chunks, shards, Sketch(shards, 64, 5)),
                                     samples, samples.usable):
        found["sketches"].append(rows)
    return found


def _errors(model, layout, prefix) -> dict[str, float]:
    """Largest difference between the specs, relative to the largest entry, by what it is of."""
    local, fused = (_computed(model, layout, prefix, spec) for spec in ("local", "fused"))
    largest = max(abs(gradient).max() for gradient in local["gradients"])
    return {name: max((abs(a - b).max() / (largest if name == "gradients" else abs(a).max())
                       for a, b in zip(local[name], fused[name], strict=True)), default=0.0)
            for name in local}


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
    for errors in on_layout(layout, _errors, MODELS[name], prefix):
        assert all(error < PARITY for error in errors.values()), errors


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
    chunk, = _build(model, layout, spec)
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
    kept = {spec: on_layout(Layout(), _largest_kept, model, spec, length)[0] for spec in SPECS}
    assert kept["local"] >= length * length * model.num_attention_heads
    assert kept["fused"] < length * length, "it grows with s, not with s x s"
    twice, = on_layout(Layout(), _largest_kept, model, "fused", 2 * length)
    assert twice == 2 * kept["fused"]


def _require_exact(model, layout, spec):
    require_exact_products(_build(model, layout, spec))


def test_exact_products_refuse_a_fused_attention():
    on_layout(Layout(), _require_exact, MODELS["llama-tied"], "local")
    with pytest.raises(RankError, match='local layer spec.*or use --curvature fisher'):
        on_layout(Layout(), _require_exact, MODELS["llama-tied"], "fused")
