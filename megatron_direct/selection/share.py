"""Samples spread over ranks: each rank holds a share of them, and knows by number which.

Shapes: N samples in all, n of them on this rank. One rank, the *leader*, which holds sample 0,
knows what has one entry per sample; the others know their own n entries. What passes between them
goes through one collective, a sum, a stretch of the samples at a time, so that no rank but the
leader ever holds a vector of N. On one rank all of it costs nothing.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

AllReduceSum = Callable[[np.ndarray], np.ndarray]

# Samples whose entries are sent at once: 8 MiB of float64.
STRETCH = 1 << 20


@dataclass(frozen=True, eq=False)
class Share:
    """The samples that this rank holds.

    ids             [n] their numbers in 0..N-1; no other rank holds one of them
    num_samples     N
    all_reduce_sum  float64 array -> its sum over the ranks, the same on each; None on one rank,
                    which then holds all samples in the order of their numbers
    leads           whether this rank is the leader
    """

    ids: np.ndarray
    num_samples: int
    all_reduce_sum: AllReduceSum | None = None
    leads: bool = True

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
        share = cls(ids, num_samples, all_reduce_sum, bool(np.any(ids == 0)))
        if num_samples == 0:
            raise ValueError("no rank holds a sample; give at least one")
        # All stretches are looked at, whatever is found: the ranks have to keep in step.
        once = [bool(np.all(all_reduce_sum(np.bincount(
            share.ids[here] - part.start, minlength=part.stop - part.start).astype(np.float64)
        ) == 1)) for part, here in share._stretches()]
        if not all(once):
            raise ValueError(
                f"the sample_ids of all ranks together must be the integers 0 to "
                f"{num_samples - 1}, each once; number the samples consecutively over all ranks"
            )
        return share

    def of(self, held: np.ndarray) -> Share:
        """The share with only some of this rank's samples, by a mask [n]; the numbers stay."""
        # Also on one rank the ids are now fewer than the samples, and values have to be gathered.
        return Share(self.ids[held], self.num_samples,
                     self.all_reduce_sum or (lambda array: array), self.leads)

    def summed(self, part: np.ndarray) -> np.ndarray:
        """The sum of a float64 array over the ranks."""
        return part if self.all_reduce_sum is None else self.all_reduce_sum(part)

    def gathered(self, values: np.ndarray) -> np.ndarray | None:
        """[..., N] float64 on the leader, None elsewhere, from each rank's [..., n]; 0 for what no
        rank holds."""
        values = np.asarray(values, dtype=np.float64)
        if self.all_reduce_sum is None:
            return values
        whole = np.empty((*values.shape[:-1], self.num_samples)) if self.leads else None
        for part, here in self._stretches():
            found = self.summed(self._in_stretch(values, part, here))
            if whole is not None:
                whole[..., part] = found
        return whole

    def known_to_all(self, values: np.ndarray) -> np.ndarray:
        """[..., N] float64 on every rank, from each rank's [..., n]: for what all of them have to
        know, at the price of N entries on each."""
        values = np.asarray(values, dtype=np.float64)
        if self.all_reduce_sum is None:
            return values
        whole = np.empty((*values.shape[:-1], self.num_samples))
        for part, here in self._stretches():
            whole[..., part] = self.summed(self._in_stretch(values, part, here))
        return whole

    def scattered(self, values: np.ndarray | None, count: int) -> np.ndarray:
        """[count, n] float64, the entries of this rank's samples, of the leader's [count, N]; the
        other ranks give None."""
        if self.all_reduce_sum is None:
            assert values is not None
            return values
        own = np.empty((count, len(self.ids)))
        for part, here in self._stretches():
            sent = np.zeros((count, part.stop - part.start)) if values is None else \
                values[:, part].astype(np.float64)
            own[:, here] = self.summed(sent)[:, self.ids[here] - part.start]
        return own

    def stretch_of(self, values: np.ndarray, number: int) -> np.ndarray:
        """[.] float64 on every rank: the entries of one stretch, from each rank's [n]."""
        for stretch, (part, here) in enumerate(self._stretches()):
            if stretch == number:
                return self.summed(self._in_stretch(np.asarray(values, np.float64), part, here))
        raise IndexError(number)

    def sums_of_stretches(self, values: np.ndarray) -> np.ndarray:
        """[stretches] the sum of each, from each rank's [n]."""
        return self.summed(np.array([values[here].sum() for _, here in self._stretches()]))

    def positions_of(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(which of the wanted numbers this rank holds, at which of its positions)"""
        ascending = self.ids if self._order is None else self.ids[self._order]
        if not len(ascending):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        place = np.minimum(np.searchsorted(ascending, wanted), len(ascending) - 1)
        where = np.flatnonzero(ascending[place] == wanted)
        return where, place[where] if self._order is None else self._order[place[where]]

    def announced(self, array: np.ndarray | None) -> np.ndarray:
        """The leader's array [r, c] on every rank, as float64; the others give None."""
        if self.all_reduce_sum is None:
            assert array is not None
            return array
        shape = np.zeros(2) if array is None else np.array(array.shape, np.float64)
        rows, columns = self.summed(shape).astype(np.int64)
        return self.summed(np.zeros((rows, columns)) if array is None
                           else np.asarray(array, np.float64))

    def told(self, outcome: Any) -> Any:
        """What the leader gives, a value or an exception, returned or raised on every rank."""
        if self.all_reduce_sum is not None:
            words = np.frombuffer(_pickled(outcome), np.uint8) if self.leads else None
            size = int(self.announced(None if words is None else np.array([[len(words)]]))[0, 0])
            heard = [self.summed(np.zeros(min(STRETCH, size - start)) if words is None
                                 else words[start: start + STRETCH].astype(np.float64))
                     for start in range(0, size, STRETCH)]
            if words is None:
                outcome = pickle.loads(np.concatenate(heard).astype(np.uint8).tobytes())
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def from_leader(self, work: Callable[[np.ndarray], Any], values: np.ndarray) -> Any:
        """What ``work`` makes on the leader of all ranks' values [N], returned or raised on every
        rank, each of which gives its own [n]."""
        outcome, whole = None, self.gathered(values)
        if whole is not None:
            try:
                outcome = work(whole)
            except Exception as error:
                outcome = error
        return self.told(outcome)

    @cached_property
    def _order(self) -> np.ndarray | None:
        """[n] positions of this rank's samples by ascending number; None if they ascend already."""
        return None if bool(np.all(np.diff(self.ids) > 0)) else np.argsort(self.ids, kind="stable")

    def _stretches(self) -> Iterator[tuple[slice, np.ndarray | slice]]:
        """(stretch of the samples, positions of those that this rank holds)"""
        ascending = self.ids if self._order is None else self.ids[self._order]
        starts = range(0, self.num_samples, STRETCH)
        cuts = np.searchsorted(ascending, [*starts, self.num_samples])
        for start, begin, end in zip(starts, cuts, cuts[1:], strict=False):
            part = slice(start, min(start + STRETCH, self.num_samples))
            yield part, slice(begin, end) if self._order is None else self._order[begin:end]

    def _in_stretch(self, values: np.ndarray, part: slice, here) -> np.ndarray:
        whole = np.zeros((*values.shape[:-1], part.stop - part.start))
        whole[..., self.ids[here] - part.start] = values[..., here]
        return whole


def _pickled(outcome: Any) -> bytes:
    """An error that cannot be sent is sent in words."""
    try:
        words = pickle.dumps(outcome)
        pickle.loads(words)
        return words
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(outcome).__name__}: {outcome}"))
