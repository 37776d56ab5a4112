"""What models of two layer specs compute from the same weights and samples, for tests that the
specs agree."""

from __future__ import annotations

import numpy as np
import torch
from weights import fill_by_hash, fill_expert_bias

from megatron_direct.config import Job
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.gradients.per_sample import GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import model as models
from megatron_direct.mcore import passes
from megatron_direct.mcore.shards import parameter_shards

# Both compute in float32, in another order of sums: measured at 5e-7 and less.
PARITY = 1e-5


def build_filled(model, layout, spec):
    """Chunks whose weights follow from their names."""
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
        return [chunks[0](batch.tokens, batch.position_ids, None).cpu().numpy()]


def _computed(model, layout, prefix, spec) -> dict[str, list[np.ndarray]]:
    chunks = build_filled(model, layout, spec)
    samples = Samples([prefix], model.seq_length, model.vocab_size)
    shards = parameter_shards(chunks)
    found = {"logits": _logits(chunks, samples), "losses": [], "sketches": []}
    for micro_batches in passes.of_samples(chunks, samples, samples.usable, MicroBatchLimits(4)):
        found["losses"].append(passes.run_pass(chunks, micro_batches, backward=True).cpu().numpy())
    found["gradients"] = [shard.parameter.grad.cpu().numpy()
                          for shard in sorted(shards, key=lambda shard: shard.name)]
    for rows, _, _ in sketch_samples(GradientModel(chunks, shards, Sketch(shards, 64, 5)),
                                     samples, samples.usable):
        found["sketches"].append(rows)
    return found


def errors(model, layout, prefix, specs=("local", "fused")) -> dict[str, float]:
    """Largest difference between the specs, relative to the largest entry, by what it is of."""
    local, other = (_computed(model, layout, prefix, spec) for spec in specs)
    largest = max(abs(gradient).max() for gradient in local["gradients"])
    return {name: max((_difference(a, b, largest if name == "gradients" else abs(a).max())
                       for a, b in zip(local[name], other[name], strict=True) if len(a)),
                      default=0.0)
            for name in local}


def _difference(a: np.ndarray, b: np.ndarray, scale: float) -> float:
    difference = float(abs(a - b).max())
    if not np.isfinite(difference):
        return float("inf")
    return difference / float(scale) if difference else 0.0
