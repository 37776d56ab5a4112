"""A run directory, and the record in it of what was asked of it and with what it ran.

``run.json`` holds every call that made something: its flags, versions and layout, enough to repeat
it. Nothing is decided by it: each artefact in the directory carries a key of its own
(:mod:`megatron_direct.runtime.manifest`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import platform
from collections.abc import Iterator
from pathlib import Path

from megatron_direct import __version__
from megatron_direct.errors import UserError
from megatron_direct.runtime import attendance, files, lock, parallel, ranks

_RECORD = "run.json"
_FORMAT = 2


class RunDirectory:
    """Reads on any rank; only rank 0 writes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def record(self) -> list[dict]:
        """The calls, in order: command, flags, provenance; [] for a new directory.

        Raises UserError for a directory that is not a run directory, or of another version's.
        """
        path = self.path / _RECORD
        if not path.is_file():
            if self.path.is_dir() and any(map(_is_of_a_user, self.path.iterdir())):
                raise UserError(f"{self.path} is not empty and holds no {_RECORD}: it is not a run "
                                "directory. Choose another --run-dir.")
            return []
        found = files.read_json(path)
        if not isinstance(found, dict):
            raise UserError(f"{path} is damaged: it is not a record of commands. Restore it, or "
                            "choose another --run-dir.")
        if found.get("format") != _FORMAT:
            version = _version_of(found)
            raise UserError(
                f"{self.path} was made by megatron-direct {version}, whose run directories this "
                f"version ({__version__}) cannot continue. Use {version} for it, or choose another "
                "--run-dir.")
        calls = found.get("commands")
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise UserError(f"{path} is damaged: it holds no list of commands. Restore it, or "
                            "choose another --run-dir.")
        return calls

    @contextlib.contextmanager
    def entered(self, command: str, request=None, *, waits: bool = False) -> Iterator[None]:
        """The directory locked, for a command that writes into it; all ranks call this.

        request: a dataclass of groups of settings, which is added to the record; None for a
        command that makes nothing which others build on. Raises UserError where another command
        is at work in the directory, unless this one waits for it.
        """
        attendance.at(command)
        with locked(self.path, command, waits=waits):
            parallel.on_rank_zero(lambda: self._enter(command, request))
            yield

    def _enter(self, command: str, request) -> None:
        calls = self.record()
        files.remove_partial(self.path)
        if request is None:
            return
        call = {"command": command, "flags": _flags(request), "provenance": provenance()}
        if not calls or calls[-1] != call:
            files.write_json(self.path / _RECORD, {"format": _FORMAT, "commands": [*calls, call]})

    def require(self) -> None:
        """Raises UserError for a directory in which nothing was done."""
        if not self.record():
            raise UserError(f"{self.path} holds no run. Run `megatron-direct select --run-dir "
                            f"{self.path}` first, or correct --run-dir.")


@contextlib.contextmanager
def locked(folder: Path, command: str, *, waits: bool = False) -> Iterator[None]:
    """A folder locked, of a run directory or this itself; all ranks call this.

    Raises UserError where another command is at work in it, unless this one waits for it.
    """
    own = lock.Lock(folder / lock.NAME, folder, f"megatron-direct {command}", waits=waits)
    with parallel.while_rank_zero_holds(own):
        yield


def _is_of_a_user(path: Path) -> bool:
    """False of what a run that was killed before it wrote its record leaves behind."""
    return path.name != lock.NAME and not files.is_partial(path)


def provenance() -> dict:
    """By what an artefact was made."""
    return {"versions": versions(), "ranks": ranks.discover().world_size}


def versions() -> dict[str, str]:
    """Of this package and of those its results depend on; "unknown" for what runs from a path."""
    packages = ("torch", "megatron-core", "numpy", "sentencepiece")
    return {"megatron-direct": __version__, "python": platform.python_version(),
            **{package: _version(package) for package in packages}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _version_of(record: dict) -> str:
    """The version that wrote the record of an older, or newer, run directory."""
    try:
        stages = list(record.get("stages", {}).values()) or [
            call["provenance"] for call in record.get("commands", [])]
        return stages[0]["versions"]["megatron-direct"]
    except (AttributeError, KeyError, TypeError, IndexError):
        return "another version"


def _flags(request) -> dict:
    """By group, every setting; of what a checkpoint supplies, what was given."""
    return files.as_json({name: dataclasses.asdict(group) for name, group in vars(request).items()})
