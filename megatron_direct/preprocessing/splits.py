"""Which documents are selected from, and which are held out for validation and test."""

from __future__ import annotations

import hashlib
import math
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
    if len(shares) != len(SPLITS) or min(shares) < 0 or not 0 < sum(shares) < math.inf:
        raise UserError(f"--split {text} is not three numbers such as 90,5,5. Give the shares of "
                        f"{', '.join(SPLITS)}: none below 0, one of them above.")
    return tuple(share / sum(shares) for share in shares)


def split_of(group: str, shares: tuple[float, ...], seed: int) -> str:
    """The split of a group, by a hash of the group alone: so equal documents meet in one split."""
    place = uniform(f"{seed}\x1fsplit\x1f{group}")
    return SPLITS[bisect_right(list(accumulate(shares[:-1])), place)]


def uniform(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
