"""Flags made from groups of settings, and settings made from flags.

Flags carry no defaults of their own (``argparse.SUPPRESS``), so that a value that was given can be
told from one that was not; the dataclass fills in its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterator, Sequence
from dataclasses import fields

from megatron_direct.config import BatchConfig, Given, ModelConfig, OptimizerConfig, Precision
from megatron_direct.settings import Settings, check_given, fields_in_order, flag_name, flag_type

# The groups whose flags may be given where the rest comes from a checkpoint.
_OF_CHECKPOINT = {"model": ModelConfig, "optimizer": OptimizerConfig, "batch": BatchConfig,
                  "precision": Precision}


def add_flags(parser: argparse.ArgumentParser, request: type) -> None:
    """The flags of a request: a dataclass with a field for each group of settings.

    One argument group for each, titled by the first line of its docstring. A flag that two groups
    share (--seed) is one flag, and fills both. The defaults of what a checkpoint supplies are the
    checkpoint's.
    """
    known: set[str] = set()
    own = [kind for kind in typing.get_type_hints(request).values() if kind is not Given]
    for group_type in groups(request):
        title = str(group_type.__doc__).splitlines()[0].rstrip(".")
        is_own = group_type in own
        if not is_own:
            title = f"{title.partition('.')[0]} (default: as the checkpoint was trained)"
        group = parser.add_argument_group(title)
        for f in fields(group_type):
            if f.name not in known:
                _add_flag(group, f, shows_default=is_own)
                known.add(f.name)


def request_from(request: type, arguments: argparse.Namespace):
    """The request with the values that were given on the command line.

    Raises UserError for a value that is out of its range.
    """
    values = {}
    for name, kind in typing.get_type_hints(request).items():
        if kind is Given:
            wanted = _given_groups(request)
            given = {key: _given(group, arguments)
                     for key, group in _OF_CHECKPOINT.items() if key in wanted}
            for key, of_group in given.items():
                check_given(_OF_CHECKPOINT[key], of_group)
            values[name] = Given(**given)
        else:
            values[name] = kind(**_given(kind, arguments))
    return request(**values)


def groups(request: type) -> Iterator[type[Settings]]:
    """The groups of settings that a request is made of."""
    kinds = typing.get_type_hints(request)
    for kind in (kinds[f.name] for f in fields_in_order(request)):
        if kind is Given:
            yield from (_OF_CHECKPOINT[key] for key in _given_groups(request))
        else:
            yield kind


def _given_groups(request: type) -> Sequence[str]:
    """What of a checkpoint's settings the command lets a user give again."""
    given = next(f for f in fields(request) if f.name == "given")
    return given.metadata.get("groups", tuple(_OF_CHECKPOINT))


def _given(group: type[Settings], arguments: argparse.Namespace) -> dict:
    return {f.name: as_declared(getattr(arguments, f.name)) for f in fields(group)
            if hasattr(arguments, f.name)}


def as_declared(value):
    """argparse has lists where settings have tuples."""
    return tuple(value) if isinstance(value, list) else value


def _add_flag(group, f: dataclasses.Field, *, shows_default: bool) -> None:
    meta = f.metadata
    common = {"dest": f.name, "default": argparse.SUPPRESS}
    help_text = meta["help"]
    if shows_default and f.default not in (None, dataclasses.MISSING, (), ""):
        help_text += f" (default {_shown(f.default)})"
    help_text = help_text.replace("%", "%%")
    if isinstance(f.default, bool):
        group.add_argument(flag_name(f.name), action=argparse.BooleanOptionalAction,
                           help=help_text, **common)
        return
    group.add_argument(flag_name(f.name), type=flag_type(f), choices=meta["choices"],
                       nargs=meta["nargs"], required=meta["required"], help=help_text, **common)


def _shown(default: object) -> object:
    """A switch is on or off."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return default
