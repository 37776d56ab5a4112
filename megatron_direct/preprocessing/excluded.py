"""Documents of indexed datasets that a run must not overlap, such as a validation set made before.

What ended these documents is not part of them. A dataset of this tool says on its card which token
was added to each. Of another one it is unknown: its documents are compared without the tokens at
their end that stand for no text, and, where all of them end in one and the same token, also without
that. Windows do not show where a document ends, since a text may itself hold the token that ends
documents; so the lengths of the documents are kept beside them (see windows.py).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_direct.data import indexed
from megatron_direct.data.cards import read_card
from megatron_direct.errors import UserError
from megatron_direct.preprocessing import shards, windows

_HASHES_AT_A_TIME = 1 << 16


class ExcludedDataset:
    """Raises UserError where it was made with another tokenizer, or its documents are lost.

    end_tokens: those that shards.document_hash leaves out.
    """

    def __init__(self, prefix: str, tokenizer_digest: str, end_tokens: frozenset[int]):
        self.prefix = prefix
        self._dataset, self._end_tokens = indexed.open_indexed(prefix), end_tokens
        self._card = read_card(prefix)
        if self._card.get("tokenizer_digest", tokenizer_digest) != tokenizer_digest:
            raise UserError(f"{prefix} of --exclude was made with another tokenizer than "
                            "--tokenizer-model: equal documents would not be found. Rebuild it "
                            "with this one.")
        self._lengths = windows.read_lengths(prefix, self._card) \
            if self._card.get("samples") == "window" else None
        self.num_documents = indexed.num_documents(self._dataset) if self._lengths is None \
            else len(self._lengths)

    def hashes(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers, hashes [n] of shards.HASH) of documents in blocks; a number may come twice."""
        numbers: list[int] = []
        found: list[bytes] = []
        for number, tokens in self._texts():
            numbers.append(number)
            found.append(shards.document_hash(tokens, self._end_tokens))
            if len(found) == _HASHES_AT_A_TIME:
                yield np.array(numbers), np.frombuffer(b"".join(found), shards.HASH)
                numbers.clear()
                found.clear()
        yield np.array(numbers, np.int64), np.frombuffer(b"".join(found), shards.HASH)

    def _texts(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number, int32 tokens) of each document, without the end that was added to it."""
        if "eod" in self._card:
            for number, tokens in enumerate(self._documents()):
                has_end = len(tokens) and tokens[-1] == self._card["eod"]
                yield number, tokens[:-1] if has_end else tokens
            return
        shared = self._shared_last_token()
        for number, tokens in enumerate(self._documents()):
            yield number, tokens
            if shared is not None:
                yield number, tokens[:-1]

    def _documents(self) -> Iterator[np.ndarray]:
        if self._lengths is not None:
            yield from windows.documents(self.prefix, self._dataset.dtype, self._lengths,
                                         self._card)
            return
        for number in range(self.num_documents):
            yield indexed.document_tokens(self._dataset, number).astype(np.int32)

    def _shared_last_token(self) -> int | None:
        """The token in which all documents end, unless ``end_tokens`` has it."""
        shared = None
        for tokens in self._documents():
            if len(tokens):
                last = int(tokens[-1])
                if last in self._end_tokens or shared not in (None, last):
                    return None
                shared = last
        return shared
