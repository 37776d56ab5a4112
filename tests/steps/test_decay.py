"""How an annealing comes to rest: a mean of states, and the rate at its end."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import Layout, on_layout
from trained import LEARNT

from megatron_direct.config import Job
from megatron_direct.mcore import blend, checkpoint, model, training_folder
from megatron_direct.mcore.checkpoint import Checkpoint, open_checkpoint
from megatron_direct.mcore.training import DecaySteps, anneal_over, make_trainer, read_metrics
from megatron_direct.steps.decay import Decay, Recipe, Segment, _say_what_changes, decay

ITERATIONS = 8


def _weights(chunks) -> list[np.ndarray]:
    return [p.detach().numpy().copy() for chunk in chunks for p in chunk.parameters()]


def _anneal(folder, name, layout, recipe, **how):
    """The chunks at the end."""
    start = open_checkpoint(str(folder / "theta"))
    job = Job(LEARNT.model, layout, LEARNT.optimizer, LEARNT.batch)
    request = blend.BlendRequest.for_job(job, ITERATIONS, 1, folder / name / "cache",
                                         start.tokenizer_digest)
    dataset, _ = blend.build_blend(blend.Blend([str(folder / "a")]), {}, request)
    chunks = model.build(job)
    decay(Decay(job, start, [Segment(0, dataset)], ITERATIONS, folder / name, "",
                recipe=recipe, **how), chunks)
    return chunks


def _mean_and_states(_, layout, folder):
    averaged = _weights(_anneal(folder, "averaged", layout, Recipe(average=0.25)))
    chunks = _anneal(folder, "plain", layout, Recipe(), save_interval=1)
    states = []
    for number in (ITERATIONS - 1, ITERATIONS):
        path = folder / "plain" / "checkpoints" / f"iter_{number:07d}"
        checkpoint.load_model(path, chunks)
        states.append(_weights(chunks))
    return averaged, states


def test_the_last_quarter_of_eight_states_is_the_mean_of_two(learnt_folder):
    averaged, (first, last) = on_layout(Layout(), _mean_and_states, LEARNT.model, learnt_folder)[0]
    for found, one, other in zip(averaged, first, last, strict=True):
        # 1e-6: sums in float32.
        np.testing.assert_allclose(found, (one + other) / 2, atol=1e-6)
    assert any(np.abs(one - other).max() > 1e-5 for one, other in zip(first, last, strict=True))


def _settings_of_adam(_, layout, folder):
    """At the end of an annealing that was given others than the checkpoint's."""
    start = open_checkpoint(str(folder / "theta"))
    optimizer = dataclasses.replace(LEARNT.optimizer, adam_beta1=0.5, adam_beta2=0.99,
                                    adam_eps=1e-4)
    job = Job(LEARNT.model, layout, optimizer, LEARNT.batch)
    trainer = make_trainer(model.build(job), optimizer, LEARNT.batch)
    checkpoint.load_training(start.path, trainer.chunks, trainer.optimizer, trainer.scheduler)
    anneal_over(trainer, optimizer, LEARNT.batch, DecaySteps(0, 0, ITERATIONS))
    return [(group["betas"], group["eps"]) for group in trainer.optimizer.param_groups]


def test_adam_has_the_settings_that_were_given(learnt_folder):
    found, = on_layout(Layout(), _settings_of_adam, LEARNT.model, learnt_folder)
    assert found and all(settings == ((0.5, 0.99), 1e-4) for settings in found)


@pytest.mark.parametrize(("start", "said"), [
    ({"lr_reached": 1e-4}, "begins at 0.001, but the training had come down to 0.0001 at theta. "
                           "Give --lr 0.0001"),
    ({"lr_reached": 1e-3}, ""), ({}, ""),
    ({"is_optimizer_of_one_layout": True}, "with a fresh optimizer, for that of theta lies as in "),
    ({"arguments": {"hidden_dropout": 0.1, "attention_dropout": 0.0}},
     "without dropout, which the training had (--hidden-dropout)")])
def test_it_is_said_where_the_annealing_does_not_go_on_as_the_training_was(start, said, capsys):
    found = Checkpoint(**{**dict(path=Path("theta"), iteration=1, arguments={}, has_optimizer=True,
                                 digest="0"), **start})
    job = Job(LEARNT.model, Layout().config(), dataclasses.replace(LEARNT.optimizer, lr=1e-3))
    _say_what_changes(Decay(job, found, [], 1, Path("."), "the arm",
                            load_optim=found.has_readable_optimizer))
    printed = capsys.readouterr().out
    assert said in printed and bool(said) == bool(printed)


def _rates(_, layout, folder, final):
    _anneal(folder, f"final-{final}", layout, Recipe(final=final))
    return [line["lr"] for line in read_metrics(folder / f"final-{final}" / "metrics.jsonl")]


@pytest.mark.parametrize("final", [1.0, 0.3])
def test_the_rate_falls_to_the_share_that_is_asked_for(learnt_folder, final):
    rates = on_layout(Layout(), _rates, LEARNT.model, learnt_folder, final)[0]
    # Linear: the rate of the last iteration is one step above that of the end.
    expected = LEARNT.optimizer.lr * (1 - (1 - final) * np.arange(ITERATIONS) / ITERATIONS)
    np.testing.assert_allclose(rates, expected, rtol=1e-6)


def _resumed_blindly(_, layout, folder):
    """Iterations of the second of two calls, in which rank 1 may not look for checkpoints: on a
    network file system it could see an older one than rank 0 does."""
    _anneal(folder, "blind", layout, Recipe(), save_interval=3, stop=3)
    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            patch.delattr(training_folder, "latest")
        _anneal(folder, "blind", layout, Recipe(), save_interval=3)
    return [line["iteration"] for line in read_metrics(folder / "blind" / "metrics.jsonl")]


def test_all_ranks_resume_from_the_checkpoint_that_rank_zero_sees(learnt_folder):
    done = on_layout(Layout(dp=2), _resumed_blindly, LEARNT.model, learnt_folder)[0]
    assert done == list(range(1, ITERATIONS + 1))
