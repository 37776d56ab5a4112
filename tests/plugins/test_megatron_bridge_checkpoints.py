"""Checkpoints that Megatron-Bridge writes: the model, its losses, and where its training was.

Where megatron-bridge is installed (0.6.2; CONTRIBUTING.md says how), on a CPU: its models are built
by its own providers, of Megatron's local layers, and saved by its own ``save_checkpoint``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path

import bridge_on_cpu
import numpy as np
import pytest
import torch
from indexed_files import write_dataset
from ranks import run_on_ranks

from megatron_direct.config import ModelConfig
from megatron_direct.errors import UserError

needs_bridge = pytest.mark.skipif(bridge_on_cpu.why_not() is not None,
                                  reason=bridge_on_cpu.why_not() or "")
STEPS, BATCH, LENGTH, ENTRIES = 3, 4, 24, 45
TOKENS = torch.randint(0, ENTRIES, (BATCH, LENGTH + 1), generator=torch.Generator().manual_seed(0))
_NAMES = {field.name for field in dataclasses.fields(ModelConfig)}
POSITIONS = torch.arange(LENGTH).expand(BATCH, LENGTH)

# What no shape of a tensor shows is far from our defaults; at this base some of the waves are so
# long that they are scaled.
_EVERY = {
    "num_layers": 2, "hidden_size": 32, "num_attention_heads": 4, "seq_length": LENGTH,
    "ffn_hidden_size": 24, "vocab_size": ENTRIES, "make_vocab_size_divisible_by": 10,
    "should_pad_vocab": True, "normalization": "RMSNorm", "layernorm_epsilon": 0.03,
    "gated_linear_unit": True, "activation_func": torch.nn.functional.silu,
    "add_bias_linear": False, "position_embedding_type": "rope", "rotary_base": 2e6,
    "share_embeddings_and_output_weights": False, "init_method_std": 0.3, "hidden_dropout": 0.0,
    "attention_dropout": 0.0, "use_cpu_initialization": True, "masked_softmax_fusion": False,
    "gradient_accumulation_fusion": False, "cross_entropy_loss_fusion": False}
_LLAMA = {"num_query_groups": 2, "rotary_percent": 0.5, "rope_scaling": True,
          "rope_scaling_factor": 3.0}
_EXPERTS = {
    "num_moe_experts": 4, "moe_layer_freq": [0, 1], "moe_ffn_hidden_size": 12,
    "moe_router_topk": 3, "moe_router_score_function": "sigmoid",
    "moe_router_topk_scaling_factor": 1.7, "moe_shared_expert_intermediate_size": 8,
    "moe_router_load_balancing_type": "none", "moe_grouped_gemm": False, "qk_layernorm": True}


def _provider(name: str):
    from megatron.bridge.models.gpt_provider import GPTModelProvider, local_layer_spec
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    if name == "llama":
        return GPTModelProvider(**_EVERY, **_LLAMA, transformer_layer_spec=local_layer_spec)
    return GPTModelProvider(**_EVERY, **_EXPERTS, transformer_layer_spec=functools.partial(
        get_gpt_decoder_block_spec, use_transformer_engine=False))


def _named_as_usual(model):
    """Norms before experts as Transformer Engine's layers name them, which is what people train;
    Megatron's local ones have the name of a dense layer's norm."""
    for layer in model.decoder.layers:
        if hasattr(layer.mlp, "router"):
            layer.submodules_config.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.", None)
    return model


def _container(model, folder: Path, distributed_optimizer: bool):
    from megatron.bridge.training import config

    container = config.ConfigContainer(
        model=model, logger=config.LoggerConfig(), tokenizer=config.TokenizerConfig(),
        dataset=config.MockGPTDatasetConfig(
            seq_length=LENGTH, random_seed=1, reset_position_ids=False,
            reset_attention_mask=False, eod_mask_loss=False),
        ddp=config.DistributedDataParallelConfig(use_distributed_optimizer=distributed_optimizer),
        train=config.TrainingConfig(train_iters=9, global_batch_size=BATCH, micro_batch_size=2),
        optimizer=config.OptimizerConfig(lr=3e-3, min_lr=3e-4, adam_beta2=0.97,
                                         use_distributed_optimizer=distributed_optimizer),
        scheduler=config.SchedulerConfig(
            lr_decay_style="constant", lr_warmup_iters=1, lr_decay_iters=9,
            start_weight_decay=0.2, end_weight_decay=0.2, weight_decay_incr_style="constant"),
        checkpoint=config.CheckpointConfig(save=str(folder),
                                           dist_ckpt_optim_fully_reshardable=True))
    container._calculate_scheduler_steps()
    for part in ("dataset", "ddp", "optimizer", "scheduler"):
        getattr(container, part).finalize()
    return container


@contextlib.contextmanager
def _megatron(tp: int):
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_direct.config import ParallelConfig
    from megatron_direct.mcore import grid

    with grid.model_parallel(ParallelConfig(tp)):
        model_parallel_cuda_manual_seed(7)
        yield


Losses = tuple[np.ndarray, np.ndarray]  # [b, s], as saved and one step later


def _losses(model) -> np.ndarray:
    with torch.no_grad():
        return model(TOKENS[:, :-1], POSITIONS, None, labels=TOKENS[:, 1:]).numpy()


def _write(folder: Path, name: str, tp: int, distributed_optimizer: bool) -> Losses:
    """Losses of Bridge's model as it saves it, and after one more step."""
    bridge_on_cpu.import_bridge()
    from megatron.bridge.training.checkpointing import save_checkpoint
    from megatron.bridge.training.optim import setup_optimizer
    from megatron.bridge.training.state import GlobalState, TrainState
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.process_groups_config import ProcessGroupCollection

    with _megatron(tp):
        provider = _provider(name)
        provider.tensor_model_parallel_size = tp
        provider.finalize()
        provider._pg_collection = groups = ProcessGroupCollection.use_mpu_process_groups()
        config = _container(provider, folder, distributed_optimizer)
        model = DistributedDataParallel(provider, config.ddp, _named_as_usual(provider.provide()))
        optimizer, scheduler = setup_optimizer(config.optimizer, config.scheduler, [model],
                                               pg_collection=groups)

        def step():
            model.zero_grad_buffer()
            optimizer.zero_grad()
            model(TOKENS[:, :-1], POSITIONS, None, labels=TOKENS[:, 1:]).mean().backward()
            model.finish_grad_sync()
            optimizer.step()
            scheduler.step(BATCH)

        for _ in range(STEPS):
            step()
        state = GlobalState()
        state.cfg = config
        state._train_state = TrainState(step=STEPS, consumed_train_samples=STEPS * BATCH)
        save_checkpoint(state, [model], optimizer, scheduler, 0, pg_collection=groups)
        saved = _losses(model)
        step()
        return saved, _losses(model)


