"""Carries out the Dockerfile's own steps without Docker and without a GPU.

    python tools/try_dockerfile.py --folder build/image

A new virtual environment with torch stands for the image. COPY takes what .dockerignore lets
through; RUN runs in a copy of the working folder, with the Dockerfile's arguments; HEALTHCHECK's
command runs at the end. What needs the image itself is not tried: its torch, Apex, Transformer
Engine and CUDA. What would change this machine (useradd) is printed and left out.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
_OF_THE_MACHINE = ("useradd ",)


def instructions(text: str) -> Iterator[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, with continued lines joined and comments left out."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    for line in filter(str.strip, joined.splitlines()):
        name, _, rest = line.partition(" ")
        yield name, rest.strip()


def sent_files(root: Path) -> list[Path]:
    """What .dockerignore lets through, as paths below the root; the last rule that fits counts."""
    rules = [line.strip() for line in (root / ".dockerignore").read_text().splitlines()
             if line.strip() and not line.startswith("#")]
    return [path.relative_to(root) for path in sorted(root.rglob("*"))
            if path.is_file() and _is_sent(path.relative_to(root), rules)]


def _is_sent(path: Path, rules: list[str]) -> bool:
    # A rule for a folder holds for all that is in it.
    names = [str(path), *map(str, list(path.parents)[:-1])]
    sent = True
    for rule in rules:
        pattern = rule.lstrip("!")
        patterns = [pattern, pattern.removeprefix("**/")]
        if any(_fits(name, p, "**" in pattern) for name in names for p in patterns):
            sent = rule.startswith("!")
    return sent


def _fits(name: str, pattern: str, anywhere: bool) -> bool:
    if anywhere:
        return fnmatch.fnmatchcase(Path(name).name, pattern)
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


class Build:
    """A folder that stands for the image's working folder, and its environment."""

    def __init__(self, folder: Path, torch: str):
        self.context, self.work = folder / "context", folder / "work"
        self.bin = folder / "venv" / "bin"
        for path in (self.context, self.work):
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        for sent in sent_files(ROOT):
            target = self.context / sent
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / sent, target)
        self.variables = {name: value for name, value in os.environ.items()
                          if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        self.variables["PATH"] = f"{self.bin}:{self.variables['PATH']}"
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder / "venv")], check=True)
        self.shell(f"pip install --quiet {torch}")

    def step(self, name: str, rest: str) -> None:
        if name == "ARG" and "=" in rest:
            key, _, value = rest.partition("=")
            self.variables.setdefault(key, value)
        elif name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                self._copy(source, target)
        elif name == "RUN":
            if rest.startswith(_OF_THE_MACHINE):
                print(f"left out: RUN {rest}", flush=True)
            else:
                self.shell(rest)
        elif name == "HEALTHCHECK":
            self.shell(subprocess.list2cmdline(json.loads(rest[rest.index("CMD ") + 4:])))

    def shell(self, command: str) -> None:
        print(f"+ {command}", flush=True)
        subprocess.run(["bash", "-e", "-o", "pipefail", "-c", command], cwd=self.work,
                       env=self.variables, check=True)

    def _copy(self, source: str, target: str) -> None:
        found = sorted(self.context.glob(source))
        if not found:
            sys.exit(f"COPY {source}: .dockerignore lets nothing of that name through")
        for path in found:
            if path.is_dir():
                shutil.copytree(path, self.work / target)
            else:
                shutil.copy(path, self.work / target)


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="made anew")
    parser.add_argument("--torch", default="torch==2.13.0", help="stands for the image's")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    build = Build(arguments.folder.resolve(), arguments.torch)
    build.variables |= dict(given.split("=", 1) for given in arguments.build_arg)
    for name, rest in instructions((ROOT / "Dockerfile").read_text()):
        build.step(name, rest)


if __name__ == "__main__":
    main()
