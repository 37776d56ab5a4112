"""``--torch-compile`` reaches the training of every command that has it, and no key of a run."""

from __future__ import annotations

import contextlib
import io
import json

import flat_requests
import pytest
import torch
from ranks import Layout, run_on_ranks
from trained import LEARNT

from megatron_direct.commands.alternate import AlternateRequest, alternate
from megatron_direct.commands.anneal import anneal
from megatron_direct.commands.arm import AnnealRequest
from megatron_direct.commands.compare import CompareRequest, compare
from megatron_direct.commands.pretrain import PretrainConfig, PretrainRequest, pretrain
from megatron_direct.commands.select import SelectRequest, select
from megatron_direct.config import Execution
from megatron_direct.mcore.checkpoint import open_checkpoint

ITERATIONS = 4


def _said(command, make, flag) -> tuple[str, int]:
    """(what the command prints, how many functions it compiles); with a backend that needs no
    compiler."""
    compile, compiled, printed = torch.compile, [], io.StringIO()

    def without_compiler(function, **options):
        compiled.append(function)
        return compile(function, **{**options, "backend": "aot_eager"})

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(torch, "compile", without_compiler)
        command(make(flag))
    return printed.getvalue(), len(compiled)


def _pretraining(folder, name):
    return lambda flag: PretrainRequest(
        PretrainConfig(data_path=(str(folder / "a"),), save=str(folder / name),
                       train_iters=ITERATIONS),
        LEARNT.model, Layout().config(), LEARNT.optimizer, LEARNT.batch,
        execution=Execution(flag))


def _selecting(folder, name):
    return {"load": str(folder / "theta"), "run_dir": str(folder / name),
            "data_path": (str(folder / "a"), str(folder / "b")),
            "valid_data_path": (str(folder / "valid"),), "sketch_size": 64,
            "num_eigenpairs": 4, "num_select": 40}


def _annealing(folder, name):
    return lambda flag: flat_requests.make(
        AnnealRequest, Layout().config(), run_dir=str(folder / name), torch_compile=flag,
        lr_wsd_decay_iters=ITERATIONS)


def _alternating(folder, name):
    return lambda flag: flat_requests.make(
        AlternateRequest, Layout().config(), **_selecting(folder, name), torch_compile=flag,
        rounds=1, lr_wsd_decay_iters=ITERATIONS)


def _comparing(folder, name):
    return lambda flag: flat_requests.make(
        CompareRequest, Layout().config(), **_selecting(folder, name), torch_compile=flag,
        lr_wsd_decay_iters=ITERATIONS, test_data_path=(str(folder / "test"),), arms=("random",),
        num_seeds=1)


def _run_twice(folder, name):
    """What each command does with the flag, and then without it in the same folder."""
    if name == "anneal":
        select(flat_requests.make(SelectRequest, Layout().config(), **_selecting(folder, name)))
    command, make = {"pretrain": (pretrain, _pretraining), "anneal": (anneal, _annealing),
                     "alternate": (alternate, _alternating), "compare": (compare, _comparing),
                     }[name]
    return [_said(command, make(folder, name), flag) for flag in (True, False)]


@pytest.mark.parametrize("name", ["pretrain", "anneal", *(
    pytest.param(name, marks=pytest.mark.slow) for name in ("alternate", "compare"))])
def test_every_command_that_trains_compiles_and_is_not_repeated_without_the_flag(
        learnt_folder, name):
    (_, compiled), (said, none) = run_on_ranks(1, _run_twice, learnt_folder, name)[0]
    assert compiled == LEARNT.model.num_layers and none == 0
    if name != "compare":  # which writes its report again
        assert "has already been" in said


def _pretrain_both(folder):
    for name, flag in (("compiled", True), ("plain", False)):
        _said(pretrain, _pretraining(folder, name), flag)


def test_a_compiled_training_leaves_the_losses_and_the_checkpoint_of_a_plain_one(learnt_folder):
    run_on_ranks(1, _pretrain_both, learnt_folder)
    losses, saved = [], []
    for name in ("compiled", "plain"):
        lines = (learnt_folder / name / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
        saved.append(open_checkpoint(str(learnt_folder / name)))
    # Compiled parts add up in another order, which Adam's first steps make larger.
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert saved[0].arguments == saved[1].arguments
