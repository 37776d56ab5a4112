"""Text of shards into tokens on disk: the work that takes the time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from megatron_direct.data.sources import source_number
from megatron_direct.preprocessing import documents, reading, shards, splits, tokenizer
from megatron_direct.preprocessing.documents import BadLine, Document
from megatron_direct.preprocessing.reading import Shard, Stream
from megatron_direct.preprocessing.settings import PreprocessSettings
from megatron_direct.preprocessing.shards import Columns, Manifest

_TEXTS_AT_A_TIME = 64


def expand(work: Sequence[Shard | Stream], folder: Path, shard_bytes: int) -> Iterator[Shard]:
    """Streams become shards, without those that are there."""
    there = set(shards.names(folder))
    for unit in work:
        for shard in reading.shards_of(unit, shard_bytes):
            if shard.name not in there:
                yield shard


class ShardTokenizer:
    """Makes the files of shards, in one process, with a tokenizer that is loaded once."""

    def __init__(self, settings: PreprocessSettings):
        self._settings = settings
        self._tokenizer = tokenizer.load_tokenizer(settings.tokenizer_model, settings.eod_token,
                                         settings.append_eod)
        self._dtype = np.dtype(tokenizer.token_dtype(self._tokenizer.vocab_size))
        self._end = np.array([self._tokenizer.eod] if settings.append_eod else [], np.int32)
        self._end_tokens = tokenizer.end_tokens(self._tokenizer)

    def __call__(self, shard: Shard) -> int:
        """Writes both files of a shard and returns its size in the input."""
        settings = self._settings
        parts: dict[tuple[str, str], Columns] = {}
        bad: list[tuple[int, str]] = []
        batch: list[Document] = []
        too_short = 0
        for item in documents.checked(shard, settings.fields, settings.skip_bad_lines):
            if isinstance(item, BadLine):
                bad.append((item.line, item.reason))
                continue
            batch.append(item)
            if len(batch) == _TEXTS_AT_A_TIME:
                too_short += self._add(batch, parts)
                batch.clear()
        if batch:
            too_short += self._add(batch, parts)
        written = shards.write_parts(settings.folder, shard, parts)
        shards.write_manifest(settings.folder, Manifest(
            path=str(shard.path), file=shard.file, shard=shard.number,
            lines=reading.num_lines(shard), is_last=shard.is_last, too_short=too_short, bad=bad,
            dtype=self._dtype.name, parts=written))
        return shard.size

    def _add(self, batch: list[Document], parts: dict[tuple[str, str], Columns]) -> int:
        """Adds the documents to their parts, and returns how many are too short for any."""
        too_short = 0
        encoded = self._tokenizer.encode([document.text for document in batch])
        for document, text in zip(batch, encoded, strict=True):
            tokens = np.concatenate([text, self._end]) if len(text) else text
            if len(tokens) < 2:
                too_short += 1
                continue
            split = splits.split_of(document.group, self._settings.shares, self._settings.seed)
            columns = parts.setdefault((document.domain, split), Columns())
            columns.tokens.append(tokens.astype(self._dtype))
            columns.lines.append(document.line)
            columns.hashes.append(shards.document_hash(text, self._end_tokens))
            if self._settings.group_key is not None:
                columns.sources.append(source_number(document.group))
        return too_short
