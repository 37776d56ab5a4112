"""Samples spread over ranks: each rank holds a share of them, and knows by number which.

Shapes: N samples in all, n of them on this rank. What has one entry per sample is gathered on
every rank; what is summed over samples is all-reduced. On one rank both cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

AllReduceSum = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Share:
    """The samples that this rank holds.

    ids             [n] their numbers in 0..N-1; no other rank holds one of them
    num_samples     N
    all_reduce_sum  float64 array -> its sum over the ranks, the same on each; None on one rank,
                    which then holds all samples in the order of their numbers
    """

    ids: np.ndarray
    num_samples: int
    all_reduce_sum: AllReduceSum | None = None

    @classmethod
    def of_rank(cls, count: int, ids: np.ndarray | None = None,
                all_reduce_sum: AllReduceSum | None = None) -> Share:
        """The share of a rank that holds ``count`` samples; all ranks call this.

        Raises ValueError on every rank if the ids of any rank are wrong, so that none waits for
        another.
        """
        if (ids is None) != (all_reduce_sum is None):
            raise ValueError(
                "rows spread over ranks need both sample_ids and all_reduce_sum; leave both out "
                "if this rank holds all rows"
            )
        if all_reduce_sum is None:
            return cls(np.arange(count), count)
        ids = np.asarray(ids)
        num_samples = int(all_reduce_sum(np.array([float(count)]))[0])
        sound = ids.shape == (count,) and (count == 0 or np.issubdtype(ids.dtype, np.integer))
        sound = sound and bool(np.all((ids >= 0) & (ids < num_samples)))
        ids = ids.astype(np.int64) if sound else np.zeros(0, dtype=np.int64)
        if np.any(all_reduce_sum(np.bincount(ids, minlength=num_samples).astype(np.float64)) != 1):
            raise ValueError(
                f"the sample_ids of all ranks together must be the integers 0 to "
                f"{num_samples - 1}, each once; number the samples consecutively over all ranks"
            )
        return cls(ids, num_samples, all_reduce_sum)

    def of(self, held: np.ndarray) -> Share:
        """The share with only some of this rank's samples, by a mask [n]; the numbers stay."""
        # Also on one rank the ids are now fewer than the samples, and values have to be gathered.
        return Share(self.ids[held], self.num_samples, self.all_reduce_sum or (lambda array: array))

    def gathered(self, values: np.ndarray) -> np.ndarray:
        """[..., N] float64 on every rank, from each rank's [..., n]; 0 where no rank holds any."""
        values = np.asarray(values, dtype=np.float64)
        if self.all_reduce_sum is None:
            return values
        whole = np.zeros((*values.shape[:-1], self.num_samples))
        whole[..., self.ids] = values
        return self.all_reduce_sum(whole)

    def here(self, values: np.ndarray) -> np.ndarray:
        """[..., n] the entries of this rank's samples, of [..., N]."""
        return values if self.all_reduce_sum is None else values[..., self.ids]

    def summed(self, part: np.ndarray) -> np.ndarray:
        """The sum of a float64 array over the ranks."""
        return part if self.all_reduce_sum is None else self.all_reduce_sum(part)
