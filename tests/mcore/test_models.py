"""Models of every family: flags that do not fit, checkpoints, training with experts and latents."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ranks import Layout, RankError, on_layout, run_on_ranks
from tiny_models import MODELS, VOCAB_SIZE
from weights import assemble, fill_by_hash, fill_expert_bias, pieces

from megatron_direct.architecture import ModelConfig, expert_layers
from megatron_direct.config import BatchConfig, Job, OptimizerConfig
from megatron_direct.errors import UserError
from megatron_direct.mcore import checkpoint, grid, training
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import num_parameters, parameter_shards
from megatron_direct.mcore.specs import SPECS

EXPERTS = [Layout(dp=2, ep=2), Layout(tp=2, dp=2, ep=2, sp=True)]


# --- flags ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frequency", "expected"), [
    ("1", [1, 1, 1, 1]), (2, [1, 0, 1, 0]), ("[0]*1+[1]*3", [0, 1, 1, 1]),
    ("([0, 1] * 2)", [0, 1, 0, 1]), ([0, 0, 1, 1], [0, 0, 1, 1]),
])
def test_which_layers_have_experts(frequency, expected):
    model = ModelConfig(num_layers=4, num_experts=4, moe_layer_freq=frequency)
    assert expert_layers(model) == [bool(x) for x in expected]


@pytest.mark.parametrize(("flags", "match"), [
    ({"moe_layer_freq": "[0]*2"}, "pattern of 2 layers, but --num-layers is 4"),
    ({"moe_layer_freq": "every"}, "neither a number of layers nor a pattern"),
    ({"moe_layer_freq": "0"}, "neither a number of layers nor a pattern"),
    ({"add_bias_linear": True}, "--add-bias-linear .* --add-qkv-bias"),
    ({"moe_router_topk": 5}, "--moe-router-topk 5 is more than --num-experts 4"),
    ({"moe_router_topk": 1}, "needs --moe-router-pre-softmax"),
    ({"moe_router_enable_expert_bias": True}, "needs --moe-router-score-function sigmoid"),
    ({"moe_router_group_topk": 2}, "needs --moe-router-num-groups"),
    ({"num_experts": None, "moe_router_topk": 4}, "no effect without --num-experts"),
    ({"kv_lora_rank": 64}, "--kv-lora-rank 64 has no effect without --multi-latent-attention"),
    ({"multi_latent_attention": True, "num_query_groups": 2}, "Leave out --num-query-groups 2"),
])
def test_flags_that_do_not_fit_are_refused(flags, match):
    with pytest.raises(UserError, match=match):
        ModelConfig(**{"num_experts": 4} | flags)


def test_the_arguments_that_megatron_lm_carries_for_a_dense_model_are_accepted():
    ModelConfig(moe_layer_freq=1, moe_router_topk=2, kv_lora_rank=32, qk_head_dim=128, mscale=1)


@pytest.mark.parametrize(("name", "layout", "match"), [
    ("starcoder", Layout(tp=2), "does not divide the model.s --num-query-groups 1"),
    ("mixtral", Layout(tp=2), "--num-experts with .* needs --sequence-parallel"),
    ("deepseek-v3", Layout(tp=2, dp=2, ep=2), "needs --sequence-parallel"),
    ("mixtral", Layout(dp=2, ep=3), "3 does not divide the 2 data-parallel ranks"),
    ("mixtral", Layout(dp=8, ep=8), "8 does not divide --num-experts 4"),
    ("llama-tied", Layout(dp=2, ep=2), "does not divide --num-experts None"),
])
def test_layouts_that_do_not_fit_are_refused(name, layout, match):
    with pytest.raises(UserError, match=match):
        layout.config().require_fits(MODELS[name], layout.world_size)


def test_context_parallelism_is_refused():
    layout = dataclasses.replace(Layout().config(), context_parallel_size=2)
    with pytest.raises(UserError, match="--context-parallel-size 2 is not supported"):
        layout.require_fits(MODELS["llama-tied"], 2)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it is not refused")
def test_the_alltoall_dispatcher_is_refused_without_a_gpu():
    layout = dataclasses.replace(Layout().config(), moe_token_dispatcher_type="alltoall")
    with pytest.raises(RankError, match="alltoall needs GPUs.*Use allgather"):
        run_on_ranks(1, _enter, layout)


def _enter(layout):
    with grid.model_parallel(layout):
        pass


# --- checkpoints ------------------------------------------------------------------------------


def _state(chunks):
    """This rank's weights, and its buffers by name."""
    shards = parameter_shards(chunks)
    buffers = {name: buffer.numpy() for chunk in chunks for name, buffer in chunk.named_buffers()
               if name.endswith("expert_bias")}
    return pieces(shards, [s.parameter for s in shards]), buffers


