"""``plan`` as it is called: what it prints, and what it refuses."""

from __future__ import annotations

import pytest

from megatron_direct.cli.main import call, make_parser
from megatron_direct.errors import UserError


def _plan(capsys, *flags):
    call(make_parser(["plan"]).parse_args(["plan", *flags]))
    return capsys.readouterr().out


def test_every_stage_has_its_time_memory_and_traffic(capsys):
    printed = _plan(capsys, "--shape", "8b", "--candidates", "1e7", "--gpus", "64",
                    "--use-distributed-optimizer", "--lr-wsd-decay-iters", "500")
    lines = printed.splitlines()
    assert lines[0].startswith("1e+07 candidates, 1.02e+10 tokens; 64 ranks: TP ")
    assert [line.split()[0] for line in lines[2:-1]] == [
        "start", "pilot", "sketches", "curvature", "solve", "masks", "anneal"]
    assert "most of it sketches, limited by computation" in lines[-1]


def test_a_layout_that_is_given_is_kept(capsys):
    printed = _plan(capsys, "--gpus", "64", "--tensor-model-parallel-size", "4",
                    "--sequence-parallel")
    assert "64 ranks: TP 4, PP 1, DP 16" in printed


def test_what_is_missing_is_named(capsys):
    with pytest.raises(UserError, match="--load, --data-path and --valid-data-path are given to"):
        _plan(capsys, "--load", "theta")
    with pytest.raises(UserError, match="no layout of 8 GPUs holds the model"):
        _plan(capsys, "--shape", "deepseek-v3", "--gpus", "8")
