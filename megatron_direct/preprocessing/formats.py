"""File formats of the input: recognised by their names, and opened with errors that explain."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import optional

COMPRESSIONS = (".gz", ".zst")
FORMATS = {".jsonl": "jsonl", ".jsonlines": "jsonl", ".json": "jsonl", ".ndjson": "jsonl",
           ".parquet": "parquet"}
_LONGEST_RECORD = 1 << 20  # bytes that are looked at
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # which editors on Windows put before UTF-8 text
# A Zstandard frame may ask for a window of up to 2 GiB (`zstd --long=31`), as archives of web text
# do; the library's own limit is 128 MiB.
ZSTD_MAX_WINDOW = 1 << 31


def compression_of(path: Path) -> str | None:
    """One of COMPRESSIONS, or None. Suffixes count in upper and lower case."""
    suffix = path.suffix.lower()
    return suffix if suffix in COMPRESSIONS else None


def format_of(path: Path) -> str:
    """jsonl, parquet or text."""
    name = Path(path.stem) if compression_of(path) else path
    return FORMATS.get(name.suffix.lower(), "text")


def require_no_record(path: Path) -> None:
    """Raises UserError for what would be read as plain text, for its name, and begins with a JSON
    record: whole paragraphs of them would be documents."""
    with opened(path) as text:
        first = text.readline(_LONGEST_RECORD).removeprefix(BYTE_ORDER_MARK)
    try:
        is_record = isinstance(json.loads(first), dict)
    except ValueError:
        return
    if is_record:
        raise UserError(f"{path} would be read as plain text, for its name, but its first line is "
                        "a JSON record. Give it a name that ends in .jsonl.")


def stem(path: Path) -> str:
    """The file's name without its format: wiki of wiki.jsonl.zst."""
    return Path(path.stem).stem if compression_of(path) else path.stem


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The file's text, decompressed. Raises UserError where it is damaged."""
    damaged: tuple[type[Exception], ...] = (EOFError, gzip.BadGzipFile, zlib.error)
    opener: Callable = contextlib.nullcontext
    if compression_of(path) == ".gz":
        def opener(file):
            return gzip.GzipFile(fileobj=file)
    elif compression_of(path) == ".zst":
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
        self._frame: Any = None
        self._waiting, self._text = b"", memoryview(b"")

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
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # of a column's name
        raise UserError(f"{path} is not a Parquet file, or is damaged ({error}). Copy it again."
                        ) from error
