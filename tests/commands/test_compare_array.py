"""Seeds of one comparison at the same time in one run directory, a process each."""

from __future__ import annotations

import json
import time
from pathlib import Path

import flat_requests
import pytest
import torch.distributed as dist
from ranks import Layout, run_on_ranks

from megatron_direct.commands import compare as compare_command
from megatron_direct.commands.compare import CompareRequest, compare
from megatron_direct.config import Given

SEEDS = (1, 2)


def _compare(folder: Path, **flags) -> None:
    compare(flat_requests.make(
        CompareRequest, Layout().config(), Given(batch={"micro_batch_size": 2}),
        load=str(folder / "theta"), data_path=(str(folder / "a"),), num_select=30,
        valid_data_path=(str(folder / "valid"),), test_data_path=(str(folder / "test"),),
        run_dir=str(folder / "array"), seed=SEEDS[0], num_seeds=len(SEEDS), arms=("random",),
        sketch_size=32, num_valid_samples=8, num_eigenpairs=2, lr_wsd_decay_iters=2, **flags))


def _at_once(folder: Path) -> None:
    """Each rank is a launch of its own, which runs one seed; the first then writes the report."""
    number, run_together = dist.get_rank(), compare_command.run_together

    def when_all_are_at_work(*arguments) -> None:
        (folder / f"at-work-{number}").touch()
        until = time.monotonic() + 60
        while len(list(folder.glob("at-work-*"))) < len(SEEDS):
            assert time.monotonic() < until, "the other seed is not at work"
            time.sleep(0.05)
        run_together(*arguments)

    dist.barrier()  # both have met
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_command, "run_together", when_all_are_at_work)
        _compare(folder, only_replicate=number)


def test_seeds_are_run_at_once_and_reported_by_the_call_after_them(learnt_folder):
    run_on_ranks(len(SEEDS), _at_once, learnt_folder)
    run = learnt_folder / "array"
    assert not (run / "comparison.json").exists()
    results = {seed: (run / "arms" / "random" / str(seed) / "result.json").read_bytes()
               for seed in SEEDS}
    run_on_ranks(1, _compare, learnt_folder)
    found = json.loads((run / "comparison.json").read_text())
    assert found["finished"] and found["arms"][0]["seeds"] == list(SEEDS)
    assert results == {seed: (run / "arms" / "random" / str(seed) / "result.json").read_bytes()
                       for seed in SEEDS}
    calls = json.loads((run / "run.json").read_text())["commands"]
    assert sorted(call["flags"]["compare"]["only_replicate"] for call in calls[:-1]) == [0, 1]
    assert not list(run.rglob(".lock"))
