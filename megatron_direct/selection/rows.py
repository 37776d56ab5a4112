"""Products with the sketches, a block of rows at a time, on one rank or spread over many.

A rank holds rows X = F^T[ids] of shape [n, k], in memory or memory-mapped, float32 or float64, and
never copies more than a block of them. All that has one entry per sample is replicated: for
k = 2048 float32 coordinates a vector of float64 weights is 1/1024 of the rows it weighs. Two
all-reduced arrays an iteration follow: the weighted sums [m, k] and the scores [m, N].

Products run in the rows' own precision within a block and are accumulated over blocks, in their
order, in float64. ``tie`` says how far apart two scores must be to differ by more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

# Rows per block: 2 MiB of float32 at k = 1024, of the order of a core's share of the cache.
_BLOCK = 512


class Rows:
    """The rank's rows of the sketches; with ``all_reduce_sum``, one share of many.

    flat            [k, n] the rank's columns of F (transposed: the rows)
    sample_ids      [n] their ids; the ranks' ids together are 0..N-1, each once
    all_reduce_sum  float64 array -> its sum over the ranks, the same on each; None on one rank
    """

    def __init__(
        self,
        flat: np.ndarray,
        sample_ids: np.ndarray | None = None,
        all_reduce_sum: Callable[[np.ndarray], np.ndarray] | None = None,
    ):
        if (sample_ids is None) != (all_reduce_sum is None):
            raise ValueError("rows spread over ranks need both sample_ids and all_reduce_sum")
        self.dim, count = flat.shape
        self._rows = flat.T
        self._dtype = np.float64 if flat.dtype.itemsize > 4 else np.float32
        # Relative error of products: sums of thousands of terms err by a few units of rounding.
        self.rounding = 64 * float(np.finfo(self._dtype).eps)
        self._reduce = all_reduce_sum
        self._ids = np.arange(count)
        self.num_samples = count
        if all_reduce_sum is not None:
            self.num_samples = int(all_reduce_sum(np.array([float(count)]))[0])
            self._ids = np.asarray(sample_ids)
            self._check_ids(count)
        self._local = np.full(self.num_samples, -1, dtype=np.int64)
        self._local[self._ids] = np.arange(count)

    def _check_ids(self, count: int) -> None:
        """Raises on every rank if the ids of any rank are wrong, so that none waits for another."""
        ids = self._ids
        sound = ids.shape == (count,) and np.issubdtype(ids.dtype, np.integer)
        sound = sound and bool(np.all((ids >= 0) & (ids < self.num_samples)))
        seen = np.zeros(self.num_samples)
        if sound:
            np.add.at(seen, ids, 1.0)
        if np.any(self._reduce(seen) != 1):
            raise ValueError(
                f"the sample_ids of all ranks together must be the integers 0 to "
                f"{self.num_samples - 1}, each once"
            )

    def gathered(self, values: np.ndarray) -> np.ndarray:
        """[N] on every rank, from each rank's [n]."""
        return self._replicated(np.asarray(values, dtype=np.float64)[None])[0]

    def check_replicated(self, indices: np.ndarray) -> None:
        """Raises RuntimeError if the ranks, which take the same steps, came to differ."""
        if self._reduce is None:
            return
        chosen = np.zeros(self.num_samples)
        chosen[indices] = 1.0
        votes = self._reduce(np.append(chosen, 1.0))
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
        return self._replicated(out)

    def sums(self, weights: np.ndarray) -> np.ndarray:
        """[m, k] weighted sums of the rows, F w for each row w of weights [m, N]."""
        local = weights if self._reduce is None else weights[:, self._ids]
        total = np.zeros((len(weights), self.dim))
        for part, block in self._blocks():
            total += local[:, part].astype(self._dtype) @ block
        return self._all(total)

    def exact_sum(self, mask: np.ndarray) -> np.ndarray:
        """[k] sum of the rows in a selection [N] bool, in float64 throughout."""
        local = mask if self._reduce is None else mask[self._ids]
        total = np.zeros(self.dim)
        for part, block in self._blocks():
            total += block[local[part]].sum(axis=0, dtype=np.float64)
        return self._all(total)

    def take(self, ids: np.ndarray) -> np.ndarray:
        """[m, k] float64 copy of the rows of these samples."""
        local = self._local[ids]
        out = np.zeros((len(ids), self.dim))
        out[local >= 0] = self._rows[local[local >= 0]]
        return self._all(out)

    def squares(self, weights: np.ndarray | None = None) -> np.ndarray:
        """[N] |f_i|^2, or its sum of squares weighted per coordinate by weights [k].

        A ValueError names the first sample for which that is not finite.
        """
        out = np.empty((1, len(self._rows)))
        with np.errstate(over="ignore", invalid="ignore"):
            for part, block in self._blocks():
                weighted = block if weights is None else block * weights.astype(self._dtype)
                out[0, part] = np.einsum("ij,ij->i", weighted, block)
        squares = self._replicated(out)[0]
        bad = ~np.isfinite(squares)
        if bad.any():
            raise ValueError(
                f"flat must be finite, with squares within {np.dtype(self._dtype).name}; sample "
                f"{int(np.argmax(bad))} is not, nor are {int(bad.sum()) - 1} others; "
                "drop these samples"
            )
        return squares

    def _blocks(self) -> Iterator[tuple[slice, np.ndarray]]:
        for start in range(0, len(self._rows), _BLOCK):
            part = slice(start, start + _BLOCK)
            yield part, np.asarray(self._rows[part], dtype=self._dtype)

    def _replicated(self, local: np.ndarray) -> np.ndarray:
        """[m, N] on every rank, from each rank's [m, n]."""
        if self._reduce is None:
            return local
        out = np.zeros((len(local), self.num_samples))
        out[:, self._ids] = local
        return self._reduce(out)

    def _all(self, total: np.ndarray) -> np.ndarray:
        return total if self._reduce is None else self._reduce(total)
