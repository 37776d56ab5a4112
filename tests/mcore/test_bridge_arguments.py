"""Settings out of a ``run_config.yaml`` as Megatron-Bridge writes it, and what is refused.

tests/plugins/test_megatron_bridge_checkpoints.py has Bridge write its own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from megatron_direct.config import BatchConfig, ModelConfig, OptimizerConfig, Precision
from megatron_direct.errors import UserError
from megatron_direct.mcore import bridge_arguments
from megatron_direct.mcore.checkpoint import Checkpoint

LLAMA = """
_target_: megatron.bridge.training.config.ConfigContainer
model:
  _target_: megatron.bridge.models.gpt_provider.GPTModelProvider
  activation_func:
    _call_: false
    _target_: torch.nn.functional.silu
  attention_backend:
    _args_: [5]
    _call_: true
    _target_: megatron.core.transformer.enums.AttnBackend
  add_bias_linear: false
  bf16: true
  ffn_hidden_size: 24
  gated_linear_unit: true
  hidden_size: 16
  kv_channels: 4
  layernorm_epsilon: 1.0e-06
  make_vocab_size_divisible_by: 8
  moe_router_topk: 3
  multi_latent_attention: false
  normalization: RMSNorm
  num_attention_heads: 4
  num_layers: 2
  num_moe_experts: null
  num_query_groups: 2
  position_embedding_type: rope
  rope_scaling: true
  rope_scaling_factor: 4.0
  rotary_base: 500000.0
  rotary_percent: 0.5
  rotary_scaling_factor: 2.0
  seq_length: 12
  share_embeddings_and_output_weights: false
  should_pad_vocab: true
  tensor_model_parallel_size: 2
  transformer_layer_spec:
    _call_: false
    _target_: megatron.bridge.models.gpt_provider.default_layer_spec
  vocab_size: 45
  window_size: null
optimizer:
  adam_beta2: 0.97
  clip_grad: 0.5
  lr: 0.003
  min_lr: 0.0003
  use_distributed_optimizer: true
  weight_decay: 0.01
peft: null
rng:
  seed: 7
scheduler:
  end_weight_decay: 0.2
  lr_decay_style: WSD
  lr_warmup_iters: 5
  lr_wsd_decay_style: exponential
tokenizer:
  tokenizer_model: meta-llama/Llama-3.1-8B
train:
  global_batch_size: 32
  micro_batch_size: 2
  train_iters: 9
"""
EXPERTS = """  num_moe_experts: 4
  moe_layer_freq: [0, 1]
  moe_router_pre_softmax: true
"""
LATENTS = """  multi_latent_attention: true
  kv_lora_rank: 8
  rope_type: yarn
  rotary_scaling_factor: 40
  mscale: 0.7
"""


def _checkpoint(folder: Path, text: str = LLAMA) -> Checkpoint:
    (folder / "run_config.yaml").write_text(text)
    return Checkpoint(folder, 1, bridge_arguments.read(folder), False, "")


def _changed(name: str, value: str) -> str:
    """The text with another value of one of the model's settings: of two, the later one counts."""
    return LLAMA.replace("  window_size: null\n", f"  {name}: {value}\n")


def test_settings_are_those_of_the_training(tmp_path):
    found = _checkpoint(tmp_path)
    assert found.settings(ModelConfig, {}) == ModelConfig(
        num_layers=2, hidden_size=16, ffn_hidden_size=24, num_attention_heads=4,
        num_query_groups=2, kv_channels=4, seq_length=12, norm_epsilon=1e-6, rotary_base=500000,
        rotary_percent=0.5, use_rope_scaling=True, rope_scaling_factor=4.0,
        untie_embeddings_and_output_weights=True, vocab_size=48, make_vocab_size_divisible_by=48)
    assert found.settings(OptimizerConfig, {}) == OptimizerConfig(
        lr=0.003, min_lr=0.0003, lr_warmup_iters=5, lr_wsd_decay_style="exponential",
        weight_decay=0.2, adam_beta2=0.97, clip_grad=0.5, use_distributed_optimizer=True)
    assert found.settings(BatchConfig, {}) == BatchConfig(2, 32, 7)
    assert found.settings(Precision, {}) == Precision(bf16=True)
    assert found.tokenizer_digest is None  # a name of Hugging Face's, which is no file here
    with pytest.raises(UserError, match="--rotary-base 10000 was given, but .* with 500000"):
        found.require_same_model({"rotary_base": 10000})


