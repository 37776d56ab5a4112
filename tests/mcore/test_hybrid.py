"""Hybrid models: patterns, what their checkpoints carry, and Megatron's own names of weights."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ranks import Layout, on_layout
from tiny_models import MODELS
from weights import assemble, fill_by_hash, pieces

from megatron_direct import hybrid_pattern
from megatron_direct.config import Job, ModelConfig
from megatron_direct.errors import UserError
from megatron_direct.mcore import arguments, checkpoint
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import checkpoint_metadata, parameter_shards

NEMOTRON_H = MODELS["nemotron-h"]


# --- patterns ---------------------------------------------------------------------------------


def test_stages_and_prediction_heads_are_no_layers():
    assert hybrid_pattern.layers("M-M*|M-E-/*-/*-") == "M-M*M-E-"
    pattern = "M-M*|M-E-/*-"
    assert hybrid_pattern.in_stages(pattern, 4, with_heads=False) == "M-|M*|M-|E-"
    assert hybrid_pattern.in_stages(pattern, 2, with_heads=True) == "M-M*|M-E-/*-"
    assert hybrid_pattern.in_stages("M-M*", 1, with_heads=True) == "M-M*"
    assert hybrid_pattern.without_stages(pattern) == "M-M*M-E-/*-"


@pytest.mark.parametrize(("flags", "match"), [
    ({"hybrid_layer_pattern": "M*-"}, "has 3 layers, but --num-layers is 4. Give --num-layers 3"),
    ({"hybrid_layer_pattern": "MG*-"}, "layer 1 is G, a gated delta net, which is not supported"),
    ({"hybrid_layer_pattern": "D-D-"}, r"layer 0 is D, sparse attention \(DeepSeek\)"),
    ({"hybrid_layer_pattern": "*-*X"}, "layer 3 is X, no kind of layer"),
    ({"hybrid_layer_pattern": "*-*E"}, "--num-experts and E in .* need each other"),
    ({"hybrid_layer_pattern": "*-*-", "num_experts": 4}, "--num-experts and E in"),
    ({"hybrid_layer_pattern": "*-+-", "multi_latent_attention": True}, r"has both \* and \+"),
    ({"hybrid_layer_pattern": "*-*-", "use_rope_scaling": True}, "--use-rope-scaling"),
    ({"hybrid_layer_pattern": "M-M-", "mamba_head_dim": 3}, "--mamba-head-dim 3 does not divide"),
    ({"hybrid_layer_pattern": "M-M-", "mamba_num_heads": 6}, "--mamba-num-groups 8 does not"),
    ({"mamba_state_dim": 64}, "--mamba-state-dim 64 has no effect without --hybrid-layer-pattern"),
])
def test_patterns_that_cannot_be_are_refused(flags, match):
    with pytest.raises(UserError, match=match):
        ModelConfig(**flags)


# --- checkpoints ------------------------------------------------------------------------------


def _arguments_of_megatron_lm(**given):
    return {"padded_vocab_size": 64, "group_query_attention": False, "num_query_groups": 1,
            **given}


@pytest.mark.parametrize("given", [
    {"hybrid_layer_pattern": "M*|M-", "num_layers": None,
     "spec": ["megatron.core.models.hybrid.hybrid_layer_specs", "hybrid_stack_spec"]},
    {"hybrid_override_pattern": "M*M-", "is_hybrid_model": True, "num_layers": 4,
     "spec": ["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"]},
], ids=["since-0.17", "0.16"])
def test_the_pattern_that_megatron_lm_saved(given, tmp_path):
    found = arguments.translated(_arguments_of_megatron_lm(**given), tmp_path)
    assert (found["hybrid_layer_pattern"], found["num_layers"]) == ("M*M-", 4)


@pytest.mark.parametrize(("given", "match"), [
    ({"is_hybrid_model": True}, "hybrid model without a pattern.*--hybrid-override-pattern"),
    ({"spec": ["my_specs", "my_stack"]}, "--spec .*my_specs.*: this is not supported"),
])
def test_hybrid_models_that_are_not_described_are_refused(given, match, tmp_path):
    with pytest.raises(UserError, match=match):
        arguments.translated(_arguments_of_megatron_lm(**given), tmp_path)


def _save(model, layout, folder):
    chunks = models.build(Job(model, layout))
    shards = parameter_shards(chunks)
    fill_by_hash(shards)
    checkpoint.save(folder, 1, chunks, None, None, vars(model))
    return pieces(shards, [s.parameter for s in shards])


def _load(model, layout, folder):
    found = checkpoint.open_checkpoint(folder)
    assert found.settings(ModelConfig, {}) == model
    chunks = models.build(Job(model, layout), seed=5)
    checkpoint.load_model(found.path, chunks)
    shards = parameter_shards(chunks)
    return pieces(shards, [s.parameter for s in shards])


@pytest.mark.parametrize(("name", "written", "read"), [
    ("nemotron-h", Layout(tp=2), Layout(pp=2)),
    pytest.param("hybrid-experts", Layout(), Layout(dp=2, ep=2), marks=pytest.mark.slow),
    pytest.param("hybrid-tied", Layout(tp=2, pp=2), Layout(), marks=pytest.mark.slow),
], ids=str)
def test_checkpoints_are_read_in_other_layouts(name, written, read, tmp_path):
    saved = assemble(on_layout(written, _save, MODELS[name], str(tmp_path)))
    loaded = assemble(on_layout(read, _load, MODELS[name], str(tmp_path)))
    assert saved.keys() == loaded.keys()
    for weight in saved:
        np.testing.assert_array_equal(loaded[weight], saved[weight])


def _tensors(layer) -> dict[str, tuple]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    state = layer.sharded_state_dict("mixer.", metadata=checkpoint_metadata())
    built = [tensor for entry in state.values() for tensor in (
        entry.build() if isinstance(entry, ShardedTensorFactory) else [entry])]
    return {t.key: (t.global_shape, t.global_offset, t.local_shape) for t in built
            if hasattr(t, "local_shape")}


class _GatedNorm(torch.nn.Module):
    """Has the parameter of mamba_ssm's gated norm, divided as Megatron divides it."""

    def __init__(self, width, device=None, dtype=None, **_unused):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width, device=device, dtype=dtype))

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint

        return make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True), prefix, {"weight": 0}, sharded_offsets)


