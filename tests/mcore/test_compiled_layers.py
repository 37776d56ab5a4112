"""Training with compiled layers: the same losses, and what cannot be compiled runs as it is.

The backend is aot_eager, which traces layers and their backward passes as the default one does and
needs no compiler.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil

import pytest
import torch
from ranks import Layout, on_layout
from tiny_models import MODELS
from trained_checkpoint import BATCH, train_on

from megatron_direct.config import Execution, Job, OptimizerConfig
from megatron_direct.mcore import compiled_layers, shards, training
from megatron_direct.mcore import model as models

# Compiled parts add up in another order, which Adam's first steps make larger.
LOSS_RTOL = 1e-5


def _trainer(model, layout):
    chunks = models.build(Job(model, layout), seed=5)
    return training.make_trainer(chunks, OptimizerConfig(lr=1e-3, lr_warmup_iters=6), BATCH)


def _losses(model, layout, backend):
    """(losses as it is, losses compiled, what was printed meanwhile)."""
    torch._dynamo.reset()
    plain = train_on(_trainer(model, layout), model, 0)
    trainer = _trainer(model, layout)
    names = [shard.name for shard in shards.parameter_shards(trainer.chunks)]
    trainer.compiled = compiled_layers.CompiledLayers(trainer.chunks, backend)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        compiled = train_on(trainer, model, 0)
    assert names == [shard.name for shard in shards.parameter_shards(trainer.chunks)]
    assert not any("forward" in vars(module)
                   for chunk in trainer.chunks for module in chunk.modules())
    return plain, compiled, printed.getvalue()


def _losses_and_count(model, layout):
    count = [0]

    def counted(graph, inputs):
        count[0] += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    return *_losses(model, layout, counted), count[0]


@pytest.mark.parametrize(("name", "layout"), [
    ("llama-tied", Layout()), ("llama-tied", Layout(tp=2)),
    ("deepseek-v3", Layout()),  # its second layer has experts
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        ("llama-tied", Layout(tp=2, sp=True)), ("gpt2-untied", Layout(pp=2)),
        ("nemotron-h", Layout())))], ids=str)
def test_compiled_layers_train_to_the_same_losses(name, layout):
    for plain, compiled, printed, count in on_layout(layout, _losses_and_count, MODELS[name]):
        assert compiled == pytest.approx(plain, rel=LOSS_RTOL)
        assert count > 0 and not printed


def _count_of_each_model(model, layout, layers):
    """Graphs that were compiled for each of three models, one after the other."""
    torch._dynamo.reset()
    counts = []

    def counted(graph, inputs):
        counts[-1] += 1
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    for _ in range(3):
        counts.append(0)
        trainer = _trainer(dataclasses.replace(model, num_layers=layers), layout)
        trainer.compiled = compiled_layers.CompiledLayers(trainer.chunks, counted)
        train_on(trainer, model, 0)
    return counts


def test_one_compilation_serves_all_layers_and_the_models_that_follow():
    # More layers than torch compiles a function for (8).
    of_two, of_ten = (on_layout(Layout(), _count_of_each_model, MODELS["llama-tied"], layers)[0]
                      for layers in (2, 10))
    assert of_two == of_ten
    assert of_two[0] > 0 and of_two[1:] == [0, 0]


def _broken(graph, inputs):
    raise OSError("no compiler here")


def _backward_broken(graph, inputs):
    from torch._dynamo.backends.common import aot_autograd

    return aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=_broken)(graph, inputs)


@pytest.mark.parametrize(("layout", "backend"), [
    (Layout(), _backward_broken), (Layout(tp=2), _broken),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in (
        (Layout(), _broken), (Layout(tp=2), _backward_broken)))],
    ids=lambda value: getattr(value, "__name__", str(value)))
def test_what_cannot_be_compiled_runs_as_it_is_and_one_rank_says_so(layout, backend):
    ranks = on_layout(layout, _losses, MODELS["llama-tied"], backend)
    for plain, compiled, _ in ranks:
        assert compiled == plain
    said, *others = (printed for _, _, printed in ranks)
    assert said.count("\n") == 1 and not any(others)
    assert "could not be compiled on rank 0" in said and "no compiler here" in said


def test_a_model_without_a_layer_to_compile_is_named():
    (plain, compiled, printed), = on_layout(Layout(), _losses, MODELS["mixtral"], "aot_eager")
    assert compiled == plain
    assert "--torch-compile has no effect" in printed


def _train_where_a_layer_fails(model, layout):
    torch._dynamo.reset()
    trainer = _trainer(model, layout)
    norm = next(module for module in trainer.chunks[0].modules()
                if isinstance(module, torch.nn.RMSNorm))
    norm.forward = lambda hidden: hidden @ torch.ones(3, 3)
    trainer.compiled = compiled_layers.CompiledLayers(trainer.chunks, "aot_eager")
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        train_on(trainer, model, 0)


def test_an_error_of_the_model_is_raised():
    on_layout(Layout(), _train_where_a_layer_fails, MODELS["llama-tied"])


def _train_with_the_flag(model, layout):
    plain = train_on(_trainer(model, layout), model, 0)
    trainer = training.make_trainer(models.build(Job(model, layout), seed=5),
                                    OptimizerConfig(lr=1e-3, lr_warmup_iters=6), BATCH,
                                    Execution(torch_compile=True))
    return plain, train_on(trainer, model, 0)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch's default backend needs a C++ compiler")
def test_the_default_backend_trains_to_the_same_losses():
    (plain, compiled), = on_layout(Layout(), _train_with_the_flag, MODELS["llama-tied"])
    assert compiled == pytest.approx(plain, rel=LOSS_RTOL)
