"""Two halves of the evidence that share nothing: what one finds is judged by the other.

Shapes: M validation samples, k sketch coordinates.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from megatron_direct.data.ngram_hashes import NUM_FEATURES
from megatron_direct.selection.evidence import Evidence, Half

# Blocks of validation samples, each on one side of the split: more are a finer sample for the error
# of the mean.
_BLOCKS = 32
# In each half, for the scatter over blocks to say something: Student's t of 8 blocks is 5.4 at
# 99.9 %, of 2 it is 637.
_FEWEST_BLOCKS = 4


@dataclass(frozen=True, eq=False)
class Division:
    """Of the validation set. blocks: [M] numbers, of which the even ones are one half; num_sources:
    by which it is divided, or that are too few to divide it by; is_by_source: whether each of them
    is in one block; others: whether some samples are divided otherwise."""

    blocks: np.ndarray
    num_sources: int
    is_by_source: bool
    others: bool

    def __str__(self) -> str:
        runs = "runs of consecutive documents"
        if not self.num_sources:
            return f"{runs}, whose sources are not known"
        if not self.is_by_source:
            return f"{runs}: its {self.num_sources} sources are too few, or too unequal, to divide"
        return f"{self.num_sources} sources, each in one of them" + (
            f", and {runs} whose sources are not known, or too few" if self.others else "")


def divide(evidence: Evidence) -> Division:
    """By source, wherever sources are known and give either half _FEWEST_BLOCKS blocks, some of
    them of each dataset; samples whose source is not known count as of one with those around them.

    Otherwise a block is a run of consecutive samples of one dataset, in which documents of one
    source stand next to each other if they were written so. The halves then share what sources are
    cut by the runs' ends, and those that stand in several places.
    """
    return evidence.once(("division",), lambda: _divide(evidence))


def _divide(evidence: Evidence) -> Division:
    datasets, given = evidence.datasets_of_valid, evidence.valid_sources
    runs = _runs(datasets)
    if given is None:
        return Division(runs, 0, False, True)
    known = given
    while True:
        sources = np.unique(np.where(known < 0, -1 - runs, known), return_inverse=True)[1]
        blocks = _blocks_of_sources(sources, datasets)
        # A dataset all of which is in one half, as one of a single source is, would be unknown to
        # the other, which could not find what is worth something to it.
        whole = np.isin(datasets, _datasets_of_one_half(blocks, datasets)) & (known >= 0)
        if not whole.any():
            break
        known = np.where(whole, -1, known)
    if (known < 0).all() or blocks.max() + 1 < 2 * _FEWEST_BLOCKS:
        return Division(runs, len(np.unique(given[given >= 0])), False, True)
    return Division(blocks, len(np.unique(known[known >= 0])), True, bool((known < 0).any()))


def _datasets_of_one_half(blocks: np.ndarray, datasets: np.ndarray) -> list[int]:
    """Those of two samples or more."""
    return [number for number in np.unique(datasets)
            if (datasets == number).sum() > 1
            and len(np.unique(blocks[datasets == number] % 2)) == 1]


def source_blocks(evidence: Evidence) -> np.ndarray:
    """[M] a block for each validation sample (:func:`divide`)."""
    return divide(evidence).blocks


def _runs(datasets: np.ndarray) -> np.ndarray:
    """[M] blocks of consecutive samples of one dataset, at most _BLOCKS in all. Of each dataset
    that has two samples some are in either half; where there are more datasets than fit, blocks
    hold samples of several."""
    blocks, first = np.zeros(len(datasets), dtype=np.int64), 0
    for number in np.unique(datasets):
        here = np.flatnonzero(datasets == number)
        pairs = max(1, round(_BLOCKS * len(here) / len(datasets) / 2))
        count = min(len(here), 2 * pairs)
        blocks[here] = first + np.arange(len(here)) * count // len(here)
        first += count
    return blocks % _BLOCKS


def _blocks_of_sources(sources: np.ndarray, datasets: np.ndarray) -> np.ndarray:
    """[M] blocks of whole sources, equally many in either half. sources: [M] from 0 without gaps.

    The largest first, a source goes to the half that has less of the datasets that it is in, and
    there to the block that has least.
    """
    datasets = np.unique(datasets, return_inverse=True)[1]
    counts = np.zeros((sources.max() + 1, datasets.max() + 1))
    np.add.at(counts, (sources, datasets), 1)
    sizes, shares = counts.sum(1), counts / counts.sum(0)
    order = np.argsort(-sizes, kind="stable")
    half, held = np.zeros(len(sizes), dtype=np.int64), np.zeros((2, shares.shape[1]))
    for source in order:
        in_common = held @ shares[source]
        half[source] = np.lexsort((held.sum(1), in_common))[0]
        held[half[source]] += shares[source]
    blocks = np.zeros(len(sizes), dtype=np.int64)
    # At least one: a single source leaves the other half empty, and its caller takes runs.
    load = np.zeros((2, max(1, min(_BLOCKS // 2, np.bincount(half, minlength=2).min()))))
    for source in order:
        side = half[source]
        block = int(np.argmin(load[side]))
        load[side, block] += sizes[source]
        blocks[source] = 2 * block + side
    return blocks[sources]


def first_coordinates(size: int, seed: int) -> np.ndarray:
    """[k] bool: half of the coordinates of a sketch, at random."""
    found = np.zeros(size, dtype=bool)
    found[np.random.default_rng(seed).permutation(size)[: size // 2]] = True
    return found


def halves_of(evidence: Evidence, seed: int) -> tuple[Half, Half]:
    """Two halves that share no source of validation samples, as far as these are known, no
    coordinate and no n-gram."""
    coordinates = first_coordinates(evidence.rows.shape[1], seed)
    valid = source_blocks(evidence) % 2 == 0
    features = first_coordinates(NUM_FEATURES, seed)
    return Half(coordinates, valid, features), Half(~coordinates, ~valid, ~features)
