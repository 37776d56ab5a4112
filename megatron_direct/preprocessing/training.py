"""A tokenizer that is trained on the pool documents of the input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_direct.preprocessing import documents, reading, shard_folder, splits, tokenizer
from megatron_direct.preprocessing.documents import Document
from megatron_direct.preprocessing.reading import Shard, Stream
from megatron_direct.preprocessing.settings import PreprocessSettings
from megatron_direct.preprocessing.tokenizer import Tokenizer

# The trainer holds it in memory about ten times over.
TRAINING_BYTES = 256 << 20


def prepared(settings: PreprocessSettings, work: Sequence[Shard | Stream]) -> Tokenizer:
    """The run's tokenizer; trained first if it is to be, and was not for the shards there are.

    The folder of shards, if there is one, is of the same input and flags.
    """
    path = settings.tokenizer_model
    if settings.train_tokenizer:
        planned = shard_folder.tokenizer_digest(settings.folder)
        if planned is None or not path.is_file() or tokenizer.digest_of(path) != planned:
            tokenizer.train_model(path, texts(settings, work), settings.vocab_size)
    return tokenizer.load_tokenizer(path, settings.eod_token, settings.append_eod)


def texts(settings: PreprocessSettings, work: Sequence[Shard | Stream]) -> Iterator[str]:
    """The pool documents that come first in each file, so many that memory holds them."""
    file, left = None, 0
    for unit in work:
        if unit.file != file:
            file, left = unit.file, TRAINING_BYTES // len(settings.input)
        for shard in reading.shards_of(unit, settings.shard_bytes):
            if left <= 0:
                break
            for item in documents.checked(shard, settings.fields, settings.skip_bad_lines):
                if left > 0 and isinstance(item, Document) and splits.split_of(
                        item.group, settings.shares, settings.seed) == "pool":
                    left -= len(item.text.encode())
                    yield item.text
