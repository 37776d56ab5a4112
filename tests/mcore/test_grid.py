"""The verbs over process groups."""

from __future__ import annotations

import os
import time

import pytest
import torch
from ranks import Layout, RankError, on_layout, run_on_ranks

from megatron_direct.config import ModelConfig, ParallelConfig
from megatron_direct.errors import UserError
from megatron_direct.mcore import grid
from megatron_direct.runtime import parallel

MODEL = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, vocab_size=64,
                    seq_length=8)


def _sums(model, layout):
    rank = torch.distributed.get_rank()
    one = torch.tensor([float(rank)])
    return (float(grid.sum_over_model(one.clone())), float(grid.sum_over_data(one.clone())),
            grid.data_rank())


def test_sums_run_over_the_right_ranks():
    # Megatron numbers ranks tp fastest, then dp, then pp.
    assert on_layout(Layout(tp=2, dp=2), _sums, MODEL) == [
        (1.0, 2.0, 0), (1.0, 4.0, 0), (5.0, 2.0, 1), (5.0, 4.0, 1)]


def _sums_under_way(model, layout):
    """Two of them, and a sum and a question of the same group before either is waited for."""
    rank = torch.distributed.get_rank()
    first, second = (grid.begin_sum_over_model(torch.full((1000,), scale * rank))
                     for scale in (1.0, 10.0))
    between = float(grid.sum_over_model(torch.tensor([100.0 * rank])))
    assert not grid.copy_stops()
    return float(second.wait().mean()), float(first.wait().mean()), between


@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2, dp=2), Layout(dp=2, ep=2)], ids=str)
def test_sums_under_way_go_on_beside_others(layout):
    found = on_layout(layout, _sums_under_way, MODEL)
    copies = {1: [0], 4: [1, 1, 5, 5], 2: [1, 1]}[layout.world_size]  # of ranks' numbers
    assert found == [(10.0 * total, 1.0 * total, 100.0 * total) for total in copies]


def _fail_on_rank_zero():
    def work():
        raise UserError("only rank 0 can see this")

    with pytest.raises(UserError, match="only rank 0"):
        parallel.on_rank_zero(work)
    return parallel.on_rank_zero(lambda: 7)


def _threads_after_each_of(count):
    threads = []
    for _ in range(count):
        with grid.model_parallel(Layout(tp=2).config()):
            grid.sum_over_model(torch.ones(1))
        threads.append(len(os.listdir("/proc/self/task")))
    return threads


def test_process_groups_leave_no_threads():
    for threads in run_on_ranks(2, _threads_after_each_of, 3):
        assert threads[0] == threads[1] == threads[2]


def _limit_of_a_pipeline():
    from megatron.core import parallel_state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "_timeout_minutes", 7)
        with grid.model_parallel(Layout(pp=2).config()):
            group = parallel_state.get_pipeline_model_parallel_group()
            return group._get_backend(torch.device("cpu")).options._timeout.total_seconds()


def test_messages_of_a_pipeline_wait_as_long_as_collectives():
    """Megatron's groups would have a limit of their own."""
    assert run_on_ranks(2, _limit_of_a_pipeline) == [420.0, 420.0]


def test_what_rank_zero_raises_is_raised_everywhere():
    assert run_on_ranks(2, _fail_on_rank_zero) == [7, 7]


def _slow_work_on_rank_zero(done):
    """The others enter no collective, which has a limit, before it is done."""
    entered = []
    whole = torch.distributed.broadcast_object_list

    def broadcast(*arguments, **keywords):
        entered.append(done.exists())
        whole(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "broadcast_object_list", broadcast)
        found = parallel.on_rank_zero(lambda: time.sleep(1.0) or done.touch() or "done")
    return found, entered


def test_ranks_do_not_wait_for_rank_zero_in_a_collective(tmp_path):
    assert run_on_ranks(2, _slow_work_on_rank_zero, tmp_path / "done") == [("done", [True])] * 2


def _disagree():
    parallel.require_same_on_all_ranks(str(torch.distributed.get_rank()), "mask digest")


def test_ranks_that_disagree_are_found():
    with pytest.raises(RankError, match="mask digest differs between ranks"):
        run_on_ranks(2, _disagree)


@pytest.mark.parametrize(("layout", "world_size", "match"), [
    (ParallelConfig(tensor_model_parallel_size=3), 4, "multiple of 3 ranks, but 4"),
    (ParallelConfig(tensor_model_parallel_size=4), 4, "does not divide the model.s --num-att"),
    (ParallelConfig(pipeline_model_parallel_size=4), 4, "--num-layers 2 cannot be split"),
    (ParallelConfig(sequence_parallel=True), 1, "--sequence-parallel"),
    (ParallelConfig(num_layers_per_virtual_pipeline_stage=1), 1, "at least 2"),
])
def test_layouts_that_do_not_fit_are_refused(layout, world_size, match):
    with pytest.raises(UserError, match=match):
        layout.require_fits(MODEL, world_size)