def test_a_vocabulary_that_was_not_padded_stays_as_it_is(tmp_path):
    found = _checkpoint(tmp_path, _changed("should_pad_vocab", "false"))
    assert found.settings(ModelConfig, {}).padded_vocab_size == 45


def test_experts_latents_and_patterns(tmp_path):
    of_experts = LLAMA.replace("  num_moe_experts: null\n", EXPERTS)
    model = _checkpoint(tmp_path, of_experts).settings(ModelConfig, {})
    assert (model.num_experts, model.moe_layer_freq, model.moe_router_topk) == (4, "[0,1]", 3)
    assert model.moe_router_pre_softmax

    of_latents = (LLAMA.replace("  multi_latent_attention: false\n", LATENTS)
                  .replace("  rotary_scaling_factor: 2.0\n", "")
                  .replace("num_query_groups: 2", "num_query_groups: 4"))
    model = _checkpoint(tmp_path, of_latents).settings(ModelConfig, {})
    assert (model.kv_lora_rank, model.rotary_scaling_factor, model.mscale) == (8, 40, 0.7)

    of_layers = LLAMA.replace("  rope_scaling: true\n", "").replace(
        "gpt_provider.GPTModelProvider", "hybrid.hybrid_provider.HybridModelProvider")
    with pytest.raises(UserError, match="is of a hybrid model without a pattern"):
        _checkpoint(tmp_path, of_layers)
    model = _checkpoint(tmp_path, of_layers.replace(
        "  kv_channels", "  hybrid_layer_pattern: '*-|*-'\n  kv_channels")).settings(
            ModelConfig, {})
    assert (model.hybrid_layer_pattern, model.num_layers) == ("*-*-", 4)


@pytest.mark.parametrize(("name", "value", "match"), [
    ("window_size", "[4096, 0]", r"model.window_size \[4096, 0\]: this is not supported .only No"),
    ("activation_func", "{_call_: false, _target_: megatron.core.activations.squared_relu}",
     "model.activation_func megatron.core.activations.squared_relu: this is not supported"),
    ("activation_func", "{_call_: false, _target_: torch._C._nn.gelu}",
     "only SiLU with a gate and GELU without one"),
    ("_target_", "megatron.bridge.models.gemma.gemma_provider.GemmaModelProvider",
     "model._target_ megatron.bridge.models.gemma"),
    ("transformer_layer_spec", "{_target_: mine.layers, _call_: false}",
     "model.transformer_layer_spec mine.layers"),
    ("transformer_layer_spec", "{_target_: megatron.core.models.gpt.gpt_layer_specs."
     "get_gpt_decoder_block_spec, _partial_: true, _args_: [], qk_l2_norm: true}",
     "model.transformer_layer_spec .*qk_l2_norm"),
    ("position_embedding_type", "yarn", "model.position_embedding_type yarn"),
    ("layernorm_zero_centered_gamma", "true", "model.layernorm_zero_centered_gamma True"),
    ("seq_len_interpolation_factor", "2.0", "model.seq_len_interpolation_factor 2.0"),
    ("softmax_scale", "0.5", "model.softmax_scale 0.5"),
    ("moe_router_load_balancing_type", "sinkhorn", "model.moe_router_load_balancing_type sinkhorn"),
    ("layernorm_epsilon", "null", "has no model.layernorm_epsilon, which Megatron-Bridge writes"),
    ("activation_func", "!!python/name:torch.nn.functional.silu ''", "python/name:torch"),
])
def test_models_that_we_cannot_build_are_refused(tmp_path, name, value, match):
    with pytest.raises(UserError, match=match):
        _checkpoint(tmp_path, _changed(name, value))


def test_gelu_has_the_form_that_it_was_trained_with(tmp_path):
    gelu = LLAMA.replace("torch.nn.functional.silu", "torch._C._nn.gelu").replace(
        "gated_linear_unit: true", "gated_linear_unit: false").replace(
        "add_bias_linear: false", "add_bias_linear: true")
    for fusion in (True, False):
        found = _checkpoint(tmp_path, gelu.replace(
            "  bf16:", f"  bias_activation_fusion: {str(fusion).lower()}\n  bf16:"))
        assert found.settings(ModelConfig, {}).bias_gelu_fusion == fusion


