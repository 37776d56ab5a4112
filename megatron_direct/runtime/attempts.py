"""Where the ranks of a launch meet: a store that no earlier attempt of the launch has written to.

torchrun keeps one store for all its attempts (``--max-restarts``). torch names its keys alike in
each, so that the ranks of a second attempt would read what those of the first had written: where
they used to listen, and that this or that was done. Here the ranks of an attempt first agree on a
name that only they know, and then use the part of the store under it.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import time
import uuid

import torch.distributed as dist

_SECONDS_BETWEEN_LOOKS = 0.05


def torchrun_store(timeout: datetime.timedelta) -> dist.Store:
    """By the launcher's variables."""
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=timeout)))
    store.set_timeout(timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = fresh_part(store, rank, size)
    return store


def fresh_part(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The part of a store that all ``size`` ranks of this attempt, and no others, use.

    Each rank puts down a token. Rank 0 publishes a list of all tokens under a name made of them,
    again whenever one has changed, since it may have found those of an earlier attempt. A rank
    confirms a list that has its own token; a list that all have confirmed is this attempt's.
    """
    token = uuid.uuid4().hex
    store.set(f"attempt/token/{rank}", token)
    name, tokens = "", list[str]()
    while True:
        if rank == 0:
            found = [store.get(f"attempt/token/{r}").decode() for r in range(size)]
            if found != tokens:
                name, tokens = hashlib.blake2b("".join(found).encode()).hexdigest()[:16], found
                store.set("attempt/tokens", " ".join([name, *tokens]))
            if store.check([f"attempt/{name}/{r}" for r in range(1, size)]):
                store.set(f"attempt/{name}/all", "yes")
                return dist.PrefixStore(f"attempt-{name}", store)
        else:
            name, *tokens = store.get("attempt/tokens").decode().split()
            if tokens[rank: rank + 1] == [token]:
                store.set(f"attempt/{name}/{rank}", "here")
                if store.check([f"attempt/{name}/all"]):
                    return dist.PrefixStore(f"attempt-{name}", store)
        time.sleep(_SECONDS_BETWEEN_LOOKS)
