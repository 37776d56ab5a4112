"""What becomes of an arm that cannot be run, and of the files of those that share an annealing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from indexed_files import write_dataset

from megatron_direct.comparison import replicates
from megatron_direct.comparison.arms import Arm, find_arm
from megatron_direct.comparison.replicates import Replicate, run_together
from megatron_direct.data.samples import Samples
from megatron_direct.selection import InfeasibleQuotas, InfeasibleSelection


@dataclass
class _Case:
    """In the place of what an arm may know."""


def _replicates(folder: Path, *arms: Arm) -> list[Replicate]:
    setting = SimpleNamespace(arm_folder=lambda name, seed: folder / name / str(seed))
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


def test_a_dataset_is_weighed_by_whole_documents_as_the_whole_pool_is(tmp_path):
    """Two documents each: of 41 tokens, of which samples have 9 labels at most, and of 11."""
    prefixes = [write_dataset(tmp_path / name, [[list(range(length))]] * 2)
                for name, length in (("long", 41), ("short", 11))]
    setting = SimpleNamespace(onset=SimpleNamespace(pool=Samples(prefixes, seq_length=9)))
    found = replicates._blend(Replicate(setting, find_arm("dataset:short"), 1, {}))
    assert found.weights == pytest.approx([0.8 / 2, 0.2 / 2 + 0.5])
