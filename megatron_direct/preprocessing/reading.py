"""How input files are cut into shards.

A shard is a run of whole lines (JSONL), of whole paragraphs (any other text; a paragraph ends at an
empty line) or of whole row groups (Parquet). The cuts follow from the file and the shard size:

    plain text    a cut lies at every multiple of the size, and moves to the next line or paragraph;
                  so a shard is found without reading what lies before it
    .gz, .zst     the same text cut as it is decompressed; one process reads the file and hands the
                  text on, since a compressed stream cannot be entered in the middle
    .parquet      row groups gathered until they have the size

Which shard a document falls into makes no difference to the output. A line or a paragraph belongs
to the shard in which it begins. A shard in which none begins stops reading where it ends, so that
each byte is looked at by its own shard, and by the one whose document it belongs to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from megatron_direct.errors import UserError
from megatron_direct.preprocessing.formats import (
    compression_of,
    format_of,
    opened,
    parquet_file,
    require_no_record,
)

# Bytes of a document; a worker holds one in memory several times over. A paragraph that is longer
# than any novel is text without empty lines; a line of JSONL says itself where it ends.
LONGEST = {"text": 8 << 20, "jsonl": 128 << 20}


@dataclass(frozen=True)
class Shard:
    """start, stop: bytes of a text file before its cuts are moved to line ends, or row groups.

    block: the text itself, of a compressed file; first_line: the lines before it, known there.
    size: in bytes, as Parquet holds them.
    """

    path: Path
    file: int  # number of the file among the inputs
    number: int  # of the shard within its file
    start: int
    stop: int
    block: bytes | None = None
    first_line: int = 0
    is_last: bool = False  # of a compressed file, whose number of shards shows only at its end
    size: int = 0

    @property
    def name(self) -> str:
        """Sorts as the input does."""
        return shard_name(self.file, self.number)


def shard_name(file: int, number: int) -> str:
    return f"{file:06d}-{number:07d}"


@dataclass(frozen=True)
class Stream:
    """A compressed file, which becomes shards as it is read."""

    path: Path
    file: int
    size: int


def plan(paths: Sequence[Path], shard_bytes: int) -> list[Shard | Stream]:
    """All work, in the order of the input. Raises UserError for what cannot be read."""
    work: list[Shard | Stream] = []
    for file, path in enumerate(paths):
        if not path.is_file():
            raise UserError(f"{path} does not exist. Correct --input.")
        if format_of(path) == "text":
            require_no_record(path)
        if compression_of(path):
            if format_of(path) == "parquet":
                raise UserError(f"{path} is a compressed Parquet file. Decompress it; Parquet "
                                "compresses its columns itself.")
            with opened(path):
                work.append(Stream(path, file, path.stat().st_size))
        elif format_of(path) == "parquet":
            work += _row_group_shards(path, file, shard_bytes)
        else:
            size = path.stat().st_size
            work += [Shard(path, file, number, start, min(start + shard_bytes, size),
                           size=min(shard_bytes, size - start))
                     for number, start in enumerate(range(0, size, shard_bytes))]
    return work


def _row_group_shards(path: Path, file: int, shard_bytes: int) -> Iterator[Shard]:
    with parquet_file(path) as parquet:
        start, size, number, metadata = 0, 0, 0, parquet.metadata
        for group in range(metadata.num_row_groups):
            size += metadata.row_group(group).total_byte_size
            if size >= shard_bytes or group == metadata.num_row_groups - 1:
                yield Shard(path, file, number, start, group + 1, size=size)
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
        block = _next_block(file, stream.path, shard_bytes, first_line)
        while block or number == 0:  # an empty file is one empty shard, so that it has a last one
            next_line = first_line + _count_lines(block)
            following = _next_block(file, stream.path, shard_bytes, next_line)
            yield Shard(stream.path, stream.file, number, 0, 0, block, first_line, not following,
                        len(block))
            block, number, first_line = following, number + 1, next_line


def _next_block(file: BinaryIO, path: Path, shard_bytes: int, first_line: int) -> bytes:
    block = file.read(shard_bytes)
    rest = _rest(file, path, LONGEST[format_of(path)])
    if rest is None:
        raise too_long(path, first_line + block.count(b"\n"))
    return block + rest


def text_of(shard: Shard) -> bytes:
    """The lines of a shard of text. Raises UserError where its last document is too long."""
    if shard.block is not None:
        return shard.block
    with opened(shard.path) as file:
        start = _next_start(file, shard.path, shard.start, shard.stop - shard.start)
        if start is None:
            return b""
        stop = _next_start(file, shard.path, shard.stop, LONGEST[format_of(shard.path)])
        if stop is None:
            raise too_long(shard.path, _newlines_before(file, shard.stop))
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
        start = _next_start(file, shard.path, shard.start, shard.stop - shard.start)
        return _newlines_before(file, shard.stop if start is None else start)


def num_lines(shard: Shard) -> int:
    """Lines, or rows, of the shard."""
    if format_of(shard.path) == "parquet":
        with parquet_file(shard.path) as parquet:
            return sum(parquet.metadata.row_group(g).num_rows
                       for g in range(shard.start, shard.stop))
    return _count_lines(text_of(shard))


def too_long(path: Path, line: int) -> UserError:
    """The error for a document that contains a line (from 0) and is longer than LONGEST."""
    kind = format_of(path)
    limit = f"longer than {LONGEST[kind] >> 20} MiB"
    if kind == "text":
        return UserError(f"{path}:{line + 1} belongs to a document that is {limit}. In a text file "
                         "an empty line ends a document. Put empty lines between the documents, "
                         "or write one per line, as JSONL.")
    return UserError(f"{path}:{line + 1} is a line that is {limit}. In JSONL each line holds one "
                     "document. Write one object per line, or split the document.")


def _count_lines(text: bytes) -> int:
    return text.count(b"\n") + (not text.endswith(b"\n") and len(text) > 0)


def _newlines_before(file: BinaryIO, place: int) -> int:
    file.seek(0)
    lines = 0
    while place:
        block = file.read(min(place, 1 << 22))
        lines, place = lines + block.count(b"\n"), place - len(block)
    return lines


def _next_start(file: BinaryIO, path: Path, place: int, most: int) -> int | None:
    """Where the first line, or paragraph, begins that belongs to a shard from ``place`` on.

    None where that is not decided within ``most`` bytes.
    """
    if place == 0:
        return 0
    file.seek(place - 1)  # the line that ends right before the place is not part of the shard
    rest = _rest(file, path, most + 1)
    return None if rest is None else place - 1 + len(rest)


def _rest(file: BinaryIO, path: Path, most: int) -> bytes | None:
    """What is left of the line that the file stands in, and of text on to the next empty line.

    None where the line goes on, or the empty line does not begin, within ``most`` bytes.
    """
    lines = [file.readline(most)]
    left = most - len(lines[0])
    if format_of(path) != "text":
        return lines[0] if left or lines[0].endswith(b"\n") else None
    while left > 0:
        line = file.readline(left)
        if len(line) == left and not line.strip() and not line.endswith(b"\n"):
            line += file.readline(LONGEST["text"])  # an empty line that begins within, ends beyond
        lines.append(line)
        left -= len(line)
        if not line.strip():
            return b"".join(lines)
    return None
