"""A run directory, and the record in it of what each stage was asked and with what it ran.

``run.json`` holds, for every stage, its *identity* (each flag and digest that its result depends
on; the layout of ranks is not one of them), whether it is finished, and the versions and layout it
ran with. A stage that finds its own identity there carries on or has nothing to do; one that finds
another is refused, since the directory belongs to another run.
"""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

from megatron_direct import __version__
from megatron_direct.config import flag_name
from megatron_direct.errors import UserError
from megatron_direct.runtime import files

_RECORD = "run.json"


class RunDirectory:
    """Reads on any rank; only rank 0 writes."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def record(self) -> dict:
        """stage -> what was written of it; {} for a new directory."""
        path = self.path / _RECORD
        return files.read_json(path)["stages"] if path.is_file() else {}

    def stage(self, name: str) -> dict:
        """The record of a finished stage. Raises UserError if there is none."""
        found = self.record().get(name)
        if found is None or not found["finished"]:
            raise UserError(f"{self.path} holds no finished {name}. Run `megatron-direct {name} "
                            f"--run-dir {self.path}` first, or correct --run-dir.")
        return found

    def begin(self, name: str, identity: dict, layout: dict) -> bool:
        """Enters a stage into the record; True if it is there already, and finished.

        Raises UserError, before anything is touched, if the directory is another run's.
        """
        identity = files.as_json(identity)
        stages = self.record()
        if not stages and self.path.is_dir() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no {_RECORD}: it is no run "
                            "directory. Choose another --run-dir.")
        known = stages.get(name)
        if known is not None:
            self._require_same(name, known["identity"], identity)
            if known["finished"]:
                return True
        stages[name] = {"identity": identity, "layout": layout, "versions": versions(),
                        "finished": False}
        self._write(stages)
        return False

    def finish(self, name: str) -> None:
        stages = self.record()
        stages[name]["finished"] = True
        self._write(stages)

    def _write(self, stages: dict) -> None:
        files.write_json(self.path / _RECORD, {"stages": stages})

    def _require_same(self, name: str, known: dict, identity: dict) -> None:
        for key in sorted(known.keys() | identity.keys()):
            before, now = known.get(key), identity.get(key)
            if before != now:
                raise UserError(
                    f"{self.path} belongs to another run: its {name} had {flag_name(key)} "
                    f"{before}, this one has {now}. Choose another --run-dir, or delete that one.")


def versions() -> dict[str, str]:
    packages = ("torch", "megatron-core", "numpy", "sentencepiece")
    return {"megatron-direct": __version__, "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in packages}}
