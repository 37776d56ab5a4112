"""What a user sets: frozen dataclasses of plain values that check themselves.

A field is a flag: ``num_layers`` is ``--num-layers``, named as Megatron-LM names it where
Megatron-LM has it. What a value may be (choices, ranges) stands beside the field and is enforced
when the dataclass is made, so that the command line and Python get the same errors.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from megatron_direct.errors import UserError


def flag(default, help: str, *, choices=None, nargs=None, type=None, required=False, **bounds):
    """A field of a :class:`Settings`, with what the command line and the checks need to know.

    type: of a value that is not None, where the default is None. bounds: ``at_least``, ``above``,
    ``at_most`` and ``below``; a number has to be finite unless ``at_most=math.inf`` is given.
    """
    unknown = bounds.keys() - _BOUNDS.keys()
    assert not unknown, unknown
    metadata = {"help": help, "choices": choices, "nargs": nargs, "type": type,
                "required": required, "bounds": bounds}
    return field(default=default, metadata=metadata)


_BOUNDS = {"at_least": ("at least", lambda value, bound: value >= bound),
           "above": ("above", lambda value, bound: value > bound),
           "at_most": ("at most", lambda value, bound: value <= bound),
           "below": ("below", lambda value, bound: value < bound)}


def fields_in_order(request: type) -> list[dataclasses.Field]:
    """The groups of a request as its constructor takes them: first those of one command, then those
    that several share."""
    return sorted(fields(request), key=lambda f: bool(f.kw_only))


def flag_name(field_name: str) -> str:
    return "--" + field_name.replace("_", "-")


def flag_type(f: dataclasses.Field) -> type:
    """The type of a field's value, or of each entry of a tuple."""
    kind = f.metadata["type"] or (type(f.default) if f.default is not None else str)
    return str if kind is tuple else kind


@dataclass(frozen=True)
class Settings:
    """Base of all groups of flags. Raises UserError, naming the flag, for a value it cannot be."""

    def __post_init__(self):
        for f in fields(self):
            if f.metadata:
                _check(f, getattr(self, f.name))
        self.check()

    def check(self) -> None:
        """What fields have to be to one another."""


def check_given(group: type[Settings], given: Mapping[str, object]) -> None:
    """Raises UserError for a value that its field cannot have, where others are not known yet."""
    for f in fields(group):
        if f.name in given:
            _check(f, given[f.name])


def _check(f: dataclasses.Field, value) -> None:
    name, meta = flag_name(f.name), f.metadata
    if meta["required"] and (value is None or value == () or value == ""):
        raise UserError(f"{name} is missing. Give it.")
    if meta["nargs"]:
        if isinstance(value, str) or not isinstance(value, tuple | list):
            raise UserError(f"{name} is {value!r}: expected a list of values.")
        for entry in value:
            _check_value(name, f, entry)
    elif value is not None or f.default is not None:
        _check_value(name, f, value)


def _check_value(name: str, f: dataclasses.Field, value) -> None:
    kind, choices = flag_type(f), f.metadata["choices"]
    if choices is not None and value not in choices:
        raise UserError(f"{name} is {value!r}: expected {' or '.join(map(str, choices))}.")
    if kind is str and value == "" and (f.default != "" or f.metadata["nargs"]):
        raise UserError(f"{name} is empty. Give a value, or leave the flag out.")
    if kind is bool:
        if not isinstance(value, bool):
            raise UserError(f"{name} is {value!r}: expected true or false.")
        return
    if kind not in (int, float):
        return
    wanted = numbers.Integral if kind is int else numbers.Real
    if isinstance(value, bool) or not isinstance(value, wanted):
        expected = "an integer" if kind is int else "a number"
        raise UserError(f"{name} is {value!r}: expected {expected}.")
    bounds = f.metadata["bounds"]
    is_sound = not math.isnan(value) and (math.isfinite(value) or "at_most" in bounds)
    if not is_sound or not all(_BOUNDS[key][1](value, bound) for key, bound in bounds.items()):
        expected = " and ".join(f"{_BOUNDS[key][0]} {bound:g}" for key, bound in bounds.items()
                                if bound != math.inf) or "a finite number"
        raise UserError(f"{name} is {value}: it must be {expected}.")


def require_defaults(config, switch: str, names: tuple[str, ...]) -> None:
    """For what has no meaning without the switch."""
    for name in names:
        default = config.__dataclass_fields__[name].default
        # As text too: Megatron-LM's checkpoints carry --moe-layer-freq as a number.
        if getattr(config, name) != default and str(getattr(config, name)) != str(default):
            raise UserError(f"{flag_name(name)} {getattr(config, name)} has no effect without "
                            f"{flag_name(switch)}. Add that flag, or leave this one out.")


def require_divides(config, divisor: str, name: str) -> None:
    small, large = getattr(config, divisor), getattr(config, name)
    if small < 1 or large % small:
        raise UserError(
            f"{flag_name(divisor)} {small} does not divide {flag_name(name)} {large}. "
            "Change either.")
