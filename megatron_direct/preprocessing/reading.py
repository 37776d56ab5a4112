"""Input files, and how they are cut into shards.

A shard is a run of whole lines (JSONL), of whole paragraphs (any other text; a paragraph ends at an
empty line) or of whole row groups (Parquet). The cuts follow from the file and the shard size:

    plain text    the first line, or paragraph, that begins at or behind a multiple of the size; so
                  a shard is found without reading what lies before it
    .gz, .zst     the same text cut as it is decompressed; one process reads the file and hands the
                  text on, since a compressed stream cannot be entered in the middle
    .parquet      row groups gathered until they have the size

Which shard a document falls into makes no difference to the output.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import optional

COMPRESSIONS = (".gz", ".zst")
FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
# A Zstandard frame may ask for a window of up to 2 GiB (`zstd --long=31`), as archives of web text
# do; the library's own limit is 128 MiB.
ZSTD_MAX_WINDOW = 1 << 31


@dataclass(frozen=True)
class Shard:
    """start, stop: bytes of a text file before its cuts are moved to line ends, or row groups.

    block: the text itself, of a compressed file; first_line: the lines before it, known there.
    """

    path: Path
    file: int  # number of the file among the inputs
    number: int  # of the shard within its file
    start: int
    stop: int
    block: bytes | None = None
    first_line: int = 0
    is_last: bool = False  # of a compressed file, whose number of shards shows only at its end

    @property
    def name(self) -> str:
        """Sorts as the input does."""
        return shard_name(self.file, self.number)

    @property
    def size(self) -> int:
        return self.stop - self.start if self.block is None else len(self.block)


def shard_name(file: int, number: int) -> str:
    return f"{file:06d}-{number:07d}"


@dataclass(frozen=True)
class Stream:
    """A compressed file, which becomes shards as it is read."""

    path: Path
    file: int
    size: int


def format_of(path: Path) -> str:
    """jsonl, parquet or text."""
    name = Path(path.stem) if path.suffix in COMPRESSIONS else path
    return FORMATS.get(name.suffix, "text")


def stem(path: Path) -> str:
    """The file's name without what tells its format: wiki of wiki.jsonl.zst."""
    return Path(path.stem).stem if path.suffix in COMPRESSIONS else path.stem


def plan(paths: Sequence[Path], shard_bytes: int) -> list[Shard | Stream]:
    """All work, in the order of the input. Raises UserError for what cannot be read."""
    work: list[Shard | Stream] = []
    for file, path in enumerate(paths):
        if not path.is_file():
            raise UserError(f"{path} does not exist. Correct --input.")
        if path.suffix in COMPRESSIONS:
            if format_of(path) == "parquet":
                raise UserError(f"{path} is a compressed Parquet file. Decompress it; Parquet "
                                "compresses its columns by itself.")
            with opened(path):
                work.append(Stream(path, file, path.stat().st_size))
        elif format_of(path) == "parquet":
            work += _row_group_shards(path, file, shard_bytes)
        else:
            size = path.stat().st_size
            work += [Shard(path, file, number, start, min(start + shard_bytes, size))
                     for number, start in enumerate(range(0, size, shard_bytes))]
    return work


def _row_group_shards(path: Path, file: int, shard_bytes: int) -> Iterator[Shard]:
    with parquet_file(path) as parquet:
        start, size, number, metadata = 0, 0, 0, parquet.metadata
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= shard_bytes or group == metadata.num_row_groups - 1:
                yield Shard(path, file, number, start, group + 1)
                start, size, number = group + 1, 0, number + 1


def shards_of(unit: Shard | Stream, shard_bytes: int) -> Iterator[Shard]:
    """A shard itself; those of a compressed file, two of them in memory at a time."""
    if isinstance(unit, Shard):
        yield unit
    else:
        yield from _decompressed(unit, shard_bytes)


def _decompressed(stream: Stream, shard_bytes: int) -> Iterator[Shard]:
    number, first_line = 0, 0
    with opened(stream.path) as file:
        block = _next_block(file, stream.path, shard_bytes)
        while block or number == 0:  # an empty file is one empty shard, so that it has a last one
            following = _next_block(file, stream.path, shard_bytes)
            yield Shard(stream.path, stream.file, number, 0, 0, block, first_line, not following)
            first_line += _count_lines(block)
            block, number = following, number + 1


