"""Constraints for pip in an image that brings packages of its own.

    python tools/image_constraints.py constraints-core-0.19.txt > constraints.txt

What is installed stays as it is; what is not has the version of the file. megatron-core is left
out: the command that installs it names the version.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from collections.abc import Iterable
from pathlib import Path


def merged(installed: dict[str, str], pinned: Iterable[str]) -> list[str]:
    """installed: versions by name. pinned: lines of a constraints file."""
    kept = {_normalised(name): f"{name}=={version}" for name, version in installed.items()}
    for line in pinned:
        name = re.match(r"[\w.-]+", line)
        if name:
            kept.setdefault(_normalised(name[0]), line.strip())
    kept.pop("megatron-core", None)
    return [kept[name] for name in sorted(kept)]


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    found = {distribution.metadata["Name"]: distribution.version
             for distribution in importlib.metadata.distributions()
             if distribution.metadata["Name"]}
    print("\n".join(merged(found, Path(sys.argv[1]).read_text().splitlines())))
