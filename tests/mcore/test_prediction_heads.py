"""Heads for multi-token prediction: trained beside the model, saved with it, left out of gradients
of samples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from ranks import Layout, RankError, on_layout
from tiny_models import MODELS, VOCAB_SIZE
from weights import assemble, fill_by_hash, pieces

from megatron_direct.config import BatchConfig, Job, ModelConfig, OptimizerConfig
from megatron_direct.errors import UserError
from megatron_direct.mcore import checkpoint, compat, training
from megatron_direct.mcore import model as models
from megatron_direct.mcore.shards import parameter_shards

NUM_HEADS, FACTOR = 2, 0.3


def _has_hybrid_heads() -> bool:
    _, kinds_of_layers = compat.hybrid_stack()
    return "mtp_block_spec" in {field.name for field in dataclasses.fields(kinds_of_layers)}


needs_hybrid_heads = pytest.mark.skipif(
    not _has_hybrid_heads(), reason="hybrid models have prediction heads since megatron-core 0.17")


def _with_heads(name: str, **settings) -> ModelConfig:
    pattern = MODELS[name].hybrid_layer_pattern
    if pattern is not None:  # a head has the last two kinds of layers
        settings["hybrid_layer_pattern"] = pattern + NUM_HEADS * f"/{pattern[-2:]}"
    return dataclasses.replace(MODELS[name], **{
        "mtp_num_layers": NUM_HEADS, "mtp_loss_scaling_factor": FACTOR} | settings)


def _sequences(count: int, length: int) -> list[dict[str, torch.Tensor]]:
    """Without labels at the first positions: as many are left to each head as to the model, and
    versions that divide a head's loss by another count agree."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCAB_SIZE, (count, length + 1), generator=generator)
    mask = (torch.arange(length) >= NUM_HEADS).float()
    return [{"tokens": row[:-1], "labels": row[1:], "loss_mask": mask,
             "position_ids": torch.arange(length)} for row in tokens]


def _build(model, layout, **settings):
    chunks = models.build(Job(model, layout), **settings)
    fill_by_hash(parameter_shards(chunks), scale=0.2)
    return chunks


# --- training ---------------------------------------------------------------------------------


def _loss_by_hand(chunk, sequences) -> torch.Tensor:
    """DeepSeek-V3's: the mean loss, and FACTOR times the mean of the heads' mean losses."""
    tokens, labels, mask, positions = (torch.stack([row[key] for row in sequences]) for key in (
        "tokens", "labels", "loss_mask", "position_ids"))
    states, logits = [], []
    watches = [chunk.decoder.register_forward_hook(lambda *call: states.append(call[2])),
               chunk.output_layer.register_forward_hook(  # before the loss writes over them
                   lambda *call: logits.append(call[2][0].clone()))]
    chunk(tokens, positions, None, labels=labels)
    for watch in watches:
        watch.remove()
    weight = (chunk.shared_embedding_or_output_weight()
              if chunk.share_embeddings_and_output_weights else chunk.output_layer.weight)
    rotary = chunk.rotary_pos_emb(tokens.shape[1]) if (
        chunk.position_embedding_type == "rope" and not chunk.config.multi_latent_attention
    ) else None

    def mean_loss(outputs, depth):
        """Position t predicts the label at t + depth."""
        length = tokens.shape[1] - depth
        losses = torch.nn.functional.cross_entropy(
            (outputs[:length] @ weight.T).permute(1, 2, 0), labels[:, depth:], reduction="none")
        counted = mask[:, depth:]
        return (losses * counted).sum() / counted.sum()

    state = states[0]
    total = mean_loss(state, 0)
    torch.testing.assert_close(state @ weight.T, logits[-1])
    for depth, head in enumerate(chunk.mtp.layers, start=1):
        # The tokens behind a sequence's last are zeros, as Megatron has them: no loss sees them.
        ahead = torch.nn.functional.pad(tokens[:, depth:], (0, depth))
        embedded = chunk.embedding(ahead, torch.nn.functional.pad(positions[:, depth:], (0, depth)))
        both = torch.cat([head.enorm(embedded), head.hnorm(state)], -1)
        layer = head.transformer_layer if hasattr(head, "transformer_layer") \
            else head.mtp_model_layer
        state = layer(both @ head.eh_proj.weight.T, attention_mask=None, rotary_pos_emb=rotary)
        # A stack of layers gives its output alone, a layer also a context.
        state = head.final_layernorm(state[0] if isinstance(state, tuple) else state)
        total = total + FACTOR / NUM_HEADS * mean_loss(state, depth)
    return total


