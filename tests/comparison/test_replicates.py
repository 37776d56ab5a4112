"""What becomes of an arm that cannot be run, and of the files of those that share an annealing."""

from __future__ import annotations

import contextlib
import json
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from indexed_files import write_dataset

from megatron_direct.comparison import replicates
from megatron_direct.comparison.arms import Arm, find_arm
from megatron_direct.comparison.replicates import Replicate, Taken, run_together
from megatron_direct.data.samples import Samples
from megatron_direct.errors import NothingFits
from megatron_direct.mcore import grid, model
from megatron_direct.runtime.stopping import Stopped
from megatron_direct.selection import InfeasibleQuotas, InfeasibleSelection


@dataclass
class _Case:
    """In the place of what an arm may know."""


_JOB = SimpleNamespace(layout=None, num_model_chunks=1, model=None, batch=None)


@pytest.fixture
def _no_model(monkeypatch):
    monkeypatch.setattr(grid, "model_parallel", lambda *_: contextlib.nullcontext())
    monkeypatch.setattr(model, "build", lambda *_: [])


def _replicates(folder: Path, *arms: Arm) -> list[Replicate]:
    setting = SimpleNamespace(arm_folder=lambda name, seed: folder / name / str(seed),
                              onset=SimpleNamespace(job=_JOB))
    return [Replicate(setting, arm, 1, {}) for arm in arms]


@pytest.mark.parametrize("error", [InfeasibleSelection(1.0, 30, 2.0), InfeasibleQuotas("too few")])
def test_arms_that_can_take_nothing_fail_alone(tmp_path, error, capsys):
    def choose(case):
        raise error

    run_together(_replicates(tmp_path, Arm("one", "", choose), Arm("one-averaged", "", choose)),
                 _Case())
    said = capsys.readouterr().out
    for name in ("one", "one-averaged"):
        failed = json.loads((tmp_path / name / "1" / "failed.json").read_text())
        assert failed == {"error": str(error)}
        assert f"{name}, seed 1: {error}" in said


@pytest.mark.parametrize("error", [NothingFits("--quotas: too few"), FloatingPointError("nan")])
def test_rounds_that_cannot_be_gone_on_with_fail_alone(tmp_path, monkeypatch, error, capsys):
    """A selection of any of them, or the annealing."""
    def train():
        raise error

    monkeypatch.setattr(replicates, "_rounds_of", lambda _: SimpleNamespace(train=train))
    arm, = _replicates(tmp_path, find_arm("direct-rounds"))
    run_together([arm], _Case())
    assert json.loads((arm.folder / "failed.json").read_text()) == {"error": str(error)}
    assert f"direct-rounds, seed 1: {error}" in capsys.readouterr().out


@pytest.mark.usefixtures("_no_model")
def test_a_kill_between_two_results_of_an_annealing_leaves_the_curve_of_the_first(
        tmp_path, monkeypatch):
    one, averaged = _replicates(tmp_path, find_arm("random"), find_arm("random-averaged"))

    def run(annealing, chunks, before_averaging):
        averaged.folder.mkdir(parents=True)
        (averaged.folder / "metrics.jsonl").write_text("losses")
        before_averaging()
        raise Stopped(signal.SIGTERM)

    def write(replicate, *_):
        (replicate.folder / "result.json").touch()

    for name, stand_in in (("_take", lambda *_: Taken(np.arange(3))), ("_blend", lambda _: None),
                           ("losses_on_test_sets", lambda *_: {"test": {"a": 1.0}}),
                           ("_write", write)):
        monkeypatch.setattr(replicates, name, stand_in)
    monkeypatch.setattr(replicates._Annealing, "run", run)
    with pytest.raises(Stopped):
        run_together([one, averaged], _Case())
    assert {path.name for path in one.folder.iterdir()} == {"metrics.jsonl", "result.json"}
    assert (one.folder / "metrics.jsonl").read_text() == "losses"


@pytest.mark.usefixtures("_no_model")
@pytest.mark.parametrize("diverges", [True, False])
def test_an_annealing_of_the_search_that_diverges_is_infinitely_bad(
        tmp_path, monkeypatch, diverges):
    """While it is annealed, or only by its validation loss."""
    def run(*_):
        if diverges:
            raise FloatingPointError("the loss of iteration 3 is not finite")

    search = SimpleNamespace(completed=lambda case, anneal: anneal(1, np.arange(3)))
    onset = SimpleNamespace(job=_JOB, pool=SimpleNamespace(prefixes=["pool"]),
                            valid=SimpleNamespace(prefixes=["valid"]))
    monkeypatch.setattr(replicates._Annealing, "run", run)
    monkeypatch.setattr(replicates, "set_losses", lambda *_, **__: {"valid": {"valid": np.nan}})
    monkeypatch.setattr(replicates, "ceiling_search", lambda _: search)
    assert replicates.with_ceiling(SimpleNamespace(folder=tmp_path, onset=onset), None) == np.inf


def test_a_dataset_is_weighed_by_whole_documents_as_the_whole_pool_is(tmp_path):
    """Two documents each: of 41 tokens, of which samples have 9 labels at most, and of 11."""
    prefixes = [write_dataset(tmp_path / name, [[list(range(length))]] * 2)
                for name, length in (("long", 41), ("short", 11))]
    setting = SimpleNamespace(onset=SimpleNamespace(pool=Samples(prefixes, seq_length=9)))
    found = replicates._blend(Replicate(setting, find_arm("dataset:short"), 1, {}))
    assert found.weights == pytest.approx([0.8 / 2, 0.2 / 2 + 0.5])
