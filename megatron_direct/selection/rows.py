"""Products with the sketches, a block of rows at a time, on one rank or spread over many.

A rank holds rows X = F^T[ids] of shape [n, k], in memory or memory-mapped, float32 or float64, and
never copies more than a block of them. One rank solves: it has a :class:`Rows`, and all that has
one entry per sample. The others :func:`serve` it: each product is announced to them, and they hold
nothing but their rows and the entries of their own samples.

Products run in the rows' own precision within a block and are accumulated over blocks, in their
order, in float64. ``ties`` says how far apart two scores must be to differ by more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np

from megatron_direct.selection.share import Share

# Rows per block: 2 MiB of float32 at k = 1024, of the order of a core's share of the cache.
_BLOCK = 512


def row_blocks(count: int) -> Iterator[slice]:
    """Parts of ``count`` rows that are worked on at once, so that no copy of all is made."""
    return (slice(start, start + _BLOCK) for start in range(0, count, _BLOCK))


def row_lengths(rows: np.ndarray) -> np.ndarray:
    """[n] float64 lengths of rows [n, k], without a copy of them."""
    return np.sqrt(np.einsum("nk,nk->n", rows, rows, dtype=np.float64))


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """float64 rows of length 1; a row of zeros stays one."""
    rows = rows.astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(lengths > 0, lengths, 1.0)


class LocalRows:
    """This rank's rows of the sketches: ``flat`` [k, n], its columns of F."""

    def __init__(self, flat: np.ndarray):
        self.dim, self.count = flat.shape
        self._rows = flat.T
        self.dtype = np.float64 if flat.dtype.itemsize > 4 else np.float32

    def scores(self, directions: np.ndarray) -> np.ndarray:
        """[m, n] inner products of each direction [m, k] with the rows."""
        columns = directions.T.astype(self.dtype)
        out = np.empty((len(directions), self.count))
        for part, block in self._blocks():
            out[:, part] = (block @ columns).T
        return out

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """[m, k] weighted sums of the rows, for each row of weights [m, n]."""
        total = np.zeros((len(weights), self.dim))
        for part, block in self._blocks():
            total += weights[:, part].astype(self.dtype) @ block
        return total

    def exact_sum(self, mask: np.ndarray) -> np.ndarray:
        """[1, k] sum of the rows in a mask [1, n] of 0 and 1, in float64 throughout."""
        chosen, total = mask[0].astype(bool), np.zeros(self.dim)
        for part, block in self._blocks():
            total += block[chosen[part]].sum(axis=0, dtype=np.float64)
        return total[None]

    def squares(self, weights: np.ndarray) -> np.ndarray:
        """[1, n] sums of squares of each row, weighted per coordinate by weights [1, k]."""
        out = np.empty((1, self.count))
        plain = bool(np.all(weights == 1))
        with np.errstate(over="ignore", invalid="ignore"):
            for part, block in self._blocks():
                weighted = block if plain else block * weights[0].astype(self.dtype)
                out[0, part] = np.einsum("ij,ij->i", weighted, block)
        return out

    def take(self, positions: np.ndarray, where: np.ndarray, count: int) -> np.ndarray:
        """[count, k] float64 with the rows at these positions where they are wanted, else 0."""
        out = np.zeros((count, self.dim))
        out[where] = self._rows[positions]
        return out

    def _blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        for part in row_blocks(self.count):
            yield part, np.asarray(self._rows[part], dtype=self.dtype)


# One announced product each: what every rank does with the leader's vector over samples, or None,
# and with what is announced. They return what the leader needs.
def _scores(local: LocalRows, share: Share, _, directions: np.ndarray):
    return share.gathered(local.scores(directions))


def _sums(local: LocalRows, share: Share, weights, count: np.ndarray):
    return share.summed(local.sums(share.scattered(weights, int(count[0, 0]))))


def _exact_sum(local: LocalRows, share: Share, mask, _):
    return share.summed(local.exact_sum(share.scattered(mask, 1)))


def _take(local: LocalRows, share: Share, _, ids: np.ndarray):
    wanted = ids[0].astype(np.int64)
    where, positions = share.positions_of(wanted)
    return share.summed(local.take(positions, where, len(wanted)))


def _squares(local: LocalRows, share: Share, _, weights: np.ndarray):
    return share.gathered(local.squares(weights))


