"""Documents of indexed datasets that a run must not overlap, such as a validation set made before.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import shards

_DOCUMENTS_AT_A_TIME = 1 << 16


class ExcludedDataset:
    """Raises UserError where it was made with another tokenizer, or its documents are lost."""

    def __init__(self, prefix: str, tokenizer_digest: str, eod: int | None):
        from megatron_direct.data import indexed

        self.prefix = prefix
        self._dataset, self._eod = indexed.open_indexed(prefix), eod
        self.num_documents = indexed.num_documents(self._dataset)
        card = indexed.read_card(prefix)
        if card.get("tokenizer_digest", tokenizer_digest) != tokenizer_digest:
            raise UserError(f"{prefix} of --exclude was made with another tokenizer than "
                            "--tokenizer-model: equal documents would not be found. Make it again "
                            "with this one.")
        self._are_windows = card.get("samples") == "window"
        if self._are_windows and card["eod"] is None:
            raise UserError(f"{prefix} of --exclude holds windows without end-of-document tokens, "
                            "from which no documents can be told. Make it again with --append-eod, "
                            "or with --samples document.")

    def hashes(self) -> Iterator[np.ndarray]:
        """[documents] of shards.HASH in blocks."""
        waiting: list[bytes] = []
        for tokens in self._documents():
            waiting.append(shards.document_hash(tokens, self._eod))
            if len(waiting) == _DOCUMENTS_AT_A_TIME:
                yield np.frombuffer(b"".join(waiting), shards.HASH)
                waiting.clear()
        yield np.frombuffer(b"".join(waiting), shards.HASH)

    def _documents(self) -> Iterator[np.ndarray]:
        """int32 tokens of each. Windows are joined, and cut behind end-of-document tokens; what
        the last of them cuts off is no document of the dataset."""
        from megatron_direct.data import indexed

        rest = np.empty(0, np.int32)
        for number in range(self.num_documents):
            tokens = indexed.document_tokens(self._dataset, number).astype(np.int32)
            if not self._are_windows:
                yield tokens
                continue
            *whole, rest = np.split(np.concatenate([rest, tokens]), 1 + np.flatnonzero(
                np.concatenate([rest, tokens]) == self._eod))
            yield from whole