def _save(model, layout, folder):
    chunks = models.build(Job(model, layout))
    fill_by_hash(parameter_shards(chunks))
    fill_expert_bias(chunks)
    checkpoint.save(folder, 1, chunks, None, None, vars(model))
    return _state(chunks)


def _load(model, layout, folder):
    found = checkpoint.open_checkpoint(folder)
    carried = found.settings(ModelConfig, {})
    assert carried == model
    chunks = models.build(Job(carried, layout), seed=5)
    checkpoint.load_model(found.path, chunks)
    return _state(chunks)


@pytest.mark.parametrize(("name", "written", "read"), [
    ("deepseek-v3", Layout(dp=2, ep=2), Layout(tp=2, sp=True)),
    ("qwen2-moe", Layout(), Layout(dp=2, ep=2)),
    pytest.param("qwen3", Layout(tp=2), Layout(pp=2), marks=pytest.mark.slow),
    pytest.param("neox", Layout(tp=2, pp=2), Layout(), marks=pytest.mark.slow),
    pytest.param("starcoder", Layout(), Layout(pp=2), marks=pytest.mark.slow),
], ids=str)
def test_checkpoints_of_all_families_are_read_in_other_layouts(name, written, read, tmp_path):
    saved = on_layout(written, _save, MODELS[name], str(tmp_path))
    loaded = on_layout(read, _load, MODELS[name], str(tmp_path))
    before, after = (assemble([rank[0] for rank in ranks]) for ranks in (saved, loaded))
    assert before.keys() == after.keys()
    for weight in before:
        np.testing.assert_array_equal(after[weight], before[weight])
    for rank in loaded:
        assert bool(rank[1]) == MODELS[name].moe_router_enable_expert_bias
        for bias in rank[1].values():
            np.testing.assert_array_equal(bias, *saved[0][1].values())


# --- training ---------------------------------------------------------------------------------


def _sequences(count: int, length: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB_SIZE, (count, length + 1), generator=generator)
    return [{"tokens": row[:-1], "labels": row[1:], "loss_mask": torch.ones(length),
             "position_ids": torch.arange(length)} for row in tokens]


def _train(model, layout):
    """Losses and gradient norms of three steps."""
    chunks = models.build(Job(model, layout))
    fill_by_hash(parameter_shards(chunks), scale=0.2)
    fill_expert_bias(chunks)
    batch = BatchConfig(micro_batch_size=2, global_batch_size=8)
    trainer = training.make_trainer(chunks, OptimizerConfig(lr=1e-3, lr_warmup_iters=1), batch)
    steps = []
    training.train(trainer, training.Feed(_sequences(24, model.seq_length), batch), range(1, 4),
                   "train", steps.append)
    return [(step.loss, step.grad_norm) for step in steps]