def _gradients(model, layout):
    """(gradients of one iteration by name, those of the loss by hand)"""
    sequences, batch = _sequences(4, model.seq_length), BatchConfig(4, 4)
    chunks = _build(model, layout)
    parameters = dict(chunks[0].named_parameters())
    loss = _loss_by_hand(chunks[0], sequences)
    expected = dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())),
                        strict=True))
    trainer = training.make_trainer(chunks, OptimizerConfig(clip_grad=0.0), batch)
    training.train(trainer, training.Feed(sequences, batch), range(1), "", lambda step: None)
    return ({name: parameter.main_grad.numpy() for name, parameter in parameters.items()},
            {name: gradient.numpy() for name, gradient in expected.items()})


@pytest.mark.parametrize("name", [
    "llama-tied", "deepseek-v3",
    pytest.param("hybrid-experts", marks=needs_hybrid_heads),
    pytest.param("nemotron-h", marks=needs_hybrid_heads)])
def test_training_follows_the_models_and_the_heads_losses(name):
    (found, expected), = on_layout(Layout(), _gradients, _with_heads(name))
    assert any(name.startswith("mtp.") for name in found) and found.keys() == expected.keys()
    for parameter in expected:
        np.testing.assert_allclose(found[parameter], expected[parameter], rtol=1e-4, atol=1e-6,
                                   err_msg=parameter)


def _train(model, layout):
    """Losses and gradient norms of three steps."""
    batch, steps = BatchConfig(micro_batch_size=2, global_batch_size=8), []
    trainer = training.make_trainer(
        _build(model, layout), OptimizerConfig(lr=1e-3, lr_warmup_iters=1), batch)
    training.train(trainer, training.Feed(_sequences(24, model.seq_length), batch), range(1, 4),
                   "train", steps.append)
    return [(step.loss, step.grad_norm) for step in steps]


@pytest.mark.parametrize(("name", "layout"), [
    ("llama-untied", Layout(tp=2, pp=2)),
    ("deepseek-v3", Layout(tp=2, sp=True)),
    pytest.param("nemotron-h", Layout(tp=2, pp=2), marks=needs_hybrid_heads),
    pytest.param("llama-untied", Layout(pp=2), marks=pytest.mark.slow),
    pytest.param("llama-untied", Layout(pp=2, vp=1), marks=pytest.mark.slow),
    pytest.param("llama-tied", Layout(dp=2), marks=pytest.mark.slow),
    pytest.param("deepseek-v3", Layout(dp=2, ep=2), marks=pytest.mark.slow),
], ids=str)
def test_heads_are_trained_alike_in_every_layout(name, layout):
    expected = on_layout(Layout(), _train, _with_heads(name))[0]
    for found in on_layout(layout, _train, _with_heads(name)):
        # Sums in another order; Adam's steps divide by gradients that may be small.
        np.testing.assert_allclose(found, expected, rtol=1e-4)


# --- checkpoints ------------------------------------------------------------------------------


def _state(chunks):
    shards = parameter_shards(chunks)
    return pieces(shards, [shard.parameter for shard in shards])


def _save(model, layout, folder):
    chunks, batch = _build(model, layout), BatchConfig(micro_batch_size=2, global_batch_size=4)
    trainer = training.make_trainer(chunks, OptimizerConfig(), batch)
    training.train(trainer, training.Feed(_sequences(4, model.seq_length), batch), range(1), "",
                   lambda step: None)  # the optimizer has no state before
    checkpoint.save(folder, 7, chunks, trainer.optimizer, trainer.scheduler, vars(model))
    return _state(chunks)