def test_a_checkpoint_of_adapters_is_refused(tmp_path):
    with pytest.raises(UserError, match="was trained with peft .*dim.*: this is not supported"):
        _checkpoint(tmp_path, LLAMA.replace("peft: null", "peft: {dim: 8}"))


def test_another_yarn_than_ours_is_refused(tmp_path):
    text = LLAMA.replace("  multi_latent_attention: false\n", LATENTS + "  beta_fast: 16\n")
    with pytest.raises(UserError, match="model.beta_fast 16: this is not supported .only 32"):
        _checkpoint(tmp_path, text)
    _checkpoint(tmp_path, text.replace("rope_type: yarn", "rope_type: rope"))


def test_a_converted_model_has_no_settings_of_a_training(tmp_path):
    found = _checkpoint(tmp_path, LLAMA[:LLAMA.index("optimizer:")] + "optimizer: {lr: null, "
                        "adam_beta2: 0.999}\ntrain: null\nscheduler: null\n")
    assert found.settings(OptimizerConfig, {}) == OptimizerConfig()


def test_nothing_in_the_file_is_run(tmp_path):
    created = tmp_path / "created"
    for attack in (f"!!python/object/apply:os.mkdir [{created}]",
                   f"{{_target_: os.mkdir, _call_: true, _args_: [{created}]}}"):
        found = _checkpoint(tmp_path, LLAMA + f"extra: {attack}\n")
        assert found.arguments["num_layers"] == 2 and not created.exists()


def test_another_class_is_refused_whatever_its_settings_are(tmp_path):
    with pytest.raises(UserError, match="model._target_ megatron.training.models.gpt.GPTModelConf"):
        _checkpoint(tmp_path, "model: {_target_: megatron.training.models.gpt.GPTModelConfig}")


@pytest.mark.parametrize(("text", "match"), [
    ("model: [", "run_config.yaml is damaged: it is not YAML"),
    ("- 1", "run_config.yaml is damaged: expected sections such as model, found '.1.'"),
    ("model: 3", "run_config.yaml is damaged: expected settings under model, found '3'"),
    ("", "run_config.yaml is damaged"),
    ("train: {}", "has no model._target_, model.num_layers, .* Copy the file again"),
])
def test_a_damaged_file_is_named(tmp_path, text, match):
    with pytest.raises(UserError, match=match):
        _checkpoint(tmp_path, text)


def test_a_checkpoint_that_says_nothing_of_its_model_needs_what_no_tensor_shows(tmp_path):
    found = Checkpoint(tmp_path, 1, bridge_arguments.read(tmp_path), False, "")
    assert found.arguments == {}
    given = {"num_attention_heads": 4, "seq_length": 8, "norm_epsilon": 1e-5,
             "position_embedding_type": "rope", "make_vocab_size_divisible_by": 1,
             "rotary_base": 500, "rotary_percent": 1.0, "use_rope_scaling": False}
    with pytest.raises(UserError, match="carries no arguments: expected those of Megatron-LM, or "
                                        "the run_config.yaml .* --seq-length --norm-epsilon .* "
                                        "--use-rope-scaling are missing"):
        found.settings(ModelConfig, {"num_attention_heads": 4})
    assert found.settings(ModelConfig, given) == ModelConfig(**given)
    for more, missing in (
            ({"use_rope_scaling": True}, "needed: --rope-scaling-factor are missing"),
            ({"num_experts": 4}, "needed: --moe-router-topk .* --moe-router-group-topk are"),
            ({"multi_latent_attention": True}, "needed: --rope-type .* --mscale-all-dim are"),
            ({"hybrid_layer_pattern": "M-"}, "needed: --mamba-state-dim --mamba-num-groups are")):
        with pytest.raises(UserError, match=missing):
            found.settings(ModelConfig, given | more)
    for name in ("rotary_base", "rotary_percent", "use_rope_scaling"):
        del given[name]
    found.settings(ModelConfig, given | {"position_embedding_type": "learned_absolute"})


def test_every_flag_that_may_be_asked_for_is_one(tmp_path):
    from megatron_direct.mcore import arguments

    asked = arguments._not_shown_by_tensors({
        "use_rope_scaling": True, "multi_latent_attention": True, "num_experts": 1,
        "hybrid_layer_pattern": "M"})
    assert set(asked) <= {f.name for f in dataclasses.fields(ModelConfig)}
