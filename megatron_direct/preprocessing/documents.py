"""Documents of a shard: text, and what decides on its domain and its split.

A record is a JSON object or a Parquet row. Keys may be dotted: ``meta.pile_set_name`` is the entry
``pile_set_name`` of the object ``meta``, unless the record has an entry of that whole name.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_direct.errors import UserError
from megatron_direct.preprocessing import formats, reading
from megatron_direct.preprocessing.reading import Shard

_DESCRIPTION = {"jsonl": "a JSON object with the keys", "parquet": "a row with the columns",
                "text": "UTF-8 text"}
_ROWS_AT_A_TIME = 256


class Document(NamedTuple):
    line: int  # of the shard, from 0; the first of a paragraph, the row of a Parquet file
    text: str
    group: str
    domain: str


class BadLine(NamedTuple):
    line: int
    reason: str


@dataclass(frozen=True)
class Fields:
    """The keys of a record's text, group and domain.

    Without a key the group is the text itself, and the domain is the file's stem.
    """

    text: tuple[str, ...] = ("text",)
    group: str | None = None
    domain: str | None = None
    domain_name: str | None = None  # one name for all, in place of the file's

    @property
    def names(self) -> list[str]:
        return [*self.text, *filter(None, (self.group, self.domain))]

    @property
    def flags(self) -> str:
        """The flags that name the keys."""
        return " or ".join(["--json-keys", *["--group-key"] * (self.group is not None),
                            *["--domain-key"] * (self.domain is not None)])


def lookup(record: Mapping, key: str):
    """Raises KeyError or TypeError where there is no such entry."""
    if key in record:
        return record[key]
    value = record
    for part in key.split("."):
        value = value[part]
    return value


def read_documents(shard: Shard, fields: Fields) -> Iterator[Document | BadLine]:
    """The documents of a shard in their order, and the lines that are not documents."""
    kind = formats.format_of(shard.path)
    if kind == "text":
        return _paragraphs(shard, fields)
    return _records(shard, fields, _json_lines(shard) if kind == "jsonl" else
                    _parquet_rows(shard, fields))


def checked(shard: Shard, fields: Fields, skip_bad_lines: bool) -> Iterator[Document | BadLine]:
    """As read_documents, but raises UserError at the first bad line that is not to be skipped."""
    for item in read_documents(shard, fields):
        if isinstance(item, BadLine) and not skip_bad_lines:
            kind = formats.format_of(shard.path)
            keys = "" if kind == "text" else " " + ", ".join(fields.names)
            remedy = "Correct it" if kind == "text" else f"Correct it, or {fields.flags}"
            raise UserError(
                f"{shard.path}:{reading.lines_before(shard) + item.line + 1} is not "
                f"{_DESCRIPTION[kind]}{keys} ({item.reason}). {remedy}, or leave such lines out "
                "with --skip-bad-lines.")
        yield item


def _records(shard: Shard, fields: Fields,
             records: Iterator[tuple[int, Mapping | bytes | Exception]],
             ) -> Iterator[Document | BadLine]:
    """records: (line, record as a mapping, or as the bytes of its JSON, or why there is none)."""
    file_domain = fields.domain_name or formats.stem(shard.path)
    for line, record in records:
        try:
            if isinstance(record, Exception):
                raise record
            if isinstance(record, bytes):
                record = json.loads(record)
            text = "\n".join(lookup(record, key) for key in fields.text)
            text.encode()  # half of a surrogate pair is valid JSON, but not text
            group = text if fields.group is None else _label(record, fields.group)
            domain = file_domain if fields.domain is None else _domain(record, fields.domain)
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
            yield BadLine(line, f"{type(error).__name__}: {error}")
        else:
            yield Document(line, text, group, domain)


def _label(record: Mapping, key: str) -> str:
    """The value of a key that records are gathered by.

    Raises ValueError for one that stands for nothing, in JSON null and in a Parquet column of
    numbers NaN: records that lack a group have nothing in common.
    """
    value = lookup(record, key)
    if value is None or value == "" or value != value:
        raise ValueError(f"{key} is {value!r}, which is not a name")
    text = str(value)
    text.encode()
    return text


def _domain(record: Mapping, key: str) -> str:
    value = lookup(record, key)
    if value is not None and not isinstance(value, str | int):
        raise TypeError(f"{key} is {value!r}, which is not a name")
    return _label(record, key)


def _json_lines(shard: Shard) -> Iterator[tuple[int, bytes]]:
    for number, line in enumerate(io.BytesIO(reading.text_of(shard))):
        _require_bounded(shard, number, len(line))
        line = line.removeprefix(formats.BYTE_ORDER_MARK)
        if line.strip():
            yield number, line


def _parquet_rows(shard: Shard, fields: Fields) -> Iterator[tuple[int, dict | Exception]]:
    with formats.parquet_file(shard.path) as parquet:
        there = parquet.schema_arrow.names
        columns = {key if key in there else key.partition(".")[0] for key in fields.names}
        if not columns <= set(there):
            lacking = ", ".join(sorted(columns - set(there)))
            raise UserError(f"{shard.path} has no column {lacking}, but {', '.join(there)}. "
                            f"Correct {fields.flags}.")
        number = 0
        for batch in parquet.iter_batches(_ROWS_AT_A_TIME, range(shard.start, shard.stop),
                                          sorted(columns)):
            for row in _rows(batch):
                yield number, row
                number += 1


def _rows(batch) -> Iterator[dict | Exception]:
    """The rows of a batch as objects, or the error in the place of one that Python cannot hold: a
    string that is not UTF-8, a time outside its calendar."""
    try:
        yield from batch.to_pylist()
    except (ValueError, OverflowError):
        for place in range(len(batch)):
            try:
                yield from batch.slice(place, 1).to_pylist()
            except (ValueError, OverflowError) as error:
                yield error


def _paragraphs(shard: Shard, fields: Fields) -> Iterator[Document | BadLine]:
    domain = fields.domain_name or formats.stem(shard.path)
    lines: list[bytes] = []
    size, number = 0, -1
    for number, line in enumerate(io.BytesIO(reading.text_of(shard))):
        if not lines:  # also within a file: files with a mark may have been joined
            line, size = line.removeprefix(formats.BYTE_ORDER_MARK), 0
        if line.strip():
            lines.append(line.rstrip(b"\r\n"))
            size += len(line)
            _require_bounded(shard, number, size)
        elif lines:
            yield _paragraph(lines, number, domain)
            lines = []
    if lines:
        yield _paragraph(lines, number + 1, domain)


def _paragraph(lines: Sequence[bytes], end: int, domain: str) -> Document | BadLine:
    first = end - len(lines)
    try:
        text = b"\n".join(lines).decode()
    except UnicodeDecodeError as error:
        return BadLine(first, str(error))
    return Document(first, text, text, domain)


def _require_bounded(shard: Shard, line: int, size: int) -> None:
    if size > reading.LONGEST[formats.format_of(shard.path)]:
        raise reading.too_long(shard.path, reading.lines_before(shard) + line)