def _read(folder: Path, padded_vocab_size: int, distributed_optimizer: bool) -> Losses:
    """Losses of our model of the checkpoint, and after one more step of our training."""
    from megatron_direct.config import Given, OptimizerConfig, ParallelConfig
    from megatron_direct.mcore import checkpoint, training
    from megatron_direct.mcore import model as models
    from megatron_direct.steps.onset import OnsetConfig, open_onset

    with _megatron(1):
        onset = open_onset(OnsetConfig(
            load=str(folder / "ckpt"), data_path=(str(folder / "pool"),),
            valid_data_path=(str(folder / "valid"),), run_dir=str(folder / "run")),
            ParallelConfig(), Given(model={"rotary_base": 2_000_000}))
        found, job = onset.checkpoint, onset.job
        assert found.iteration == STEPS and found.has_optimizer
        assert job.optimizer == OptimizerConfig(
            lr=3e-3, min_lr=3e-4, adam_beta2=0.97, weight_decay=0.2, lr_warmup_iters=1,
            use_distributed_optimizer=distributed_optimizer)
        assert (job.batch.global_batch_size, job.batch.micro_batch_size) == (BATCH, 2)
        assert not job.precision.bf16
        assert (job.model.seq_length, job.model.padded_vocab_size) == (
            LENGTH, padded_vocab_size)

        chunks = models.build(job)
        checkpoint.load_model(found.path, chunks)
        saved = _losses(chunks[0])
        trainer = training.make_trainer(chunks, job.optimizer, job.batch)
        assert checkpoint.load_training(
            found.path, chunks, trainer.optimizer, trainer.scheduler) == STEPS
        rows = [{"tokens": row[:-1], "labels": row[1:], "loss_mask": torch.ones(LENGTH),
                 "position_ids": torch.arange(LENGTH)} for row in TOKENS]
        training.train(trainer, training.Feed(rows, job.batch), range(STEPS + 1, STEPS + 2), "",
                       lambda step: None)
        return saved, _losses(chunks[0])


