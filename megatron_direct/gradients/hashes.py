"""The hashes of a matrix, and the count sketch of vectors that run along one of its axes.

Entry (r, c) of the matrix called ``name`` is added, with sign s1(r) s2(c), to coordinate
(h1(r) + h2(c)) mod k. h1 and s1 belong to the rows, h2 and s2 to the columns. The count sketch of
a vector x along an axis has, in bucket b, the sum of s(i) x_i over all i with h(i) = b.

h permutes each block of as many indices as it has buckets, so that a bucket holds at most one index
of a block: a table of a few indices per bucket turns the count sketch into a gather and a sum, with
no atomic additions and the same order of summation every time.

An axis has k buckets, but for the longer axis of a layer's matrix, which has q = k / 16. There h
rotates each block of q indices by a random number, so that a count sketch is a sum of slices. The
product of the factors takes a sixteenth of the time, and more entries of one row (or column)
collide: the variance of an inner product <S g, S g'> is about

    (|g|^2 |g'|^2 + <g, g'>^2) / k + sum over layers of 2 |G^T G'|^2 / q

at most, G a layer's gradient with the longer axis as its columns; the first part is a dense
Gaussian's. To the root of the variance of |g|^2 the second adds a factor of sqrt(1 + 16 sum of
p^2 / rank), p the share that a layer has of |g|^2: 1.4 for one layer of rank one that has a quarter
of it, 1.1 for one that has an eighth. The embeddings and the output layer may have most of it:
their axes all have k buckets, as have those of matrices with a side that is shorter than 2 q. An
axis of k buckets that is longer than k adds such a term, too, with k in the place of q.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from megatron_direct.gradients import hashing
from megatron_direct.mcore.shards import ParameterShard
from megatron_direct.runtime import gpu_kernels

# Raised where the same seed has come to mean other coordinates: older rows cannot be used with new
# ones.
HASH_VERSION = 2
# The longer axis of a layer's matrix has k divided by this many buckets.
_NARROWING = 16
# Numbers gathered, or copied, at once: what the caches of a CPU hold, and on a GPU as many as keep
# the buffer within 256 MiB.
_AT_ONCE = {"cpu": 2**19, "cuda": 2**26}


@dataclass(frozen=True)
class AxisHash:
    """h and s of the indices along one axis of a shard."""

    buckets: torch.Tensor  # [width] int64, 0 .. size - 1
    signs: torch.Tensor  # [width] float32
    size: int  # of the axis's own buckets
    rounds: int  # the most indices that share a bucket
    is_rotated: bool = False  # neighbours have neighbouring buckets, in blocks of ``size`` indices

    @classmethod
    def of(cls, buckets: torch.Tensor, signs: torch.Tensor, size: int, is_rotated: bool = False,
           ) -> AxisHash:
        rounds = int(torch.bincount(buckets, minlength=size).max())
        return cls(buckets, signs, size, rounds, is_rotated)

    @property
    def width(self) -> int:
        return len(self.buckets)

    @cached_property
    def _table(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(index, sign in float32, sign in bfloat16) of each bucket's entries, [rounds * size].

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
        """(index, sign in float32), [size], of each bucket's first entry, its second, and so on."""
        index, signs, _ = self._table
        return list(zip(index.split(self.size), signs.split(self.size), strict=True))

    @cached_property
    def _slices(self) -> torch.Tensor | None:
        """The same for the kernel of a GPU; None if it does not take so many buckets."""
        from megatron_direct.gradients import count_sketch_kernel

        return count_sketch_kernel.slices_table(self.buckets, self.signs, self.size)

    def count_sketch(self, values: torch.Tensor) -> torch.Tensor:
        """[..., size] count sketches of values [..., width], float32 or bfloat16 as they are."""
        vectors = values.reshape(-1, 1, self.width)
        sums = vectors.new_empty(len(vectors), 1, self.size)
        self.write_count_sketch(vectors, sums)
        return sums.view(*values.shape[:-1], self.size)

    def write_count_sketch(self, values: torch.Tensor, places: torch.Tensor) -> None:
        """Into places [s, b, size], of values [s, b, width]; all rows together, or one sample's."""
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
        if self.is_rotated and not values.is_cuda:
            self._write_slices(values, out)
            return
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

    def _write_slices(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Slices are added at their first buckets, and what goes beyond the last one in the end."""
        at_once = parts_of(values, 4 * self.size * values[:1, ..., 0].numel())
        for part, sums in zip(values.split(at_once), out.split(at_once), strict=True):
            places = self.signs.new_zeros(*part.shape[:-1], 2 * self.size)
            part = part.float()
            for first, end, bucket in self._slices_of_neighbours:
                places[..., bucket: bucket + end - first].addcmul_(
                    part[..., first:end], self.signs[first:end])
            sums.copy_(places[..., :self.size].add_(places[..., self.size:]))

    @cached_property
    def _slices_of_neighbours(self) -> list[tuple[int, int, int]]:
        """(first index, end, the first one's bucket) of runs whose buckets follow one another, at
        most ``size`` long."""
        follows = (self.buckets[1:] - self.buckets[:-1]) % self.size == 1
        begins = [0, *((~follows).nonzero()[:, 0] + 1).tolist()]
        ends = [*begins[1:], self.width]
        return [(first, min(first + self.size, end), int(self.buckets[first]))
                for begin, end in zip(begins, ends, strict=True)
                for first in range(begin, end, self.size)]

    def _write_in_bf16(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """All rounds at once: ``sum`` adds up in float32, where round by round loses digits."""
        index, _, signs = self._table
        at_once = parts_of(values, len(index) * values[:1, ..., 0].numel())
        for part, sums in zip(values.split(at_once), out.split(at_once), strict=True):
            gathered = part.index_select(-1, index).mul_(signs)
            torch.sum(gathered.unflatten(-1, (self.rounds, self.size)), -2, out=sums)

    def count_sketch_of_rows(self, matrices: torch.Tensor) -> torch.Tensor:
        """[..., size, c] count sketches of the c columns of float32 matrices [..., width, c]."""
        index, signs, _ = self._table
        gathered = matrices.index_select(-2, index).mul_(signs[:, None])
        return gathered.unflatten(-2, (self.rounds, self.size)).sum(-3)

    def add_count_sketch_of_rows(self, sums: torch.Tensor, matrices: torch.Tensor) -> None:
        """The same, added to sums [n, size, c]; it changes the matrices [n, width, c].

        Each bucket is added to once at a time, so that the order of its terms is always the same.
        """
        matrices.mul_(self.signs[:, None])
        if self.rounds == 1:
            sums.index_add_(1, self.buckets, matrices)
            return
        for indices in self._indices_of_rounds:
            sums.index_add_(1, self.buckets[indices], matrices[:, indices])

    @cached_property
    def _indices_of_rounds(self) -> list[torch.Tensor]:
        """Those that are the first of their buckets, the second, and so on."""
        return [index[signs != 0].long() for index, signs in self._rounds]

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """[width, size]: each index's sign, in its bucket's column. Of all layers and experts it
        would be a good part of the weights' memory, so that it is made anew each time."""
        matrix = self.signs.new_zeros(self.width, self.size, dtype=dtype)
        return matrix.scatter_(1, self.buckets[:, None], self.signs[:, None].to(dtype))


@dataclass(frozen=True)
class Hashes:
    """The hashes of a shard's rows and columns: what all its entries follow from."""

    rows: AxisHash
    columns: AxisHash
    size: int  # k

    @classmethod
    def draw(cls, shard: ParameterShard, size: int, seed: int) -> Hashes:
        def axis(name: str, indices: torch.Tensor, num_buckets: int) -> AxisHash:
            draw = hashing.buckets if num_buckets == size else hashing.rotated_buckets
            buckets = draw(hashing.stream(seed, f"{name} bucket", shard.name), indices, num_buckets)
            signs = hashing.signs(
                hashing.hash64(hashing.stream(seed, f"{name} sign", shard.name), indices))
            return AxisHash.of(buckets, signs, num_buckets, is_rotated=num_buckets < size)

        of_rows, of_columns = _numbers_of_buckets(shard, size)
        return cls(axis("row", shard.rows, of_rows), axis("column", shard.columns, of_columns),
                   size)

    @property
    def narrowed(self) -> AxisHash | None:
        """The axis that has fewer than k buckets, if one has."""
        return next((axis for axis in (self.rows, self.columns) if axis.size < self.size), None)

    @cached_property
    def of_vector(self) -> AxisHash:
        """For a vector, which is a matrix of one column: one hash for both axes."""
        return AxisHash((self.rows.buckets + self.columns.buckets) % self.size,
                        self.rows.signs * self.columns.signs, self.size, self.rows.rounds)


def num_narrow_buckets(size: int) -> int:
    """Of a layer's longer axis."""
    return size // _NARROWING


def _numbers_of_buckets(shard: ParameterShard, size: int) -> tuple[int, int]:
    """Of the rows, and of the columns."""
    rows, columns = shard.shape
    narrow = num_narrow_buckets(size)
    if narrow < 2 or shard.of_vocabulary or min(rows, columns) < 2 * narrow:
        return size, size
    return (narrow, size) if rows > columns else (size, narrow)


def folded(frames: torch.Tensor) -> torch.Tensor:
    """[n, k] sums of frames [n, k, q] or [n, q, k], q <= k, along (row + column) mod k.

    Of q rows of k: with a column of zeros behind each row, entry (r, c) is number r (k + 1) + c of
    the frame, which is (r + c) mod k. The same numbers, with zeros up to (q + 1) k of them, read as
    q + 1 rows of k, have one coordinate in a column.
    """
    if frames.shape[-1] < frames.shape[-2]:
        frames = frames.mT
    rows, size = frames.shape[-2:]
    sums = frames.new_empty(len(frames), size)
    at_once = parts_of(frames, frames[0].numel())  # of which the padding makes a copy
    for part, totals in zip(frames.split(at_once), sums.split(at_once), strict=True):
        padded = part.new_zeros(len(part), rows + 1, size)
        padded.flatten(1)[:, :rows * (size + 1)].unflatten(1, (rows, size + 1))[..., :-1] = part
        torch.sum(padded, 1, out=totals)
    return sums


def parts_of(tensor: torch.Tensor, numbers: int) -> int:
    """How many slices to treat at once, where one takes a buffer of so many numbers."""
    return max(1, _AT_ONCE["cuda" if tensor.is_cuda else "cpu"] // max(1, numbers))
