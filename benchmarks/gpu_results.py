"""Results of ``gpu.py`` as a block of benchmarks/RESULTS.md: machine, versions, commit and tables.

A block stands between two markers that name the device, and takes the place of an earlier one of
the same device; the first of a device is put at the end of the file.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
_PACKAGES = ("torch", "megatron-core", "triton", "transformer-engine")


def environment() -> dict[str, str]:
    """{what: name or version}: device, driver, Python, packages and git commit, those there are."""
    on_gpu = torch.cuda.is_available()
    found = {"device": torch.cuda.get_device_name() if on_gpu else "CPU",
             "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
             if on_gpu else "", "Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = ""
    found["torch"] = torch.__version__  # with its build
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    commit = _output("git", "rev-parse", "--short", "HEAD")
    found["commit"] = f"{commit} with changes" if commit and changed else commit
    return {what: value for what, value in found.items() if value}


def _output(*command: str) -> str:
    """First line that a command prints; nothing where it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return next(iter(done.stdout.splitlines()), "").strip()


def block(results: Mapping[str, Any], date: str) -> str:
    """Markdown of what gpu.py wrote as JSON."""
    about = dict(results["environment"])
    begin, end = _markers(about["device"])
    device = about.pop("device")
    lines = [begin, f"### {device}, {date}", "",
             ", ".join(f"{what} {value}" for what, value in about.items()) + "."]
    for name, of_shape in results["shapes"].items():
        shape = of_shape["shape"]
        lines += ["", f"{name}: {shape['layers']} layers, {shape['at_once']} samples of "
                  f"{shape['tokens']} tokens, milliseconds of a micro-batch", "",
                  "| pass | ms | / compiled | GiB |", "|---|---|---|---|",
                  *_rows(of_shape["parts"])]
    return "\n".join([*lines, end, ""])


def _rows(parts: Sequence[Mapping[str, Any]]) -> list[str]:
    compiled = next((part["milliseconds"] for part in parts
                     if part["part"] == "yardstick, compiled"), None)
    rows = []
    for part in parts:
        if part["error"]:
            rows.append(f"| {part['part'].strip()} | not measured: {part['error']} | | |")
            continue
        ratio = f"{part['milliseconds'] / compiled:.2f}" if compiled else "-"
        memory = "-" if part["gigabytes"] is None else f"{part['gigabytes']:.1f}"
        rows.append(f"| {part['part'].strip()} | {part['milliseconds']:.1f} | {ratio} | {memory} |")
    return rows


def _markers(device: str) -> tuple[str, str]:
    return f"<!-- make bench-gpu: {device} -->", f"<!-- end of make bench-gpu: {device} -->"


def put_into(path: Path, text: str) -> None:
    """Replaces the block of the same device in a file, or appends the block."""
    begin, end = text.splitlines()[0], text.splitlines()[-1]
    before = path.read_text() if path.is_file() else ""
    earlier = re.compile(f"{re.escape(begin)}\n.*?{re.escape(end)}\n", re.DOTALL)
    if earlier.search(before):
        path.write_text(earlier.sub(lambda _: text, before))
    else:
        path.write_text(f"{before.rstrip()}\n\n{text}".lstrip("\n"))
