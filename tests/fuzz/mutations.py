"""Damage to files, as disks, copies and hands do it: one to four changes of a sound file."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Sequence

# What is at the edge of a range somewhere, as it stands in binary headers and in text.
_NUMBERS = (0, 1, 2, 7, 8, 255, 256, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40,
            2**63 - 1, 2**63, 2**64 - 1)
_TEXTS = (b"", b"0", b"-1", b"1e400", b"NaN", b"Infinity", b"null", b"true", b"[]", b"{}", b'""',
          b'"x"', b"9" * 30, b"9" * 5000, b"\\ud83d", b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n",
          b"\r\n", b"[" * 2000, b'{"a":' * 2000, b"|O", b"<U9", b"(", b"'descr'", b"\xed\xa0\x80")


def mutated(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """others: sound files of the kind, which pieces are taken from."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(_CHANGES)(data, others, rng)
    return data


def _place(data: bytes, rng: random.Random) -> int:
    """More often near the beginning, where headers are."""
    return rng.randrange(min(len(data), 80) + 1 if rng.random() < 0.3 else len(data) + 1)


def _flip(data, others, rng) -> bytes:
    changed = bytearray(data)
    if changed:
        changed[min(_place(data, rng), len(data) - 1)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(data, others, rng) -> bytes:
    return data[: _place(data, rng)]


def _lose(data, others, rng) -> bytes:
    start = _place(data, rng)
    return data[:start] + data[start + rng.choice((1, 2, 4, 8, 64, 512)):]


def _zero(data, others, rng) -> bytes:
    """As a disk does that loses a block."""
    start = _place(data, rng)
    length = min(rng.choice((1, 4, 8, 64, 512, len(data))), len(data) - start)
    return data[:start] + bytes(length) + data[start + length:]


def _number(data, others, rng) -> bytes:
    """A number of a header, at its boundary or anywhere."""
    kind = rng.choice("BHIQ")
    value = rng.choice(_NUMBERS) % (1 << 8 * struct.calcsize(kind))
    start = _place(data, rng)
    if rng.random() < 0.5:
        start -= start % struct.calcsize(kind)
    return data[:start] + struct.pack("<" + kind, value) + data[start + struct.calcsize(kind):]


def _text(data, others, rng) -> bytes:
    start = _place(data, rng)
    return data[:start] + rng.choice(_TEXTS) + data[start + rng.choice((0, 0, 1, 4)):]


def _value(data, others, rng) -> bytes:
    """A word or a number of a text, replaced by another value."""
    places = [i for i, byte in enumerate(data) if byte in b':,[ "\n']
    if not places:
        return _text(data, others, rng)
    start = rng.choice(places) + 1
    end = start
    while end < len(data) and data[end] not in b",]}\n":
        end += 1
    return data[:start] + rng.choice(_TEXTS) + data[end:]


def _repeat(data, others, rng) -> bytes:
    start = _place(data, rng)
    piece = data[start: start + rng.choice((1, 8, 64, 512))]
    return data[:start] + piece * rng.choice((1, 2, 20)) + data[start:]


def _splice(data, others, rng) -> bytes:
    other = rng.choice(others)
    return data[: _place(data, rng)] + other[_place(other, rng):]


def _noise(data, others, rng) -> bytes:
    start = _place(data, rng)
    return data[:start] + rng.randbytes(rng.choice((1, 3, 16, 200))) + data[start:]


_CHANGES: tuple[Callable, ...] = (_flip, _flip, _cut, _lose, _zero, _number, _number, _text, _value,
                                  _repeat, _splice, _noise)
