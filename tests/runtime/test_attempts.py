"""The ranks of an attempt meet, whatever earlier attempts left in the launcher's store."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist

from megatron_direct.runtime import attempts


def _attempt(store, size, delays=None):
    """What the ranks of an attempt find."""
    found = {}

    def come(rank):
        if delays:
            threading.Event().wait(delays[rank])
        found[rank] = attempts.fresh_part(store.clone(), rank, size)

    threads = [threading.Thread(target=come, args=(rank,), daemon=True)
               for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


@pytest.mark.parametrize("delays", [(0, 0, 0), (0, 0.3, 0.6), (0.6, 0.3, 0)])
def test_each_attempt_has_a_part_of_its_own(delays):
    store = dist.TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=20),
                          wait_for_workers=False)
    first = _attempt(store, 3)
    first[1].set("key", "of the first")
    assert first[2].get("key") == b"of the first"
    for rank in (1, 2):  # of an attempt whose rank 0 died before it came
        store.set(f"attempt/token/{rank}", f"stale-{rank}")
    second = _attempt(store, 3, delays=delays)
    assert len(second) == 3
    assert not second[0].check(["key"])
    second[0].set("key", "of the second")
    assert [second[rank].get("key") for rank in range(3)] == [b"of the second"] * 3