_PRODUCTS: tuple[Callable, ...] = (_scores, _sums, _exact_sum, _take, _squares)
_END = -1


def serve(local: LocalRows, share: Share) -> None:
    """Takes part in the leader's products until it has finished; the other ranks call this."""
    while (number := int(share.announced(None)[0, 0])) != _END:
        _PRODUCTS[number](local, share, None, share.announced(None))


class Rows:
    """The rows of all ranks, for the leader, or for the only rank."""

    def __init__(self, local: LocalRows, share: Share):
        self.dim, self.num_samples = local.dim, share.num_samples
        self._local, self._share = local, share
        # Relative error of products: sums of thousands of terms err by a few units of rounding.
        self.rounding = 64 * float(np.finfo(local.dtype).eps)

    @cached_property
    def lengths(self) -> np.ndarray:
        """[N] |f_i|."""
        return np.sqrt(self.squares())

    def ties(self, scores: np.ndarray) -> np.ndarray:
        """[N] the change of each of scores [N] that rounding (of sketch or product) explains.

        It is in proportion to the sample's own row: a row of great length makes no ties of others.
        Where all are of one length, it is a share of the largest score.
        """
        steepest = np.divide(np.abs(scores), self.lengths, out=np.zeros_like(scores),
                             where=self.lengths > 0).max()
        return self.rounding * steepest * self.lengths

    def scores(self, directions: np.ndarray) -> np.ndarray:
        """[m, N] inner products of each direction [m, k] with every row."""
        return self._product(_scores, None, directions)

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """[m, k] weighted sums of the rows, F w for each row w of weights [m, N]."""
        return self._product(_sums, weights, np.array([[len(weights)]]))

    def exact_sum(self, mask: np.ndarray) -> np.ndarray:
        """[k] sum of the rows in a selection [N] bool, in float64 throughout."""
        return self._product(_exact_sum, mask[None], np.zeros((1, 1)))[0]

    def take(self, ids: np.ndarray) -> np.ndarray:
        """[m, k] float64 copy of the rows of these samples."""
        return self._product(_take, None, ids[None])

    def squares(self, weights: np.ndarray | None = None) -> np.ndarray:
        """[N] |f_i|^2, or its sum of squares weighted per coordinate by weights [k].

        A ValueError names the first sample for which that is not finite.
        """
        per_coordinate = np.ones((1, self.dim)) if weights is None else weights[None]
        squares = self._product(_squares, None, per_coordinate)[0]
        bad = ~np.isfinite(squares)
        if bad.any():
            raise ValueError(
                f"flat must be finite, with squares within {np.dtype(self._local.dtype).name}; "
                f"sample {int(np.argmax(bad))} is not, nor are {int(bad.sum()) - 1} others; "
                "drop these samples"
            )
        return squares

    def release(self) -> None:
        """Lets the ranks that serve go on."""
        self._share.announced(np.array([[_END]]))

    def _product(self, product: Callable, vector: np.ndarray | None, said: np.ndarray):
        self._share.announced(np.array([[_PRODUCTS.index(product)]]))
        return product(self._local, self._share, vector, self._share.announced(said))


class RepeatedRows(Rows):
    """Rows of candidates that come several times: candidate c N + i is copy c of sample i.

    No row is copied: what has one entry per candidate is summed, or repeated, over the copies. The
    first copies of all samples come before the second ones, so that ties go to fresh samples.
    """

    def __init__(self, local: LocalRows, share: Share, copies: int):
        super().__init__(local, share)
        self._copies, self._distinct = copies, share.num_samples
        self.num_samples = copies * share.num_samples

    def scores(self, directions: np.ndarray) -> np.ndarray:
        return np.tile(super().scores(directions), (1, self._copies))

    def sums(self, weights: np.ndarray) -> np.ndarray:
        return super().sums(weights.reshape(len(weights), self._copies, self._distinct).sum(1))

    def exact_sum(self, mask: np.ndarray) -> np.ndarray:
        layers = mask.reshape(self._copies, self._distinct)
        return np.sum([super(RepeatedRows, self).exact_sum(layer) for layer in layers], axis=0)

    def take(self, ids: np.ndarray) -> np.ndarray:
        return super().take(ids % self._distinct)

    def squares(self, weights: np.ndarray | None = None) -> np.ndarray:
        return np.tile(super().squares(weights), self._copies)