@pytest.mark.parametrize(("name", "layout"), [
    ("deepseek-v3", Layout(tp=2, sp=True)),
    ("qwen2-moe", Layout(dp=2, ep=2)),
    ("nemotron-h", Layout(tp=2, sp=True)),
    pytest.param("deepseek-v3", Layout(tp=2, dp=2, ep=2, sp=True), marks=pytest.mark.slow),
    pytest.param("hybrid-experts", Layout(dp=2, ep=2), marks=pytest.mark.slow),
    pytest.param("mixtral", Layout(pp=2), marks=pytest.mark.slow),
    pytest.param("qwen3", Layout(tp=2), marks=pytest.mark.slow),
], ids=str)
def test_training_in_a_layout_is_training_on_one_rank(name, layout):
    expected = on_layout(Layout(), _train, MODELS[name])[0]
    for found in on_layout(layout, _train, MODELS[name]):
        # Sums in another order; Adam's steps divide by gradients that may be small.
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def _train_as_megatron_does(model, layout):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SPECS, "fused", dataclasses.replace(SPECS["fused"],
                                                          finish=lambda chunk: None))
        return _train(model, layout)


def test_latent_attention_needs_its_position_gradients_added_up():
    expected = on_layout(Layout(), _train, MODELS["deepseek-v3"])[0]
    found = on_layout(Layout(tp=2, sp=True), _train_as_megatron_does, MODELS["deepseek-v3"])[0]
    assert found[0][0] == pytest.approx(expected[0][0], rel=1e-5)  # the loss is right
    assert abs(found[0][1] / expected[0][1] - 1) > 1e-3  # its gradient is not


def _count(model, layout):
    return num_parameters(models.build(Job(model, layout)))


@pytest.mark.parametrize("layout", EXPERTS, ids=str)
def test_shared_experts_and_routed_ones_count_once(layout):
    model = MODELS["qwen2-moe"]
    expected = on_layout(Layout(), _count, model)[0]
    assert set(on_layout(layout, _count, model)) == {expected}




# --- experts as others hold them ----------------------------------------------------------------


def _grouped_experts(config):
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe import grouped_gemm_util
    from megatron.core.transformer.moe.experts import GroupedMLP

    with pytest.MonkeyPatch.context() as patch:  # its kernels are needed to compute, not to save
        patch.setattr(grouped_gemm_util, "assert_grouped_gemm_is_available", lambda: None)
        return GroupedMLP(config.num_moe_experts, config,
                          ProcessGroupCollection.use_mpu_process_groups())


def _loaded_from_grouped(model, layout, folder):
    """[(weights [out, in] of each grouped expert, of ours after loading)]."""
    from megatron.core import dist_checkpointing

    from megatron_direct.mcore.shards import checkpoint_metadata

    chunk, = models.build(Job(model, layout))
    experts = chunk.decoder.layers[0].mlp.experts
    grouped = _grouped_experts(chunk.config)
    metadata = checkpoint_metadata()
    dist_checkpointing.save(grouped.sharded_state_dict("experts.", metadata=metadata), folder)
    state = experts.sharded_state_dict("experts.", metadata=metadata)
    loaded = dist_checkpointing.load(state, folder)
    experts.load_state_dict({name.removeprefix("experts."): tensor
                             for name, tensor in loaded.items()}, strict=False)
    first = grouped.weight1.view(model.num_experts, model.hidden_size, -1).transpose(1, 2)
    second = grouped.weight2.view(model.num_experts, -1, model.hidden_size).transpose(1, 2)
    return [(theirs.detach().numpy(), ours.weight.detach().numpy())
            for expert, pair in zip(experts.local_experts, zip(first, second, strict=True),
                                    strict=True)
            for theirs, ours in zip(pair, (expert.linear_fc1, expert.linear_fc2), strict=True)]


def test_experts_that_were_trained_by_grouped_gemm_are_read(tmp_path):
    """Megatron's own grouped experts, which save the transposes of ours under the same names."""
    from megatron.core.transformer.moe import experts

    if not hasattr(experts, "GroupedMLP"):
        pytest.skip("GroupedMLP is gone since megatron-core 0.17")
    compared, = on_layout(Layout(), _loaded_from_grouped, MODELS["mixtral"], str(tmp_path))
    assert len(compared) == 2 * MODELS["mixtral"].num_experts
    for theirs, ours in compared:
        np.testing.assert_array_equal(ours, theirs)
