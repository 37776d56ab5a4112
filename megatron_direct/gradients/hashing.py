"""Hashes of global coordinates: random numbers that are the same in every layout.

A number drawn for (seed, stream, index) depends on these alone, so that any rank can make it for
any row, column or entry of the whole model, on any device. The mixer is SplitMix64's finaliser
(Steele, Lea and Flood, OOPSLA 2014), in wrapping 64-bit integer arithmetic.
"""

from __future__ import annotations

import hashlib

import torch

_GAMMA = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def stream(seed: int, *names: str) -> int:
    """A signed 64-bit number for a seed and names."""
    text = "\x1f".join([str(seed), *names]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little", signed=True)


def hash64(stream_number: int, indices: torch.Tensor) -> torch.Tensor:
    """[n] int64 hashes, uniform over all 64 bits, of int64 indices in one stream."""
    z = indices * _GAMMA + stream_number
    z = (z ^ _shift_right(z, 30)) * _MIX_1
    z = (z ^ _shift_right(z, 27)) * _MIX_2
    return z ^ _shift_right(z, 31)


def signs(hashes: torch.Tensor) -> torch.Tensor:
    """[n] float32 of +1 and -1, from the hashes' top bit."""
    return 1.0 - 2.0 * (hashes < 0).to(torch.float32)


def buckets(stream_number: int, indices: torch.Tensor, num_buckets: int) -> torch.Tensor:
    """[n] int64 in [0, num_buckets) of int64 indices in one stream.

    Each block of ``num_buckets`` consecutive indices is permuted at random, so that no two indices
    of a block share a bucket; different blocks are independent.
    """
    blocks, block_of = torch.unique(indices // num_buckets, return_inverse=True)
    slots = torch.arange(num_buckets, device=indices.device)
    order = torch.stack([torch.argsort(hash64(int(seed), slots), stable=True)
                         for seed in hash64(stream_number, blocks)])
    return order[block_of, indices % num_buckets]


def rotated_buckets(stream_number: int, indices: torch.Tensor, num_buckets: int) -> torch.Tensor:
    """[n] int64 in [0, num_buckets): as ``buckets``, but each block is rotated by a random number.

    Neighbours keep together. Two indices of different blocks share a bucket with the same
    probability, 1 / num_buckets, only that a whole block's worth of pairs then do.
    """
    shifts = hash64(stream_number, indices // num_buckets) % num_buckets
    return (indices + shifts) % num_buckets


def _shift_right(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift: torch's own keeps the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
