"""Checks over all datasets of a command, before any work is done."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from megatron_direct.data import indexed
from megatron_direct.data.cards import read_card
from megatron_direct.errors import UserError

# The name of the loss per token of all datasets together, among those of each.
ALL_DATASETS = "all"


def require_one_vocabulary(prefixes: Sequence[str], vocab_size: int | None,
                           tokenizer_digest: str | None) -> tuple[int, str | None]:
    """(vocabulary size, tokenizer digest) that all datasets, and a checkpoint, agree on.

    vocab_size, tokenizer_digest: what the flags or the checkpoint say, None where they say nothing.
    A dataset without a card (one made elsewhere) agrees with everything; its tokens are compared
    with the vocabulary as they are read. Raises UserError that names the datasets that differ.
    """
    said_by = "the checkpoint"
    for prefix in prefixes:
        indexed.check_files(prefix)
        card = read_card(prefix)
        if not card:
            continue
        if tokenizer_digest is None:
            tokenizer_digest, said_by = card["tokenizer_digest"], prefix
        elif card["tokenizer_digest"] != tokenizer_digest:
            raise UserError(
                f"{prefix} was made with a tokenizer of {card['vocab_size']} entries (digest "
                f"{card['tokenizer_digest']}), {said_by} with another one (digest "
                f"{tokenizer_digest}). Rebuild the dataset, giving that one as --tokenizer-model.")
        if vocab_size is None:
            vocab_size = card["vocab_size"]
        elif card["vocab_size"] > vocab_size:
            raise UserError(
                f"{prefix} uses a vocabulary of {card['vocab_size']} entries, but the model has "
                f"{vocab_size}. Make the dataset with the model's tokenizer.")
    if vocab_size is None:
        raise UserError("the size of the vocabulary is not known: neither the datasets nor a "
                        "checkpoint record it. Give --vocab-size.")
    return vocab_size, tokenizer_digest


def require_disjoint(**lists: Sequence[str]) -> None:
    """Raises UserError where a dataset is listed as two things; keywords say what they are."""
    seen: dict[str, str] = {}
    for what, prefixes in lists.items():
        kind = what if what == "pool" else f"{what} set"
        files = {os.path.realpath(f"{prefix}.bin"): prefix for prefix in prefixes}
        for file, prefix in files.items():
            if file in seen:
                raise UserError(
                    f"{prefix} is listed as a {seen[file]} and as a {kind}. Pools, validation and "
                    "test sets must be different datasets.")
        seen |= dict.fromkeys(files, kind)


def require_names_of_their_own(validation: Sequence[str], test: Sequence[str]) -> None:
    """Raises UserError for a dataset whose loss would be taken for that of all of them. A single
    validation set's is the same."""
    for what, prefixes in (("validation", validation if len(validation) > 1 else ()),
                           ("test", test)):
        for prefix, name in indexed.prefix_names(list(prefixes)).items():
            if name == ALL_DATASETS:
                raise UserError(
                    f"the {what} set {prefix} has the name {name}, by which losses over all "
                    f"{what} sets are reported. Rename its files, or give links to them.")


def require_different(digests: Mapping[str, str]) -> None:
    """Raises UserError where two of the datasets, by prefix, hold the same documents."""
    seen: dict[str, str] = {}
    for prefix, digest in digests.items():
        if digest in seen:
            raise UserError(f"{prefix} holds the same documents as {seen[digest]}. List one of "
                            "them.")
        seen[digest] = prefix
