"""The benchmark for GPUs, tiny on a CPU."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_results  # noqa: E402


def test_every_part_runs_and_is_reported(tmp_path):
    output, page = tmp_path / "gpu.json", tmp_path / "results.md"
    page.write_text("# Results\n")
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--output", str(output),
         "--results", str(page)],
        capture_output=True, text=True, timeout=240, check=True)
    parts = json.loads(output.read_text())["shapes"]["tiny"]["parts"]
    assert not [part["error"] for part in parts if part["error"]], done.stderr[-2000:]
    assert all(part["milliseconds"] > 0 for part in parts)
    assert {"yardstick, compiled", "training pass", "pass without weight gradients",
            "sketch", "the plain way: a pass a sample"} <= {part["part"] for part in parts}
    assert all(part["part"] in done.stdout for part in parts)
    text = page.read_text()
    assert text.startswith("# Results\n\n<!-- make bench-gpu: CPU -->\n### CPU, ")
    assert text.endswith("<!-- end of make bench-gpu: CPU -->\n")
    for version in (f"torch {torch.__version__}", f"Python {platform.python_version()}",
                    f"megatron-core {importlib.metadata.version('megatron-core')}", "commit "):
        assert version in text
    assert all(f"| {part['part'].strip()} | {part['milliseconds']:.1f} |" in text
               for part in parts)


def test_a_block_takes_the_place_of_the_same_devices(tmp_path):
    part = {"part": "sketch", "milliseconds": 3.0, "gigabytes": 1.5, "error": None}
    failed = {"part": "yardstick, compiled", "milliseconds": None, "gigabytes": None,
              "error": "no time was left"}
    page = tmp_path / "results.md"
    page.write_text("# Results\nby hand\n")
    for device, milliseconds in (("A", 3.0), ("B", 4.0), ("A", 5.0)):
        shape = {"layers": 2, "at_once": 4, "tokens": 8}
        results = {"environment": {"device": device, "torch": "2"}, "shapes": {"tiny": {
            "shape": shape, "parts": [failed, part | {"milliseconds": milliseconds}]}}}
        gpu_results.put_into(page, gpu_results.block(results, "2026-01-01"))
    text = page.read_text()
    assert text.startswith("# Results\nby hand\n\n<!-- make bench-gpu: A -->")
    assert text.count("<!-- make bench-gpu: A -->") == text.count("### B, 2026-01-01") == 1
    assert "| sketch | 5.0 | - | 1.5 |" in text and "| sketch | 3.0 |" not in text
    assert "| yardstick, compiled | not measured: no time was left | | |" in text