def _load(model, layout, folder):
    """(as it was saved, without the heads), each with the optimizer."""
    found, states = checkpoint.open_checkpoint(folder), []
    for given in ({}, {"mtp_num_layers": 0}):
        found.require_same_model(given)
        chunks = models.build(Job(found.settings(ModelConfig, given), layout), seed=5)
        trainer = training.make_trainer(chunks, OptimizerConfig(), BatchConfig())
        checkpoint.load_training(found.path, chunks, trainer.optimizer, trainer.scheduler)
        states.append(_state(chunks))
    of_main_loss = models.build(Job(model, layout).of_main_loss, seed=6)
    checkpoint.load_model(found.path, of_main_loss)
    assert not any(shard.name.startswith("mtp.") for shard in parameter_shards(of_main_loss))
    return states


@pytest.mark.parametrize(("name", "written", "read"), [
    ("llama-untied", Layout(pp=2), Layout(tp=2)),
    pytest.param("deepseek-v3", Layout(tp=2, sp=True), Layout(dp=2), marks=pytest.mark.slow),
    pytest.param("hybrid-experts", Layout(pp=2), Layout(tp=2, sp=True), marks=needs_hybrid_heads),
], ids=str)
def test_heads_are_saved_and_read_in_another_layout_or_left_out(name, written, read, tmp_path):
    saved = assemble(on_layout(written, _save, _with_heads(name), str(tmp_path)))
    loaded = on_layout(read, _load, _with_heads(name), str(tmp_path))
    whole, main = (assemble([rank[number] for rank in loaded]) for number in range(2))
    assert whole.keys() == saved.keys() and any(name.startswith("mtp.") for name in saved)
    assert main.keys() == {name for name in saved if not name.startswith("mtp.")}
    for state in (whole, main):
        for parameter, values in state.items():
            np.testing.assert_array_equal(values, saved[parameter])


# --- flags ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "count", "match"), [
    ("*-*E", 1, "has 0 prediction heads, but --mtp-num-layers is 1"),
    ("*-*E/*-", None, "has 1 prediction heads, but --mtp-num-layers is None"),
    ("*-*E/*-/*E", 2, "of different layers"),
    ("*-*E/*X", 1, "layer 5 is X"),
])
def test_heads_of_a_hybrid_model_that_its_pattern_does_not_have_are_refused(pattern, count, match):
    with pytest.raises(UserError, match=match):
        dataclasses.replace(MODELS["hybrid-experts"], hybrid_layer_pattern=pattern,
                            mtp_num_layers=count)


def test_tied_embeddings_of_heads_in_a_pipeline_are_refused():
    """Megatron's sharded_state_dict ends in an AssertionError for them."""
    job = Job(_with_heads("llama-tied"), Layout(pp=2).config())
    with pytest.raises(UserError, match="--mtp-num-layers 2 .* --mtp-num-layers 0"):
        job.require_runs_on(2, trains=True)
    job.of_main_loss.require_runs_on(2, trains=True)


@pytest.mark.skipif(_has_hybrid_heads(), reason="this megatron-core builds them")
def test_heads_of_a_hybrid_model_are_refused_where_megatron_has_none():
    with pytest.raises(RankError, match="Leave them out with --mtp-num-layers 0, or install 0.17"):
        on_layout(Layout(), _train, _with_heads("nemotron-h"))


@pytest.mark.parametrize("setting", ["mtp_use_repeated_layer", "mtp_detach_heads"])
def test_settings_that_a_version_lacks_are_refused(setting):
    from megatron.core.transformer import TransformerConfig

    model = _with_heads("llama-untied", **{setting: True})
    if setting in {field.name for field in dataclasses.fields(TransformerConfig)}:
        expected, detached = (on_layout(Layout(), _train, of)[0] for of in (
            _with_heads("llama-untied"), model))
        assert expected[0][0] == pytest.approx(detached[0][0])  # the model's own loss
        assert expected[0][1] != pytest.approx(detached[0][1], rel=1e-3)
    else:
        with pytest.raises(RankError, match=f"no --{setting.replace('_', '-')}. Install"):
            on_layout(Layout(), _train, model)
