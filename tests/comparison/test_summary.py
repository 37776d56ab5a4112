"""A summary as ``comparison.json``: what is written is read back equal."""

from __future__ import annotations

import json
import shutil

import pytest
from synthetic_run import sample_texts, write_run

from megatron_direct.comparison.summarise import summarise
from megatron_direct.comparison.summary import ComparisonSummary, read_summary, write_summary
from megatron_direct.errors import UserError

ARMS = {"random": (0.0, 0.0, 0.0), "flat-energy": (-0.4, 0.02, 1.3), "descent": (0.3, 0.02, 1.3)}


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "one", ARMS, seeds=(1, 2, 5),
                     default="descent", num_candidates=60, num_select=15, iterations=12,
                     missing={("flat-energy", 2)}, texts=sample_texts())


@pytest.fixture(scope="module")
def summary(run_dir) -> ComparisonSummary:
    return summarise(run_dir)


def test_a_summary_is_strict_json_and_comes_back_equal(summary, tmp_path):
    write_summary(summary, tmp_path / "comparison.json")
    assert read_summary(tmp_path / "comparison.json") == summary
    value = json.loads(json.dumps(summary.to_json(), allow_nan=False))
    assert ComparisonSummary.from_json(value) == summary


def test_so_does_one_of_a_run_without_results(run_dir, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "arms")
    summary = summarise(copy)
    assert not summary.finished and summary.ranked == ()
    write_summary(summary, tmp_path / "comparison.json")
    assert read_summary(tmp_path / "comparison.json") == summary


def test_the_file_names_arms_verdicts_and_intervals(summary):
    """What a program in another language finds there."""
    value = summary.to_json()
    by_name = {arm["name"]: arm for arm in value["arms"]}
    assert by_name["descent"]["difference"]["verdict"] == "better"
    low, high = by_name["descent"]["difference"]["interval"]
    assert low < by_name["descent"]["difference"]["mean"] < high < 0
    assert by_name["flat-energy"]["missing"] == [2]
    assert value["setting"]["reference"] == "random"


def test_a_summary_of_another_version_is_refused(summary, tmp_path):
    value = summary.to_json()
    del value["arms"][1]["cost"]
    (tmp_path / "comparison.json").write_text(json.dumps(value))
    with pytest.raises(UserError, match=r"arms\[1\].cost is missing.* another version"):
        read_summary(tmp_path / "comparison.json")


def test_arms_are_found_by_name_and_compared_without_the_reference(summary):
    assert summary.arm("descent").name == "descent" and summary.arm("nowhere") is None
    assert [arm.name for arm in summary.ranked] == ["descent", "random"]
    assert [arm.name for arm in summary.measured] == ["descent", "random", "flat-energy"]
    assert [arm.name for arm in summary.compared] == ["descent", "flat-energy"]
