"""The card of a dataset, ``PREFIX.json`` beside it: what preprocessing says of what it wrote."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.runtime import files, typed_json


@dataclass(kw_only=True)
class Card:
    """Describes a dataset. Entries that came later have defaults, which older cards lack."""

    domain: str = ""
    split: str = ""
    tokenizer_digest: str
    vocab_size: int
    eod: int | None = None  # the token that was added to the end of each document
    samples: str = "document"  # document or window; the rest counts these
    documents: int = 0
    tokens: int = 0
    corrupted: list[int] = field(default_factory=list)  # numbers of documents
    duplicates: int = 0
    leaked: int = 0
    dropped: int = 0
    seq_length: int | None = None
    tokens_cut: int = 0  # left out after the last whole window
    rest: list[int] = field(default_factory=list)  # these tokens

    def as_json(self) -> dict:
        entries = dataclasses.asdict(self)
        if self.samples == "document":
            del entries["seq_length"], entries["tokens_cut"], entries["rest"]
        return entries


def read_card(prefix: str) -> dict:
    """The entries of a Card that the file has; {} for a dataset made elsewhere.

    Raises UserError for a file that is damaged, or that is no card.
    """
    path = Path(prefix + ".json")
    if not path.is_file():
        return {}
    value = files.read_json(path)
    try:
        card = typed_json.from_json(Card, value, "card")
        if card.vocab_size < 1 or min([0, *card.corrupted]) < 0:
            raise ValueError("it counts below zero")
        if max([-1, *card.corrupted]) >= max(card.documents, 0):
            raise ValueError("it calls documents corrupted that the dataset does not have")
    except ValueError as error:
        raise UserError(
            f"{path} is not the card of a dataset, or is damaged ({error}). Copy or make the "
            f"dataset again; without {path} it counts as one that was made elsewhere.") from error
    return value


def corrupted_documents(prefix: str, num_documents: int) -> np.ndarray:
    """[corrupted] numbers of the documents that were shuffled on purpose, as the card says.

    Raises UserError for the card of a dataset that has more documents.
    """
    numbers = np.array(read_card(prefix).get("corrupted", []), np.int64)
    if len(numbers) and numbers.max() >= num_documents:
        raise UserError(f"{prefix}.json is the card of another dataset: it calls document "
                        f"{numbers.max()} corrupted, and {prefix} has {num_documents} documents. "
                        "Copy or make the dataset again.")
    return numbers
