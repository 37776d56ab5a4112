"""What an artefact of a run was made of: a typed key, written beside it and compared with later.

An artefact (a pilot, sketches, a spectrum, a selection, an annealed arm) is a folder with a
``manifest.json``. Its *key* is a frozen dataclass of all that its content depends on and of nothing
else: neither the layout, nor how many samples are computed at once, nor how a path is spelt (files
are known by their digests). Whoever finds a folder compares keys, and trusts nothing because it is
there. A field that an older version did not know counts as its default, so that what was made
before the field existed stays valid.
"""

from __future__ import annotations

import dataclasses
import enum
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_direct.errors import UserError
from megatron_direct.runtime import digests, files
from megatron_direct.runtime.run_directory import provenance
from megatron_direct.settings import flag_name

_NAME = "manifest.json"


class State(enum.Enum):
    """Of an artefact that was asked for."""

    NEW = "nothing of it is there"
    BEGUN = "it was begun, with this very key, and is not finished"
    FINISHED = "it is there, with this very key"


@dataclass(frozen=True)
class Key:
    """Base of all keys. Fields hold plain values, tuples of them, or groups of settings, whose
    fields count as the key's own."""

    def plain(self) -> dict[str, Any]:
        """Every value by its name, as JSON would have it."""
        values: dict[str, Any] = {}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            inner = vars(value) if dataclasses.is_dataclass(value) else {f.name: value}
            assert not values.keys() & inner.keys(), values.keys() & inner.keys()
            values |= inner
        return files.as_json(values)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """The values that fields, and those of groups, have where nothing was said; fields without
        one are not in it."""
        values: dict[str, Any] = {}
        types = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            group = types[f.name]
            for said in dataclasses.fields(group) if dataclasses.is_dataclass(group) else (f,):
                if said.default is not dataclasses.MISSING:
                    values[said.name] = said.default
        return files.as_json(values)

    def digest(self) -> str:
        """Of the values that are not their defaults, and of the kind of key."""
        defaults = self.defaults()
        said = {name: value for name, value in self.plain().items()
                if name not in defaults or defaults[name] != value}
        return digests.digest(type(self).__name__, digests.canonical(said))

    def differences(self, known: dict[str, Any]) -> list[tuple[str, Any, Any]]:
        """(name, value in ``known``, value here) of every field that differs."""
        plain, defaults = self.plain(), self.defaults()
        return [(name, known.get(name, defaults.get(name)), plain.get(name, defaults.get(name)))
                for name in sorted(known.keys() | plain.keys())
                if known.get(name, defaults.get(name)) != plain.get(name, defaults.get(name))]


class Artefact:
    """A folder with a manifest. Any rank reads, rank 0 writes."""

    def __init__(self, folder: str | Path, what: str, flag: str = "--run-dir"):
        """what: it is called in messages; flag: that gives the folder, or one that it is in."""
        self.folder, self.what, self.flag = Path(folder), what, flag

    def read(self) -> dict | None:
        """{key, finished, provenance, details}, or None if nothing is there."""
        path = self.folder / _NAME
        if not path.is_file():
            return None
        found = files.read_json(path)
        if not isinstance(found, dict) or not isinstance(found.get("key"), dict) or \
                not isinstance(found.get("finished"), bool):
            raise UserError(f"{path} is damaged: it does not say what {self.folder} was made of. "
                            f"Delete {self.folder}, or choose another {self.flag}.")
        return found

    def state(self, key: Key) -> State:
        """Raises UserError if the folder holds one of another key."""
        found = self.read()
        if found is None:
            return State.NEW
        different = key.differences(found["key"])
        if different:
            raise UserError(f"{self.folder} holds {self.what} made with other settings: "
                            f"{_in_words(*different[0])}. Choose another {self.flag}, or delete "
                            f"{self.folder}.")
        return State.FINISHED if found["finished"] else State.BEGUN

    def differs(self, key: Key) -> bool:
        """Whether the folder holds one of another key."""
        found = self.read()
        return found is not None and bool(key.differences(found["key"]))

    def is_finished(self) -> bool:
        found = self.read()
        return found is not None and found["finished"]

    def matches(self, key: Key) -> bool:
        """Whether it is finished, with this very key."""
        return self.is_finished() and not self.differs(key)

    def begin(self, key: Key, details: dict | None = None) -> None:
        """Writes the manifest of an artefact that is not finished."""
        self._write(key, finished=False, details=details)

    def finish(self, key: Key, details: dict | None = None) -> None:
        """details: what is worth knowing of it, and decides nothing."""
        self._write(key, finished=True, details=details)

    def _write(self, key: Key, *, finished: bool, details: dict | None) -> None:
        files.write_json(self.folder / _NAME, {
            "what": self.what, "finished": finished, "key": key.plain(), "digest": key.digest(),
            "provenance": provenance(), "details": details or {}})


def _in_words(name: str, before, now) -> str:
    if name.endswith("_digest"):
        what = name.removesuffix("_digest").replace("_", " ")
        return f"another {what} (digest {before}, now {now})"
    if name.endswith("_digests"):
        what = name.removesuffix("_digests").replace("_", " ")
        return f"other {what}"
    if name.endswith("_version"):
        what = name.removesuffix("_version").replace("_", " ")
        return f"version {before} of the {what}, and megatron-direct has version {now} now"
    name = "seed" if name in ("first_seed", "order_seed") else name  # as the flag is called
    return f"{flag_name(name)} was {before}, now it is {now}"
