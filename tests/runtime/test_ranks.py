"""Which rank a process is, from its launcher's variables alone."""

from __future__ import annotations

import torch

from megatron_direct.runtime import host, ranks
from megatron_direct.runtime.ranks import Rank


def test_a_process_that_was_started_alone_is_the_only_rank():
    alone = ranks.discover({"HOME": "/"})
    assert alone == Rank() and not alone.is_launched


def test_torchrun_says_which_rank_a_process_is():
    variables = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    found = ranks.discover(variables)
    assert found == Rank(5, 8, 1, "torchrun") and found.is_launched


def test_without_a_gpu_the_device_is_the_cpu_and_the_backend_gloo():
    expected = ("cuda", "nccl") if torch.cuda.is_available() else ("cpu", "gloo")
    assert (host.device().type, host.collective_backend()) == expected