def _both_mixers(model, layout):
    """(shards of each tensor of Megatron's mixer, of ours)."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.ssm import mamba_context_parallel, mamba_mixer
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

    chunk, = models.build(Job(model, layout))
    ours = chunk.decoder.layers[0].mixer
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba_mixer, "HAVE_MAMBA_SSM", True)
        for module in (mamba_mixer, mamba_context_parallel):
            patch.setattr(module, "HAVE_EINOPS", True)
        patch.setattr(mamba_mixer, "ExtendedRMSNorm", _GatedNorm)
        theirs = mamba_mixer.MambaMixer(
            chunk.config, mamba_mixer.MambaMixerSubmodules(ColumnParallelLinear, RowParallelLinear),
            chunk.config.hidden_size, layer_number=1,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups())
    return _tensors(theirs), _tensors(ours)


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2)], ids=str)
def test_a_mixer_has_the_tensors_of_megatrons(layout):
    pytest.importorskip("triton", reason="Megatron's mixer imports triton")
    for theirs, ours in on_layout(layout, _both_mixers, NEMOTRON_H):
        assert len(theirs) == 16
        assert ours == theirs


# --- one model, two ways -----------------------------------------------------------------------


def _losses(model, layout, weights):
    """Of a batch, by a model with the weights of another one, layer by layer."""
    chunk, = models.build(Job(model, layout))
    with torch.no_grad():
        for shard in parameter_shards([chunk]):
            shard.parameter.copy_(torch.from_numpy(weights[shard.name]).view_as(shard.parameter))
        tokens = torch.arange(2 * model.seq_length).view(2, -1) % model.vocab_size
        positions = torch.arange(model.seq_length).expand(2, -1)
        return chunk(tokens, positions, None, labels=tokens).numpy()


def _weights(model, layout):
    shards = parameter_shards(models.build(Job(model, layout)))
    fill_by_hash(shards)
    return pieces(shards, [s.parameter for s in shards])


def _as_hybrid(name: str) -> str:
    if not name.startswith("decoder."):
        return name
    if name.startswith("decoder.final_layernorm."):
        return name.replace("final_layernorm", "final_norm")
    number, rest = name.removeprefix("decoder.layers.").split(".", 1)
    half = 0 if rest.startswith("self_attention") else 1
    return f"decoder.layers.{2 * int(number) + half}.{rest}"


def test_a_gpt_and_the_hybrid_model_of_its_halves_have_the_same_losses():
    gpt = MODELS["llama-tied"]
    weights = assemble(on_layout(Layout(), _weights, gpt))
    hybrid = dataclasses.replace(gpt, num_layers=4, hybrid_layer_pattern="*-*-")
    expected, = on_layout(Layout(), _losses, gpt, weights)
    found, = on_layout(Layout(), _losses, hybrid,
                       {_as_hybrid(name): matrix for name, matrix in weights.items()})
    np.testing.assert_array_equal(found, expected)
