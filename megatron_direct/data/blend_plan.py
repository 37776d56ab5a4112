"""What a blend comes to, before anything is built: what masks leave, weights, epochs.

A *blend* is a list of prefixes with or without weights, as Megatron has it. Here it is checked,
from the index files alone and on one rank; :mod:`megatron_direct.mcore.blend` builds it.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_direct.data import indexed
from megatron_direct.data.mask import SampleMask
from megatron_direct.errors import UserError

# What becomes of the weights given to the prefixes of a blend once masks have thinned them out.
BLEND_WEIGHTS = ("keep", "tokens")

# Up to four epochs of repeated data do about as much good as fresh data: Muennighoff et al.,
# "Scaling Data-Constrained Language Models", NeurIPS 2023.
MAX_EPOCHS = 4.0


@dataclass(frozen=True)
class Blend:
    """Prefixes, with weights or without."""

    prefixes: Sequence[str]
    weights: Sequence[float] | None = None

    def __post_init__(self):
        for prefix, weight in zip(self.prefixes, self.weights or (), strict=bool(self.weights)):
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"the blend gives {prefix} the weight {weight}: it must be a "
                                "finite number, at least 0.")
        if self.weights and not (0 < sum(self.weights) < math.inf):
            raise UserError(f"the weights of the blend sum to {sum(self.weights)}: at least one "
                            "must be above 0, and their sum finite.")


@dataclass(frozen=True)
class BlendRules:
    """What becomes of the weights of a blend once masks have thinned it out.

    blend_weights: ``keep`` leaves the weights as they are, ``tokens`` multiplies each by the share
    of its prefix's tokens that the mask leaves. max_epochs: how often a masked prefix may be seen;
    None: as often as it takes.
    """

    blend_weights: str = "keep"
    max_epochs: float | None = None


@dataclass(frozen=True)
class Demand:
    """What the training draws from a blend: sequences of a length, out of a share of each prefix
    (the part that a split takes)."""

    seq_length: int
    num_sequences: int
    share: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class BlendPart:
    """One prefix of a blend: what its mask leaves, and how often the training sees it.

    tokens: of an epoch, in which a document is seen as often as its count says, at most max_count
    times.
    """

    prefix: str
    documents: int
    tokens: int
    weight: float
    epochs: float
    masked: bool
    max_count: int = 1

    def __str__(self) -> str:
        counts = f", each up to {self.max_count} times an epoch" if self.max_count > 1 else ""
        return (f"{self.prefix}: {self.documents} documents{counts}, {self.tokens} tokens"
                f"{'' if self.masked else ' (no mask)'}, weight {self.weight:.4f}, "
                f"{self.epochs:.2f} epochs")


def plan_blend(blend: Blend, masks: Mapping[str, SampleMask], demand: Demand,
               rules: BlendRules | None = None) -> list[BlendPart]:
    """The parts of a blend from which training sequences will be drawn.

    Without weights a prefix counts by the tokens that are left, under any rule. A prefix with
    nothing left is dropped with a warning, and its weight is shared out among the others; so is one
    with less than a sequence, where Megatron takes each of several prefixes as it is.

    Raises UserError for a prefix listed twice, a damaged dataset, a mask of another dataset, a
    blend with nothing left, and a masked prefix that would be seen too often.
    """
    rules, prefixes = rules or BlendRules(), blend.prefixes
    _require_distinct(prefixes, masks)
    sizes = {prefix: _sizes(prefix, masks.get(prefix), demand.share) for prefix in prefixes}
    if blend.weights is None:
        shares = {prefix: float(left) for prefix, (_, left, _) in sizes.items()}
    else:
        shares = dict(zip(prefixes, blend.weights, strict=True))
        if rules.blend_weights == "tokens":
            shares = {prefix: shares[prefix] * left / max(whole, 1)
                      for prefix, (_, left, whole) in sizes.items()}
    least = least_tokens(blend, demand.seq_length) if rules.blend_weights == "keep" else 1
    used = [prefix for prefix in prefixes if shares[prefix] > 0
            and sizes[prefix][1] >= (least if prefix in masks else 1)]
    if not used:
        less = "" if least == 1 else f", or less than a sequence of {demand.seq_length} tokens"
        raise UserError("the masks keep no document in any dataset of the blend "
                        f"({', '.join(prefixes)}){less}. Select more samples, or check that the "
                        "masks belong to this run.")
    for prefix in prefixes:
        if prefix not in used:
            warnings.warn(f"{prefix} is left out of the blend: " + (
                "its mask keeps no document. Its weight is distributed over the others."
                if not sizes[prefix][1] else
                "its weight is 0." if not shares[prefix] else
                f"its mask keeps less than a sequence of {demand.seq_length} tokens."),
                stacklevel=2)
    total = sum(shares[prefix] for prefix in used)
    parts = []
    for prefix in used:
        documents, left, _ = sizes[prefix]
        weight = shares[prefix] / total
        num_tokens = weight * demand.num_sequences * demand.seq_length
        parts.append(BlendPart(prefix, documents, left, weight, num_tokens / left,
                               prefix in masks,
                               masks[prefix].max_count if prefix in masks else 1))
    _require_few_epochs(parts, rules.max_epochs)
    return parts


def num_sequences_in(parts: Sequence[BlendPart], seq_length: int) -> int:
    """Training sequences in one epoch of the parts. A sequence has one token more than its length,
    which it shares with the next."""
    return sum((part.tokens - 1) // seq_length for part in parts)


def least_tokens(blend: Blend, seq_length: int) -> int:
    """That Megatron builds a dataset of: without weights, each of several gives an epoch of its
    own, of at least a sequence."""
    return seq_length + 1 if blend.weights is None and len(blend.prefixes) > 1 else 1


def require_something_left(blend: Blend, masks: Mapping[str, SampleMask],
                           demand: Demand, split: str) -> None:
    """Raises UserError if a mask leaves nothing in the part of its prefix that a split takes."""
    for prefix in blend.prefixes:
        if prefix in masks and _sizes(prefix, masks[prefix], demand.share)[1] < least_tokens(
                blend, demand.seq_length):
            raise UserError(
                f"the mask of {prefix} keeps no document in the {split} split of --split, or "
                "less than a sequence. Give "
                "--split 100,0,0, with --train-data-path and --valid-data-path for separate "
                "datasets, so that training uses the whole pools.")


def _sizes(prefix: str, mask: SampleMask | None, share: tuple[float, float],
           ) -> tuple[int, int, int]:
    """(documents left, tokens left, tokens without a mask) in a part of a dataset.

    Megatron splits a dataset by its sequences; a document counts where its first sequence is.
    """
    dataset = indexed.open_indexed(prefix)
    begin, end = (int(round(bound * len(dataset.sequence_lengths))) for bound in share)
    lengths = dataset.sequence_lengths[begin:end]
    whole = int(lengths.sum(dtype=np.int64))
    first = dataset.document_indices[:-1]
    inside = (first >= begin) & (first < end) & (np.diff(dataset.document_indices) > 0)
    if mask is None:
        return int(inside.sum()), whole, whole
    mask.require_belongs_to(prefix)
    counts = sequence_counts(dataset, mask)[begin:end]
    left = int(np.dot(lengths.astype(np.int64), counts.astype(np.int64)))
    return int((inside & mask.keep).sum()), left, whole


# Dataset digest -> whether each document is one sequence: what costs a pass over the index.
_ONE_SEQUENCE_EACH: dict[str, bool] = {}


def sequence_counts(dataset, mask: SampleMask) -> np.ndarray:
    """[sequences] uint8 how often each is seen per epoch. The indexed dataset counts sequences; a
    document has one or more."""
    num_documents = len(dataset.document_indices) - 1
    if mask.num_documents != num_documents:
        raise UserError(f"the mask has {mask.num_documents} entries, but its dataset has "
                        f"{num_documents} documents.")
    if _has_one_sequence_each(dataset, mask):
        return mask.counts
    return np.repeat(mask.counts, np.diff(dataset.document_indices))


def kept_sequences(dataset, mask: SampleMask, begin: int = 0, end: int | None = None,
                   ) -> np.ndarray:
    """[n] numbers of the sequences from ``begin`` to ``end`` that are kept, in their order; a
    document with a count comes whole, so many times in a row."""
    counts = sequence_counts(dataset, mask)[begin:end]
    kept = begin + np.flatnonzero(counts)
    if mask.max_count == 1:
        return kept
    times = counts[kept - begin]
    if _has_one_sequence_each(dataset, mask):
        return np.repeat(kept, times)
    document = np.searchsorted(dataset.document_indices, kept, side="right")
    repeated = np.repeat(np.arange(len(kept)), times)
    copy = np.arange(len(repeated)) - np.repeat(np.cumsum(times) - times, times)
    return kept[repeated[np.lexsort((repeated, copy, document[repeated]))]]


def _has_one_sequence_each(dataset, mask: SampleMask) -> bool:
    if mask.dataset_digest not in _ONE_SEQUENCE_EACH:
        _ONE_SEQUENCE_EACH[mask.dataset_digest] = bool(
            (np.diff(dataset.document_indices) == 1).all())
    return _ONE_SEQUENCE_EACH[mask.dataset_digest]


def _require_distinct(prefixes: Sequence[str], masks: Mapping[str, SampleMask]) -> None:
    """One dataset under two names counts as listed twice, unless masks part it among them."""
    seen: dict[str, str] = {}
    taken: dict[str, SampleMask] = {}
    for prefix in prefixes:
        # A dataset is known by where its index is: links make views of parts of it.
        place = os.path.realpath(prefix + ".idx")
        mask = masks.get(prefix)
        if place not in seen:
            seen[place] = prefix
            if mask is not None:
                taken[place] = mask
        elif mask is not None and place in taken and (taken[place] & mask).num_kept == 0:
            taken[place] = taken[place] | mask
        else:
            raise UserError(f"{prefix} is listed twice in the blend"
                            + (f" (also as {seen[place]})" if seen[place] != prefix else "")
                            + ". List each dataset once, with the sum of its weights, or parts "
                            "of it under masks that have no document in common.")


def _require_few_epochs(parts: Sequence[BlendPart], max_epochs: float | None) -> None:
    def times(part: BlendPart) -> float:
        return part.epochs * part.max_count  # of the documents that are seen most often

    many = [part for part in parts if part.masked and max_epochs and times(part) > max_epochs]
    if many:
        listed = "; ".join(f"{part.prefix} {times(part):.2f} times" for part in many)
        raise UserError(
            f"the training would see masked datasets more often than --max-epochs {max_epochs:g}: "
            f"{listed}. Select more samples, train on fewer tokens, lower their weights or raise "
            "--max-epochs.")
