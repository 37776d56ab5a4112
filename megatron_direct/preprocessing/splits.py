"""Which documents are selected from, and which are kept for validation and test."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from itertools import accumulate

from megatron_direct.errors import UserError

SPLITS = ("pool", "valid", "test")


def parse_split(text: str) -> tuple[float, ...]:
    """Shares of SPLITS that sum to one."""
    try:
        shares = [float(part) for part in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or min(shares) < 0 or sum(shares) <= 0:
        raise UserError(f"--split {text} is not three numbers such as 90,5,5.")
    return tuple(share / sum(shares) for share in shares)


def split_of(group: str, shares: tuple[float, ...], seed: int) -> str:
    """Which of SPLITS a group falls into: a hash of it alone, so that equal documents meet."""
    place = uniform(f"{seed}\x1fsplit\x1f{group}")
    return SPLITS[bisect_right(list(accumulate(shares[:-1])), place)]


def uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
