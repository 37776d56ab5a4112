"""Who speaks of an error, and a limit to waiting for rank 0.

That others wait for it outside of collectives: tests/mcore/test_grid.py.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch.distributed as dist
from ranks import run_on_ranks

from megatron_direct.errors import UserError
from megatron_direct.runtime import host, parallel


def test_a_rank_alone_speaks(capsys):
    parallel.speak_once("no group yet")
    with parallel.process_group():
        parallel.speak_once("in a group of one")
    assert capsys.readouterr().err == "no group yet\nin a group of one\n"


@pytest.mark.parametrize(("error", "is_lost"), [
    (RuntimeError("[pair.cc:553] Connection closed by peer [::1]:4. This is typically x"), True),
    (RuntimeError("Timed out waiting 60000ms for recv operation to complete"), True),
    (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
    (ValueError("Connection closed by peer"), False)])
def test_another_ranks_absence_is_told_from_other_errors(error, is_lost):
    with parallel.process_group():
        text = parallel.lost_rank(error)
    assert bool(text) == is_lost and "typically" not in text


def test_the_limit_of_a_launch_is_known_to_other_groups(monkeypatch):
    monkeypatch.setattr(parallel, "_timeout_minutes", 10)
    with parallel.process_group(timeout_minutes=7):
        assert parallel.collective_timeout_minutes() == 7


def test_the_backend_is_the_one_that_is_asked_for():
    with parallel.process_group(backend="gloo"):
        assert dist.get_backend() == "gloo"


def test_nccl_without_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(host, "has_gpu", lambda: False)
    with pytest.raises(UserError, match="--distributed-backend nccl needs a GPU for each rank, but "
                                        "torch sees none on .* Leave the flag out.*doctor"), \
            parallel.process_group(backend="nccl"):
        pass
    assert not dist.is_initialized()


def _twice_summed():
    own = np.arange(3.0)
    found = [parallel.sum_over_world(own) for _ in range(2)]
    return own, *found


def test_a_sum_leaves_what_was_summed_as_it_was():
    for own, first, second in run_on_ranks(2, _twice_summed):
        np.testing.assert_array_equal(own, [0, 1, 2])
        np.testing.assert_array_equal(first, [0, 2, 4])
        np.testing.assert_array_equal(second, first)


def _give_up(others_wait):
    before, parallel._LONGEST_HOURS = parallel._LONGEST_HOURS, 0.2 / 3600
    try:
        return None if parallel.is_rank_zero() else others_wait()
    except UserError as error:
        return str(error)
    finally:
        parallel._LONGEST_HOURS = before


@pytest.mark.parametrize(("others_wait", "words"), [
    (parallel._wait_for_rank_zero,
     "rank 0 has been at work for 0 hours while the other ranks waited"),
    (parallel.wait_for_all, "a rank has been at work for 0 hours while others waited for it")])
def test_there_is_a_limit_to_waiting(others_wait, words):
    assert run_on_ranks(2, _give_up, others_wait)[1].startswith(words)


def _come_one_by_one(folder):
    """Whether all had come when this rank goes on."""
    rank, size = parallel.rank_and_size()
    complete = []
    for turn in range(2):
        while rank and not (folder / f"{turn}-{rank - 1}").exists():
            time.sleep(0.001)
        (folder / f"{turn}-{rank}").touch()
        parallel.wait_for_all()
        complete.append(all((folder / f"{turn}-{other}").exists() for other in range(size)))
        parallel.on_rank_zero(lambda: None)  # which takes turns, too
    return complete


def test_ranks_that_are_far_apart_wait_for_one_another(tmp_path):
    assert run_on_ranks(3, _come_one_by_one, tmp_path) == [[True, True]] * 3
