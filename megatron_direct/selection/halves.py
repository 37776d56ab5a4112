"""Two halves of the evidence that share nothing: what one finds is judged by the other.

Shapes: M validation samples, k sketch coordinates.
"""

from __future__ import annotations

import numpy as np

from megatron_direct.data.ngram_hashes import NUM_FEATURES
from megatron_direct.selection.evidence import Evidence, Half

# Blocks of validation samples, each on one side of the split: more are a finer sample for the error
# of the mean.
_BLOCKS = 32
# Two in each half: a scatter is to be told from them.
FEWEST_SOURCES = 4


def source_blocks(evidence: Evidence) -> np.ndarray:
    """[M] a block for each validation sample; even blocks are one half.

    A source is in one block, wherever enough of them are known; samples whose source is not known
    count as of one with those around them. Where fewer than FEWEST_SOURCES are known, a block is a
    run of consecutive samples of one dataset, in which documents of one source stand next to each
    other if they were written so; the halves then share what sources are cut by the runs' ends, and
    those that stand in several places.
    """
    sources = _known_sources(evidence)
    if sources is None:
        return _runs(evidence.datasets_of_valid)
    return _blocks_of_sources(sources, evidence.datasets_of_valid)


def num_sources(evidence: Evidence) -> int:
    """Of the validation set, those that are known and that its halves are divided by; 0 where all
    blocks are runs of samples."""
    sources = _known_sources(evidence)
    return 0 if sources is None or evidence.valid_sources is None else len(
        np.unique(evidence.valid_sources[evidence.valid_sources >= 0]))


def _known_sources(evidence: Evidence) -> np.ndarray | None:
    """[M] from 0 without gaps, a run of samples of no known source being one; None where they are
    too few."""
    if evidence.valid_sources is None:
        return None
    of_others = -1 - _runs(evidence.datasets_of_valid)
    sources = np.unique(np.where(evidence.valid_sources < 0, of_others, evidence.valid_sources),
                        return_inverse=True)[1]
    return sources if sources.max() + 1 >= FEWEST_SOURCES else None


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
    load = np.zeros((2, min(_BLOCKS // 2, np.bincount(half, minlength=2).min())))
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
