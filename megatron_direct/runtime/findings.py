"""What a look at an installation found: there, absent or broken, and what to do about it."""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass


class State(enum.Enum):
    GOOD = "ok"
    ABSENT = "--"
    BROKEN = "!!"


@dataclass(frozen=True)
class Finding:
    """remedy: of what is broken; for what is absent, when it is needed and how to get it."""

    what: str
    state: State
    text: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"  {self.state.value}  {self.what + ':':<20} {self.text}"


def look(what: str, check: Callable[[], Finding]) -> Finding:
    """The finding of a check; whatever it raises is a finding as well."""
    try:
        return check()
    except Exception as error:
        text = f"{type(error).__name__}: {error}".strip()
        return Finding(what, State.BROKEN, text.splitlines()[0],
                       f"repair {what}, or install it again.")