def _next_block(file: BinaryIO, path: Path, shard_bytes: int) -> bytes:
    return file.read(shard_bytes) + _rest(file, format_of(path) == "text")


def text_of(shard: Shard) -> bytes:
    """The lines of a shard of text."""
    if shard.block is not None:
        return shard.block
    with opened(shard.path) as file:
        start, stop = (_cut(file, shard.path, place) for place in (shard.start, shard.stop))
        file.seek(start)
        return file.read(stop - start)


def lines_before(shard: Shard) -> int:
    """Lines, or rows, of the file before the shard; reads the text up to it."""
    if format_of(shard.path) == "parquet":
        with parquet_file(shard.path) as parquet:
            return sum(parquet.metadata.row_group(g).num_rows for g in range(shard.start))
    if shard.block is not None:
        return shard.first_line
    with opened(shard.path) as file:
        left, lines = _cut(file, shard.path, shard.start), 0
        file.seek(0)
        while left:
            block = file.read(min(left, 1 << 22))
            lines, left = lines + block.count(b"\n"), left - len(block)
    return lines


def num_lines(shard: Shard) -> int:
    """Lines, or rows, of the shard."""
    if format_of(shard.path) == "parquet":
        with parquet_file(shard.path) as parquet:
            return sum(parquet.metadata.row_group(g).num_rows
                       for g in range(shard.start, shard.stop))
    return _count_lines(text_of(shard))


def _count_lines(text: bytes) -> int:
    return text.count(b"\n") + (not text.endswith(b"\n") and len(text) > 0)


def _cut(file: BinaryIO, path: Path, place: int) -> int:
    """The first line start, or paragraph start, at or behind a place."""
    if place == 0:
        return 0
    file.seek(place - 1)  # the line that ends right before the place is no part of the shard
    return place - 1 + len(_rest(file, format_of(path) == "text"))


def _rest(file: BinaryIO, is_text: bool) -> bytes:
    """What is left of the line that the file stands in, and of text on to the next empty line."""
    lines = [file.readline()]
    if is_text:
        for line in iter(file.readline, b""):
            lines.append(line)
            if not line.strip():
                break
    return b"".join(lines)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's text, decompressed. Raises UserError where it is damaged."""
    damaged: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    opener: Callable[[BinaryIO], BinaryIO] = contextlib.nullcontext
    if path.suffix == ".gz":
        def opener(file):
            return gzip.GzipFile(fileobj=file)
    elif path.suffix == ".zst":
        zstandard = optional.require("zstandard", f"{path}, compressed with Zstandard,", "data")
        damaged += (zstandard.ZstdError,)

        def opener(file):
            decompressor = zstandard.ZstdDecompressor(max_window_size=ZSTD_MAX_WINDOW)
            return io.BufferedReader(_ZstdFrames(file, decompressor), buffer_size=1 << 20)
    try:
        with open(path, "rb") as file, opener(file) as text:
            yield text
    except damaged as error:
        raise UserError(f"{path} is truncated or damaged ({type(error).__name__}: {error}). "
                        "Copy it again.") from error


class _ZstdFrames(io.RawIOBase):
    """The text of all frames. The package's own reader takes a truncated file for a whole one."""

    def __init__(self, file: BinaryIO, decompressor):
        self._file, self._decompressor = file, decompressor
        self._frame, self._waiting, self._text = None, b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._text:
            self._waiting = self._waiting or self._file.read(1 << 16)
            if not self._waiting:
                if self._frame is not None:
                    raise EOFError("it ends within a frame")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._text = memoryview(self._frame.decompress(self._waiting))
            self._waiting = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._text))
        buffer[:count], self._text = self._text[:count], self._text[count:]
        return count


@contextlib.contextmanager
def parquet_file(path: Path):
    """A pyarrow ParquetFile. Raises UserError where it is damaged."""
    parquet = optional.require("pyarrow.parquet", f"{path}, a Parquet file,", "data")
    pyarrow = optional.require("pyarrow", f"{path}, a Parquet file,", "data")
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{path} is no Parquet file, or damaged ({error}). Copy it again."
                        ) from error
