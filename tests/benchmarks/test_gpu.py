"""The benchmark for GPUs, tiny on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_part_runs_and_is_reported(tmp_path):
    output = tmp_path / "gpu.json"
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--tiny", "--output", str(output)],
        capture_output=True, text=True, timeout=240, check=True)
    parts = json.loads(output.read_text())["shapes"]["tiny"]["parts"]
    assert not [part["error"] for part in parts if part["error"]], done.stderr[-2000:]
    assert all(part["milliseconds"] > 0 for part in parts)
    assert {"yardstick, compiled", "training pass", "pass without weight gradients",
            "sketch"} <= {part["part"] for part in parts}
    assert all(part["part"] in done.stdout for part in parts)
