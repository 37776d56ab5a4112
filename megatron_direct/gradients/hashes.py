"""The hashes of a matrix, and the count sketch of vectors that run along one of its axes.

Entry (r, c) of the matrix called ``name`` is added, with sign s1(r) s2(c), to coordinate
(h1(r) + h2(c)) mod k. h1 and s1 belong to the rows, h2 and s2 to the columns. The count sketch of
a vector x along an axis has, in bucket b, the sum of s(i) x_i over all i with h(i) = b.

h permutes each block of k indices, so that a bucket holds at most one index of a block: a table of
a few indices per bucket turns the count sketch into a gather and a sum, with no atomic additions
and the same order of summation every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_direct.gradients import hashing
from megatron_direct.mcore.shards import ParameterShard
from megatron_direct.runtime import gpu_kernels

# Numbers gathered, or copied, at once: what the caches of a CPU hold, and on a GPU as many as keep
# the buffer within 256 MiB.
_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}


@dataclass(frozen=True)
class AxisHash:
    """h and s of the indices along one axis of a shard."""

    buckets: torch.Tensor  # [width] int64, 0 .. k - 1
    signs: torch.Tensor  # [width] float32
    size: int  # k
    rounds: int  # the most indices that share a bucket

    @classmethod
    def of(cls, buckets: torch.Tensor, signs: torch.Tensor, size: int) -> AxisHash:
        return cls(buckets, signs, size, int(torch.bincount(buckets, minlength=size).max()))

    @property
    def width(self) -> int:
        return len(self.buckets)

    @cached_property
    def _table(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(index, sign in float32, sign in bfloat16) of each bucket's entries, [rounds * k].

        A bucket with fewer than ``rounds`` of them is filled up with index 0 and sign 0.
        """
        order = torch.argsort(self.buckets, stable=True)
        buckets = self.buckets[order]
        first = torch.searchsorted(buckets, buckets)  # the place of the bucket's first index
        place = (torch.arange(self.width, device=order.device) - first) * self.size + buckets
        index = order.new_zeros(self.rounds * self.size, dtype=torch.int32)
        index[place] = order.to(torch.int32)
        signs = self.signs.new_zeros(self.rounds * self.size)
        signs[place] = self.signs[order]
        return index, signs, signs.to(torch.bfloat16)

    @cached_property
    def _rounds(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """(index [k], sign in float32 [k]) of each bucket's first entry, its second, and so on."""
        index, signs, _ = self._table
        return list(zip(index.split(self.size), signs.split(self.size), strict=True))

    @cached_property
    def _slices(self) -> torch.Tensor | None:
        """The same for the kernel of a GPU; None if it does not take so large a k."""
        from megatron_direct.gradients import count_sketch_kernel

        return count_sketch_kernel.slices_table(self.buckets, self.signs, self.size)

    def count_sketch(self, values: torch.Tensor) -> torch.Tensor:
        """[..., k] count sketches of values [..., width], float32 or bfloat16 as they are."""
        vectors = values.reshape(-1, 1, self.width)
        sums = vectors.new_empty(len(vectors), 1, self.size)
        self.write_count_sketch(vectors, sums)
        return sums.view(*values.shape[:-1], self.size)

    def write_count_sketch(self, values: torch.Tensor, places: torch.Tensor) -> None:
        """Into places [s, b, k], of values [s, b, width]; all rows together, or one sample's."""
        if gpu_kernels.apply_to(values) and self._slices is not None:
            from megatron_direct.gradients import count_sketch_kernel

            count_sketch_kernel.write_count_sketches(values, self._slices, places)
        elif values.is_cuda:
            self._write(values, places)
        elif places.is_contiguous():
            self._write(values.reshape(-1, self.width), places.view(-1, self.size))
        else:  # where a gather into rows that are not together takes ten times as long
            for of_sample, out in zip(values.unbind(1), places.unbind(1), strict=True):
                self._write(of_sample, out)

    def _write(self, values: torch.Tensor, out: torch.Tensor) -> None:
        if values.dtype == torch.bfloat16:
            self._write_in_bf16(values, out)
            return
        at_once = parts_of(values, self.size * values[:1, ..., 0].numel())
        further = torch.empty_like(out[:at_once]) if self.rounds > 1 else out
        (index, signs), *others = self._rounds
        for part, sums in zip(values.split(at_once), out.split(at_once), strict=True):
            torch.index_select(part, -1, index, out=sums)
            sums.mul_(signs)
            for other_index, other_signs in others:
                gathered = further[:len(part)]
                torch.index_select(part, -1, other_index, out=gathered)
                sums.addcmul_(gathered, other_signs)

    def _write_in_bf16(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """All rounds at once: ``sum`` adds up in float32, where round by round loses digits."""
        index, _, signs = self._table
        at_once = parts_of(values, len(index) * values[:1, ..., 0].numel())
        for part, sums in zip(values.split(at_once), out.split(at_once), strict=True):
            gathered = part.index_select(-1, index).mul_(signs)
            torch.sum(gathered.unflatten(-1, (self.rounds, self.size)), -2, out=sums)

    def count_sketch_of_rows(self, matrices: torch.Tensor) -> torch.Tensor:
        """[..., k, c] count sketches of the c columns of float32 matrices [..., width, c]."""
        index, signs, _ = self._table
        gathered = matrices.index_select(-2, index).mul_(signs[:, None])
        return gathered.unflatten(-2, (self.rounds, self.size)).sum(-3)


@dataclass(frozen=True)
class Hashes:
    """The hashes of a shard's rows and columns: what all its entries follow from."""

    rows: AxisHash
    columns: AxisHash

    @property
    def size(self) -> int:
        return self.rows.size

    @classmethod
    def draw(cls, shard: ParameterShard, size: int, seed: int) -> Hashes:
        axes = []
        for axis, indices in (("row", shard.rows), ("column", shard.columns)):
            buckets = hashing.buckets(
                hashing.stream(seed, f"{axis} bucket", shard.name), indices, size)
            signs = hashing.signs(
                hashing.hash64(hashing.stream(seed, f"{axis} sign", shard.name), indices))
            axes.append(AxisHash.of(buckets, signs, size))
        return cls(*axes)

    @cached_property
    def of_vector(self) -> AxisHash:
        """For a vector, which is a matrix of one column: one hash for both axes."""
        return AxisHash((self.rows.buckets + self.columns.buckets) % self.size,
                        self.rows.signs * self.columns.signs, self.size, self.rows.rounds)


def folded(frames: torch.Tensor) -> torch.Tensor:
    """[n, k] sums of frames [n, k, k] along (row + column) mod k.

    With a column of zeros behind each row, entry (r, c) is number r (k + 1) + c of the frame, which
    is (r + c) mod k: the same numbers, read as k + 1 rows of k, have one coordinate in a column.
    """
    size = frames.shape[-1]
    sums = frames.new_empty(len(frames), size)
    at_once = parts_of(frames, frames[0].numel())  # of which the padding makes a copy
    for part, totals in zip(frames.split(at_once), sums.split(at_once), strict=True):
        padded = torch.nn.functional.pad(part, (0, 1))
        torch.sum(padded.view(len(part), size + 1, size), 1, out=totals)
    return sums


def parts_of(tensor: torch.Tensor, numbers: int) -> int:
    """How many slices to treat at once, where one takes a buffer of so many numbers."""
    return max(1, _AT_ONCE["cuda" if tensor.is_cuda else "cpu"] // max(1, numbers))
