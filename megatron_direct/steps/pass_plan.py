"""Which samples a pass over a pool still has to compute, and which rows there are.

Vectors over all samples are made a block at a time, as bits where they are sent or stored, and held
once on each node. Entries of rows are read a file at a time: no rank ever holds those of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.data.samples import Samples
from megatron_direct.gradients.store import Entries, SketchStore
from megatron_direct.runtime import arrays, files, parallel, sharing


@dataclass(frozen=True)
class Drawn:
    """Some documents of some datasets. what: how messages call them; numbers: [n], ascending, of
    the samples that are meant; digests: of the datasets, in their order."""

    what: str
    samples: Samples
    numbers: np.ndarray
    digests: Sequence[str]


@dataclass(frozen=True)
class PassPlan:
    """planned: [p] samples in which passes are planned, ascending; done: [samples] bool, True for
    those that have a row; num_left: planned and not done."""

    planned: np.ndarray
    done: np.ndarray
    num_left: int


def make_plan(store: SketchStore, drawn: Drawn) -> PassPlan:
    """All ranks call this.

    The plan is kept on the disk until all of it is done, so that a run that was killed goes through
    the same micro-batches, and ends with the same bytes.
    """
    bits, num_left = parallel.on_rank_zero(lambda: _plan_bits(store, drawn))
    count = len(drawn.samples)
    done = sharing.node_array(count, bool, lambda array: _unpack(bits["done"], array))
    if bits["planned"] is None:
        return PassPlan(drawn.numbers, done, num_left)
    planned = sharing.node_array(
        int(np.unpackbits(bits["planned"]).sum(dtype=np.int64)), np.int64, lambda array: np.copyto(
            array, np.flatnonzero(np.unpackbits(bits["planned"], count=count))))
    return PassPlan(planned, done, num_left)


def with_rows(store: SketchStore, drawn: Drawn) -> np.ndarray:
    """[samples] bool: those of which the store has a row."""
    found = np.zeros(len(drawn.samples), dtype=bool)
    for entries in store.entries_by_file():
        sample = _sample_numbers(store, drawn, entries.dataset, entries.document)
        found[sample[sample >= 0]] = True
    return found


def rows_of(store: SketchStore, drawn: Drawn, numbers: np.ndarray) -> tuple[Entries, np.ndarray]:
    """(entries, [n] sample numbers, ascending) of those of ``numbers``, which ascend, that have a
    row; one row each."""
    found: list[tuple[Entries, np.ndarray]] = []
    for entries in store.entries_by_file():
        sample = _sample_numbers(store, drawn, entries.dataset, entries.document)
        place = np.searchsorted(numbers, sample)
        wanted = np.flatnonzero(place < len(numbers))
        wanted = wanted[numbers[place[wanted]] == sample[wanted]]
        found.append((entries[wanted], sample[wanted]))
    entries = Entries.joined([part for part, _ in found])
    # A row may be there twice, if two ranks computed it: one of them serves.
    samples, first = np.unique(np.concatenate([np.empty(0, np.int64), *(s for _, s in found)]),
                               return_index=True)
    return entries[first], samples


def dataset_numbers(store: SketchStore, drawn: Drawn) -> np.ndarray:
    """[datasets drawn] the number by which the store knows each."""
    numbers = {digest: number for number, digest in enumerate(store.datasets())}
    return np.array([numbers[digest] for digest in drawn.digests])


def plan_path(store: SketchStore, drawn: Drawn) -> Path:
    return store.folder / f"plan-{drawn.what}.npz"


def _plan_bits(store: SketchStore, drawn: Drawn) -> tuple[dict[str, np.ndarray | None], int]:
    """({done, planned: bits of the samples}, number left) (rank 0). planned: None for all that is
    drawn."""
    store.number_datasets(drawn.digests)
    done = with_rows(store, drawn)
    missing = np.zeros(len(done), dtype=bool)
    missing[drawn.numbers] = True
    missing &= ~done
    num_left = int(np.count_nonzero(missing))
    planned = _planned_before(store, drawn)
    if planned is None or (missing & ~planned).any():
        planned = missing
        _write_plan(store, drawn, planned)
    else:
        is_drawn = np.zeros(len(done), dtype=bool)
        is_drawn[drawn.numbers] = True
        planned &= is_drawn
    is_all = int(np.count_nonzero(planned)) == len(drawn.numbers)
    bits = {"done": np.packbits(done), "planned": None if is_all else np.packbits(planned)}
    return bits, num_left


def _write_plan(store: SketchStore, drawn: Drawn, planned: np.ndarray) -> None:
    numbers = dataset_numbers(store, drawn)
    with files.written_whole(plan_path(store, drawn)) as file:
        np.savez(file, allow_pickle=False, **{
            f"dataset-{number}": np.packbits(planned[here])
            for number, here in zip(numbers, _of_datasets(drawn), strict=True)})


def _planned_before(store: SketchStore, drawn: Drawn) -> np.ndarray | None:
    """[samples] bool of the plan on the disk, if there is one."""
    path = plan_path(store, drawn)
    if not path.is_file():
        return None
    planned = np.zeros(len(drawn.samples), dtype=bool)
    plan = arrays.read_npz(path, arrays.MAKE_AGAIN)
    for number, here in zip(dataset_numbers(store, drawn), _of_datasets(drawn), strict=True):
        if f"dataset-{number}" in plan:
            _unpack(plan[f"dataset-{number}"], planned[here])
    return planned


def _of_datasets(drawn: Drawn) -> Iterator[slice]:
    first = drawn.samples.first.tolist()
    return (slice(begin, end) for begin, end in zip(first, first[1:], strict=False))


def _unpack(bits: np.ndarray, array: np.ndarray) -> None:
    array[:] = np.unpackbits(bits, count=len(array))


def _sample_numbers(store: SketchStore, drawn: Drawn, datasets: np.ndarray, documents: np.ndarray,
                    ) -> np.ndarray:
    """[n] of documents, by the numbers that the store has for their datasets; -1 for others."""
    order = {digest: number for number, digest in enumerate(drawn.digests)}
    places = np.array([order.get(digest, -1) for digest in store.datasets()], np.int64)
    place = places[datasets] if len(places) else np.empty(0, np.int64)
    return np.where(place >= 0, drawn.samples.first[place] + documents, -1)
