"""Dataclasses as JSON and back, so that what one program writes another reads with its types.

Fields may be plain values, other dataclasses, ``tuple[X, ...]``, ``tuple[X, Y]``, ``list[X]``,
``dict[K, X]`` with strings or whole numbers as keys, ``X | None``, and ``Any``. A field that is not
an argument of the constructor is derived from the others: it is written for readers of the file,
and recomputed when the file is read. Keys that the dataclass does not have are ignored.
"""

from __future__ import annotations

import dataclasses
import os
import types
import typing

from megatron_direct.errors import UserError
from megatron_direct.runtime import files

Record = typing.TypeVar("Record")


def to_json(record) -> dict:
    """The dataclass as plain values: tuples as lists, keys as strings."""
    return files.as_json(dataclasses.asdict(record))


def from_json(kind: type[Record], value, where: str = "") -> Record:
    """A dataclass of this kind, from what :func:`to_json` made of one.

    Raises ValueError that names the place (``where``) if a value has not the type expected there.
    """
    return _decode(kind, value, where or kind.__name__)


def read_record(kind: type[Record], path: str | os.PathLike) -> Record:
    """The dataclass in a JSON file. Raises UserError if the file does not hold one."""
    value = files.read_json(path)
    try:
        return from_json(kind, value)
    except ValueError as error:
        raise UserError(f"{path} cannot be read: {error}. It is damaged, or was written by another "
                        "version of megatron-direct: create it again with this one.") from error


def _decode(kind, value, where: str):
    arguments = typing.get_args(kind)
    if kind is typing.Any:
        return value
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        (inner,) = [argument for argument in arguments if argument is not type(None)]
        return None if value is None else _decode(inner, value, where)
    if typing.get_origin(kind) is tuple:
        return _tuple(arguments, _expect(list, value, where), where)
    if typing.get_origin(kind) is list:
        return list(_tuple((*arguments, ...), _expect(list, value, where), where))
    if typing.get_origin(kind) is dict:
        of_key, of_value = arguments
        return {_key(of_key, key, where): _decode(of_value, item, f"{where}[{key!r}]")
                for key, item in _expect(dict, value, where).items()}
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind, _expect(dict, value, where), where)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return _float(value, where)
    return _expect(kind, value, where)


def _dataclass(kind, value: dict, where: str):
    hints = typing.get_type_hints(kind)
    arguments = {}
    for field in dataclasses.fields(kind):
        if not field.init:
            continue
        if field.name in value:
            arguments[field.name] = _decode(hints[field.name], value[field.name],
                                            f"{where}.{field.name}")
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}.{field.name} is missing")
    return kind(**arguments)


def _tuple(arguments, value: list, where: str) -> tuple:
    kinds = arguments[:1] * len(value) if arguments[1:] == (...,) else arguments
    if len(kinds) != len(value):
        raise ValueError(f"{where}: expected {len(kinds)} values, got {len(value)}")
    return tuple(_decode(kind, item, f"{where}[{i}]")
                 for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _float(value: int, where: str) -> float:
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{where}: expected a number, got one of too many digits") from None


def _key(kind: type, key: str, where: str):
    try:
        return kind(key)
    except ValueError:
        raise ValueError(f"{where}: expected {kind.__name__} as keys, got {key!r}") from None


def _expect(kind: type, value, where: str):
    # To Python True is a number, too; in a file it is not.
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{where}: expected {kind.__name__}, got {value!r:.60}")
    return value
