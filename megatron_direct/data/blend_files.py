"""Blends as users write them: on the command line, in a file, or in a file by split."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_direct.data.blend_plan import Blend
from megatron_direct.errors import UserError

_SPLITS = ("train", "valid", "test")


def parse_data_path(data_path: Sequence[str]) -> Blend:
    """``--data-path`` as Megatron takes it: prefixes, or alternating weights and prefixes."""
    values = list(data_path)
    if len(values) % 2 == 0 and all(_is_number(value) for value in values[::2]):
        return Blend(values[1::2], [float(value) for value in values[::2]])
    return Blend(values)


def read_data_args(path: str) -> Blend:
    """``--data-args-path``: a file with what ``--data-path`` would say."""
    values = _read(path).split()
    if not values:
        raise UserError(f"{path} names no dataset. Correct the file.")
    return parse_data_path(values)


def read_per_split_data_args(path: str) -> dict[str, Blend | None]:
    """``--per-split-data-args-path``: JSON with a ``--data-path`` for train, valid and test."""
    text = _read(path)
    try:
        found = json.loads(text)
        return {split: _blend_of(found[split]) for split in _SPLITS}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a JSON object with the keys train, valid and test, each "
                        f"with a blend ({type(error).__name__}: {error}). Correct the file."
                        ) from error


def _blend_of(value) -> Blend | None:
    if value in (None, "", []):
        return None
    values = value.split() if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(text, str) for text in values):
        raise TypeError(f"{value!r:.60} is neither a text nor a list of texts")
    return parse_data_path(values)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}). Correct the path.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Correct the file.") from error


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