@needs_bridge
@pytest.mark.parametrize(("name", "tp", "distributed_optimizer"), [
    ("llama", 1, False), ("llama", 2, True), ("experts", 1, False)])
def test_model_and_training_are_those_that_bridge_saved(tmp_path, name, tp, distributed_optimizer):
    expected = run_on_ranks(tp, _write, tmp_path / "ckpt", name, tp, distributed_optimizer)[0]
    rng = np.random.default_rng(0)
    for prefix in ("pool", "valid"):
        write_dataset(tmp_path / prefix, [[rng.integers(0, ENTRIES, 30)] for _ in range(5)])
    padded_vocab_size = {1: 50, 2: 60}[tp]  # 45, as the layout divides it
    found, = run_on_ranks(1, _read, tmp_path, padded_vocab_size, distributed_optimizer)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5)  # sums in another order
    assert np.abs(expected[0] - expected[1]).max() > 0.01  # so that the test can fail


def _described(folder: Path, provider) -> dict:
    """What is read of a provider, once Bridge has written it."""
    from megatron_direct.mcore import bridge_arguments

    config = _container(provider, folder, False)
    folder.mkdir()
    config.to_yaml(str(folder / "run_config.yaml"))
    return bridge_arguments.read(folder)


def _read_families(folder: Path) -> None:
    bridge_on_cpu.import_bridge()
    import transformers
    from megatron.bridge import AutoBridge

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48,
             "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 96,
             "max_position_embeddings": LENGTH}

    def read(family: str, **settings) -> dict:
        config = getattr(transformers, f"{family}Config")(**{**sizes, **settings})
        config.architectures = [f"{family}ForCausalLM"]
        provider = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
        provider.apply_rope_fusion = provider.moe_permute_fusion = False  # of Transformer Engine
        provider.finalize()
        return _described(folder / f"{family}-{len(settings)}", provider)

    def require(found: dict, **expected) -> None:
        assert {name: found[name] for name in expected} == expected
        ModelConfig(**{name: found[name] for name in _NAMES & found.keys()
                       if found[name] is not None})

    rope = {"rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 8192}
    require(read("Llama", rope_parameters={**rope, "rope_type": "llama3", "low_freq_factor": 1.0,
                                           "high_freq_factor": 4.0}),
            rotary_base=500000, use_rope_scaling=True, rope_scaling_factor=8.0, num_query_groups=2)
    require(read("Qwen2", tie_word_embeddings=True), add_qkv_bias=True, use_rope_scaling=False,
            untie_embeddings_and_output_weights=False)
    require(read("Qwen3", head_dim=16), qk_layernorm=True, kv_channels=16)
    require(read("Mistral", sliding_window=None), seq_length=LENGTH, norm_epsilon=1e-6)
    with pytest.raises(UserError, match=r"model.window_size \[7, 0\]: this is not supported"):
        read("Mistral", sliding_window=8, head_dim=8)
    require(read("DeepseekV3", num_key_value_heads=4, n_routed_experts=8, n_group=4, topk_group=2,
                 num_experts_per_tok=4, moe_intermediate_size=16, first_k_dense_replace=1,
                 q_lora_rank=10, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=6,
                 v_head_dim=5, rope_parameters={
                     "rope_type": "yarn", "rope_theta": 10000.0, "factor": 40.0, "mscale": 0.7,
                     "mscale_all_dim": 1.0, "beta_fast": 32, "beta_slow": 1,
                     "original_max_position_embeddings": 4096}),
            multi_latent_attention=True, q_lora_rank=10, rope_type="yarn", mscale=0.7,
            rotary_scaling_factor=40.0, num_experts=8, moe_layer_freq="[0,1]", moe_router_topk=4,
            moe_router_score_function="sigmoid", moe_router_topk_scaling_factor=2.5,
            moe_router_num_groups=4, moe_router_group_topk=2, moe_router_enable_expert_bias=True)
    with pytest.raises(UserError, match="model._target_ megatron.bridge.models.gemma"):
        read("Gemma")


@needs_bridge
def test_families_that_bridge_converts_are_described(tmp_path):
    run_on_ranks(1, _read_families, tmp_path)
