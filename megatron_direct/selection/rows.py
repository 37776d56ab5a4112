"""Products with the sketches, a block of rows at a time, on one rank or spread over many.

A rank holds rows X = F^T[ids] of shape [n, k], in memory or memory-mapped, float32 or float64, and
never copies more than a block of them. All that has one entry per sample is replicated: for
k = 2048 float32 coordinates a vector of float64 weights is 1/1024 of the rows it weighs. Two
all-reduced arrays per iteration follow: the weighted sums [m, k] and the scores [m, N].

Products run in the rows' own precision within a block and are accumulated over blocks, in their
order, in float64. ``tie`` says how far apart two scores must be to differ by more than rounding.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_direct.selection.share import Share

# Rows per block: 2 MiB of float32 at k = 1024, of the order of a core's share of the cache.
_BLOCK = 512


def row_blocks(count: int) -> Iterator[slice]:
    """Parts of ``count`` rows that are worked on at once, so that no copy of all is made."""
    return (slice(start, start + _BLOCK) for start in range(0, count, _BLOCK))


class Rows:
    """This rank's rows of the sketches: ``flat`` [k, n], its columns of F, and its share of the
    samples [n]."""

    def __init__(self, flat: np.ndarray, share: Share):
        self.dim, count = flat.shape
        self.num_samples = share.num_samples
        self._rows, self._share = flat.T, share
        self._dtype = np.float64 if flat.dtype.itemsize > 4 else np.float32
        # Relative error of products: sums of thousands of terms err by a few units of rounding.
        self.rounding = 64 * float(np.finfo(self._dtype).eps)
        self._local = np.full(self.num_samples, -1, dtype=np.int64)
        self._local[share.ids] = np.arange(count)

    def check_replicated(self, indices: np.ndarray) -> None:
        """Raises RuntimeError if the ranks, which take the same steps, came to differ."""
        chosen = np.zeros(self.num_samples)
        chosen[indices] = 1.0
        votes = self._share.summed(np.append(chosen, 1.0))
        if np.any((votes[:-1] != 0) & (votes[:-1] != votes[-1])):
            raise RuntimeError(
                "ranks disagree on the selection: all_reduce_sum must return the same array on "
                "each, and numpy and the processors must be of one kind"
            )

    def tie(self, scores: np.ndarray) -> float:
        """The difference between scores [N] that rounding (of sketch or product) explains."""
        return self.rounding * max(scores.max(), -scores.min())

    def scores(self, directions: np.ndarray) -> np.ndarray:
        """[m, N] inner products of each direction [m, k] with every row."""
        columns = directions.T.astype(self._dtype)
        out = np.empty((len(directions), len(self._rows)))
        for part, block in self._blocks():
            out[:, part] = (block @ columns).T
        return self._share.gathered(out)

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """[m, k] weighted sums of the rows, F w for each row w of weights [m, N]."""
        local = self._share.here(weights)
        total = np.zeros((len(weights), self.dim))
        for part, block in self._blocks():
            total += local[:, part].astype(self._dtype) @ block
        return self._share.summed(total)

    def exact_sum(self, mask: np.ndarray) -> np.ndarray:
        """[k] sum of the rows in a selection [N] bool, in float64 throughout."""
        local = self._share.here(mask)
        total = np.zeros(self.dim)
        for part, block in self._blocks():
            total += block[local[part]].sum(axis=0, dtype=np.float64)
        return self._share.summed(total)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """[m, k] float64 copy of the rows of these samples."""
        local = self._local[ids]
        out = np.zeros((len(ids), self.dim))
        out[local >= 0] = self._rows[local[local >= 0]]
        return self._share.summed(out)

    def squares(self, weights: np.ndarray | None = None) -> np.ndarray:
        """[N] |f_i|^2, or its sum of squares weighted per coordinate by weights [k].

        A ValueError names the first sample for which that is not finite.
        """
        out = np.empty(len(self._rows))
        with np.errstate(over="ignore", invalid="ignore"):
            for part, block in self._blocks():
                weighted = block if weights is None else block * weights.astype(self._dtype)
                out[part] = np.einsum("ij,ij->i", weighted, block)
        squares = self._share.gathered(out)
        bad = ~np.isfinite(squares)
        if bad.any():
            raise ValueError(
                f"flat must be finite, with squares within {np.dtype(self._dtype).name}; sample "
                f"{int(np.argmax(bad))} is not, nor are {int(bad.sum()) - 1} others; "
                "drop these samples"
            )
        return squares

    def _blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        for part in row_blocks(len(self._rows)):
            yield part, np.asarray(self._rows[part], dtype=self._dtype)


class RepeatedRows(Rows):
    """Rows of candidates that come several times: candidate c N + i is copy c of sample i.

    No row is copied: what has one entry per candidate is summed, or repeated, over the copies. The
    first copies of all samples come before the second ones, so that ties go to fresh samples.
    """

    def __init__(self, flat: np.ndarray, share: Share, copies: int):
        super().__init__(flat, share)
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
