"""``plan`` as it is called: what it prints, and what it refuses."""

from __future__ import annotations

import pytest
from ranks import Layout, run_on_ranks
from trained import SMALL

from megatron_direct.cli.flags import request_from
from megatron_direct.cli.main import call, make_parser
from megatron_direct.commands.plan import PlanRequest, estimated
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError


def _plan(capsys, *flags):
    call(make_parser(["plan"]).parse_args(["plan", *flags]))
    return capsys.readouterr().out


def test_every_stage_has_its_time_memory_and_traffic(capsys):
    printed = _plan(capsys, "--shape", "8b", "--candidates", "1e7", "--gpus", "64",
                    "--use-distributed-optimizer", "--lr-wsd-decay-iters", "500",
                    "--pilot-iters", "20")
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


def _plan_here(folder, measured, flags):
    config = make_parser(["plan"]).parse_args([
        "plan", "--machine", "here", "--load", str(folder / "theta"), "--data-path",
        str(folder / "pool"), "--valid-data-path", str(folder / "valid"), "--sketch-size", "64",
        "--measured-file", str(measured), *flags])
    found, job, ranks, work = estimated(request_from(PlanRequest, config))
    return {stage.name: stage for stage in found.stages}, found.micro_batches, ranks, work


@pytest.mark.parametrize(("layout", "flags"), [
    (Layout(), []),
    (Layout(tp=2), ["--tensor-model-parallel-size", "2", "--sequence-parallel"])], ids=str)
def test_a_plan_for_this_machine_is_made_by_what_is_measured(small_folder, tmp_path, layout,
                                                             flags):
    """The sizes are those of the files; all ranks have the same estimate."""
    results = run_on_ranks(layout.world_size, _plan_here, small_folder, tmp_path / "measured.json",
                           [*flags, "--micro-batch-size", "4", "--pilot-iters", "2"])
    pool = Samples([str(small_folder / "pool")], SMALL.model.seq_length)
    for stages, micro_batches, ranks, work in results:
        assert list(stages) == ["start", "pilot", "sketches", "curvature", "solve", "masks"]
        assert ranks == layout.world_size
        assert work.candidates == len(pool.usable)
        assert work.tokens == pool.num_labels.sum()
        assert micro_batches == -(-len(pool.usable) // 4)
        assert stages == results[0][0]
        # A process holds what Python and torch hold, and no more than a small model adds.
        assert 1e8 < stages["sketches"].device_bytes < 3e9
    assert (tmp_path / "measured.json").is_file()
