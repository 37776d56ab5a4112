"""Parts of shards, one after the other, as one indexed dataset.

The bytes are those that Megatron's IndexedDatasetBuilder writes when it is given one shard after
the other through ``add_index``. They are written here all the same: the builder holds the lengths
of all documents as Python objects, more than a hundred bytes for each, which grows with the input.
Here a document is one sequence.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from megatron_direct.data import indexed, sources
from megatron_direct.data.cards import Card
from megatron_direct.preprocessing import catalogue, duplicates, windows
from megatron_direct.preprocessing.catalogue import PlannedDataset
from megatron_direct.preprocessing.settings import PreprocessSettings
from megatron_direct.preprocessing.splits import uniform
from megatron_direct.preprocessing.tokenizer import TokenizerIdentity
from megatron_direct.runtime import files


@dataclass(frozen=True)
class Merger:
    """Writes datasets, each by one call: in any process, since all that it needs are its values."""

    settings: PreprocessSettings
    tokenizer: TokenizerIdentity

    def __call__(self, target: PlannedDataset) -> tuple[PlannedDataset, Card]:
        """Writes a dataset and its card. Without any document nothing is written.

        The card comes first and the index last: a dataset with an index is whole.
        """
        settings = self.settings
        card = Card(
            domain=target.domain, split=target.split, tokenizer_digest=self.tokenizer.digest,
            vocab_size=self.tokenizer.vocab_size, samples=settings.samples,
            eod=self.tokenizer.eod if settings.append_eod else None,
            seq_length=settings.seq_length)
        with tempfile.TemporaryFile(dir=settings.folder) as lengths, \
                tempfile.TemporaryFile(dir=settings.folder) as of_documents, \
                tempfile.TemporaryFile(dir=settings.folder) as numbers:
            with files.written_whole(target.prefix + ".bin") as file:
                for tokens, sizes in self._candidates(target, card, of_documents, numbers):
                    file.write(self._corrupted(tokens, sizes, card))
                    lengths.write(sizes.data)
                    card.documents += len(sizes)
                    card.tokens += len(tokens)
                # They belong to an older .bin.
                _unlink(target.prefix, ".idx", ".documents.npy", sources.SUFFIX)
                if card.documents:
                    files.write_json(target.prefix + ".json", card.as_json())
            if not card.documents:
                _unlink(target.prefix, ".bin", ".json")
                return target, card
            if settings.seq_length:
                windows.write_lengths(target.prefix, _numbers(of_documents, np.int32))
            elif settings.group_key is not None:
                sources.write_sources(target.prefix, _numbers(numbers, np.int64))
            indexed.write_index(target.prefix + ".idx", target.dtype, _numbers(lengths, np.int32))
        return target, card

    def _candidates(self, target: PlannedDataset, card: Card, of_documents: BinaryIO,
                    numbers: BinaryIO) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(tokens, lengths) of what the dataset holds, a shard at a time.

        of_documents: takes the lengths of the documents that windows are cut from; numbers: the
        sources of documents, where these are known.
        """
        seq_length = self.settings.seq_length
        rest = np.empty(0, target.dtype)
        for tokens, lengths, of_sources in self._documents(target, card):
            numbers.write(of_sources.data)
            if seq_length:
                of_documents.write(lengths.data)
                tokens, rest = windows.cut(np.concatenate([rest, tokens]), seq_length)
                lengths = np.full(len(tokens) // seq_length, seq_length, np.int32)
            if len(lengths):
                yield tokens, lengths
        card.tokens_cut, card.rest = len(rest), rest.tolist()

    def _documents(self, target: PlannedDataset, card: Card,
                   ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens, lengths, sources) of the documents that are not dropped; no sources without
        --group-key."""
        has_sources = self.settings.group_key is not None
        with open(self.settings.folder / duplicates.FLAGS, "rb") as flags_file:
            for entry in catalogue.entries(target):
                flags_file.seek(entry.first)
                flags = np.frombuffer(flags_file.read(entry.file.part.documents), np.uint8)
                card.duplicates += int(np.sum(flags == duplicates.COPY))
                card.leaked += int(np.sum(flags == duplicates.LEAK))
                tokens, lengths = entry.file.read_tokens(), entry.file.read_lengths()
                numbers = entry.file.read_sources() if has_sources else np.empty(0, np.int64)
                if self.settings.drop_duplicates and flags.any():
                    keep = flags == duplicates.UNIQUE
                    card.dropped += int(np.sum(~keep))
                    tokens, lengths = tokens[np.repeat(keep, lengths)], lengths[keep]
                    numbers = numbers[keep] if has_sources else numbers
                yield tokens, lengths, numbers

    def _corrupted(self, tokens: np.ndarray, lengths: np.ndarray, card: Card) -> np.ndarray:
        """Some candidates of a pool with their tokens in a random order, as the card lists them.

        A document keeps the token that ends it at its end.
        """
        fraction, seed = self.settings.corrupt_fraction, self.settings.seed
        if card.split != "pool" or not fraction:
            return tokens
        tokens, ends = tokens.copy(), np.cumsum(lengths, dtype=np.int64)
        for number, (end, length) in enumerate(zip(ends, lengths, strict=True), card.documents):
            if uniform(f"{seed}\x1fcorrupt\x1f{card.domain}\x1f{number}") >= fraction:
                continue
            card.corrupted.append(number)
            if card.samples == "document" and card.eod is not None:
                end, length = end - 1, length - 1
            order = np.random.default_rng([seed, number]).permutation(length)
            tokens[end - length: end] = tokens[end - length: end][order]
        return tokens


def _numbers(file: BinaryIO, dtype: type) -> np.ndarray:
    """What was written to the file, as a map of it: memory holds what is looked at."""
    file.flush()
    return np.memmap(file, dtype, "r") if file.tell() else np.empty(0, dtype)


def _unlink(prefix: str, *suffixes: str) -> None:
    for suffix in suffixes:
        Path(prefix + suffix).unlink(missing_ok=True)
