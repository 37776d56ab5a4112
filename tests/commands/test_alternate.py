"""Selection and annealing in turn: against rounds done by hand, and a run that was not killed."""

from __future__ import annotations

import json

import flat_requests
import numpy as np
import pytest
from ranks import Layout, RankError, run_on_ranks
from trained import LEARNT

from megatron_direct.commands.alternate import AlternateConfig, AlternateRequest, alternate
from megatron_direct.commands.anneal import anneal
from megatron_direct.commands.arm import AnnealRequest
from megatron_direct.commands.select import SelectRequest, select
from megatron_direct.data.mask import SampleMask
from megatron_direct.errors import UserError
from megatron_direct.steps import selected

ITERATIONS = 6
SHARED = {"sketch_size": 64, "num_eigenpairs": 6, "num_select": 40, "pilot_iters": 0,
          "sketch_rows": "gathered"}


def _paths(folder, load="theta"):
    return {"load": str(folder / load), "data_path": (str(folder / "a"), str(folder / "b")),
            "valid_data_path": (str(folder / "valid"),)}


def _select(folder, name, load):
    select(flat_requests.make(SelectRequest, Layout().config(), run_dir=str(folder / name),
                              **_paths(folder, load), **SHARED))


def _anneal(folder, name):
    anneal(flat_requests.make(
        AnnealRequest, Layout().config(), run_dir=str(folder / name),
        lr_wsd_decay_iters=ITERATIONS, test_data_path=(str(folder / "test"),)))


def _alternate(folder, layout, name, settings, killed_at=None):
    """killed_at: the iteration after which the run ends, before anything is saved of it."""
    with pytest.MonkeyPatch.context() as patch:
        if killed_at is not None:
            from megatron_direct.mcore.training import MetricsLog

            write = MetricsLog.write

            def die(log, step):
                write(log, step)
                if step.iteration == killed_at:
                    raise RuntimeError("killed")

            patch.setattr(MetricsLog, "write", die)
        alternate(flat_requests.make(
            AlternateRequest, layout.config(), run_dir=str(folder / name), **_paths(folder),
            **{**SHARED, "lr_wsd_decay_iters": ITERATIONS, "rounds": 3, "save_interval": 100,
               "test_data_path": (str(folder / "test"),), **settings}))


def _metrics(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def _result(path):
    return json.loads((path / "result.json").read_text())


def _masks(folder):
    return [SampleMask.load(folder / "masks" / f"{name}.mask.npz").counts for name in "ab"]


@pytest.fixture(scope="module")
def unbroken(learnt_folder):
    run_on_ranks(1, _alternate, learnt_folder, Layout(), "unbroken", {})
    return learnt_folder / "unbroken"


def test_one_round_is_select_and_anneal(learnt_folder):
    run_on_ranks(1, _alternate, learnt_folder, Layout(), "once", {"rounds": 1})
    run_on_ranks(1, _select, learnt_folder, "by-hand", "theta")
    run_on_ranks(1, _anneal, learnt_folder, "by-hand")
    arm = selected.arm_folder(learnt_folder / "by-hand", "direct")
    assert _metrics(learnt_folder / "once") == _metrics(arm)
    for when in ("before", "after"):
        assert _result(learnt_folder / "once")[when] == _result(arm)[when]


@pytest.mark.slow
def test_each_round_selects_at_its_own_checkpoint(learnt_folder, unbroken):
    assert sorted(path.name for path in (unbroken / "checkpoints").glob("iter_*")) == [
        "iter_0000002", "iter_0000004", "iter_0000006"]
    by_hand = {}
    for number, load in enumerate(("theta", "unbroken/checkpoints/iter_0000002",
                                   "unbroken/checkpoints/iter_0000004")):
        run_on_ranks(1, _select, learnt_folder, f"round-{number}", load)
        found, expected = (_masks(selected.selection_folder(run, "direct")) for run in (
            unbroken / "rounds" / str(number), learnt_folder / f"round-{number}"))
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_array_equal(one, other)
        by_hand[number] = np.concatenate(expected)
    assert (by_hand[0] != by_hand[1]).any()
    rounds = _result(unbroken)["rounds"]
    assert [part["first_iteration"] for part in rounds] == [0, 2, 4]
    assert [part["kept"] for part in rounds] == [
        None, *((by_hand[n - 1] & by_hand[n]).sum() for n in (1, 2))]
    # The learning rate falls through all rounds, as in one annealing.
    rates = np.array([line["lr"] for line in _metrics(unbroken)])
    np.testing.assert_allclose(rates, LEARNT.optimizer.lr * (1 - np.arange(ITERATIONS)
                                                             / ITERATIONS), rtol=1e-6)


@pytest.mark.parametrize("killed_at", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_killed_run_ends_with_the_same_losses(learnt_folder, unbroken, killed_at):
    """In the first segment, and at the end of the second, before its checkpoint."""
    name = f"killed-{killed_at}"
    with pytest.raises(RankError, match="killed"):
        run_on_ranks(1, _alternate, learnt_folder, Layout(), name, {}, killed_at)
    run_on_ranks(1, _alternate, learnt_folder, Layout(), name, {})
    assert _metrics(learnt_folder / name) == _metrics(unbroken)
    assert _result(learnt_folder / name) == _result(unbroken)


@pytest.mark.slow
def test_other_layouts_end_with_the_same_losses(learnt_folder, unbroken):
    run_on_ranks(4, _alternate, learnt_folder, Layout(tp=2, pp=2), "sharded", {"rounds": 3})
    found, expected = (_result(path)["after"] for path in (learnt_folder / "sharded", unbroken))
    for kind in ("valid", "test"):
        # Training multiplies rounding: the bound that annealings are held to.
        assert found[kind] == pytest.approx(expected[kind], rel=1e-3)


def test_what_cannot_be_alternated_is_refused(learnt_folder, unbroken):
    with pytest.raises(UserError, match="--rounds 7 is more than --lr-wsd-decay-iters 6"):
        AlternateConfig(rounds=7, lr_wsd_decay_iters=6)
    with pytest.raises(RankError, match="--at merged is not supported by alternate"):
        run_on_ranks(1, _alternate, learnt_folder, Layout(), "merged", {"at": "merged"})
    with pytest.raises(RankError, match="made with other settings: --rounds was 3, now it is 2"):
        run_on_ranks(1, _alternate, learnt_folder, Layout(), "unbroken", {"rounds": 2})
