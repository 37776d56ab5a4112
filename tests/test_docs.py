"""What the documentation says of links, flags, files and names holds, and its examples run."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_house import ROOMS

import megatron_direct
from megatron_direct.cli import anneal_gpt, doctor, preprocess
from megatron_direct.cli import main as cli
from megatron_direct.plugins import megatron_lm

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "megatron_direct"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

# Flags of other programs, which the pages tell a user to give to them.
FOREIGN_FLAGS = {
    # Megatron-LM: how its checkpoints, blends and schedule go together with masks.
    "--data-cache-path", "--dist-ckpt-optim-fully-reshardable", "--eval-iters", "--finetune",
    "--lr-decay-samples", "--lr-decay-style", "--override-opt-param-scheduler",
    "--lr-wsd-decay-samples", "--fp16", "--fp8-format",
    "--dataloader-defer-npy-index-mmap", "--dataloader-fast-cache-load",
    "--dataloader-inter-document-masking", "--hybrid-override-pattern",
    "--per-dataset-sequences-path", "--phase-transition-iterations", "--train-data-path",
    "--train-samples", "--use-checkpoint-args", "--ckpt-step", "--exit-on-missing-checkpoint",
    "--lr-warmup-samples",
    # Megatron-LM: kinds of data that take no masks.
    "--fim-data", "--mock-data", "--sft",
    # torchrun, git and pytest.
    "--branch", "--depth", "--max-restarts", "--nproc-per-node", "--standalone",
    # Megatron-LM: what its checkpoints have to be.
    "--ckpt-format",
    # Slurm, Docker and the NeMo-Run recipe.
    "--account", "--container-image", "--flags", "--ntasks", "--partition",
    "--array", "--build-arg", "--dependency", "--gpus-per-node", "--ipc", "--nodes",
    "--ntasks-per-node", "--parsable", "--signal", "--ulimit",
    # Scripts in benchmarks/ and tools/.
    "--device", "--folder", "--megatron-path", "--results",
    "--output-dir", "--packages",
}
FOREIGN_PATHS = {"tools/preprocess_data.py", "tests/unit_tests/data"}  # Megatron-LM's
OUR_FOLDERS = ("megatron_direct", "benchmarks", "docs", "launch", "tests", "tools")
# Assembled, since this file is looked through as well.
REGISTRIES = [".".join(host) for host in (
    ("pypi", "org"), ("pythonhosted", "org"), ("download", "pytorch", "org"), ("anaconda", "org"),
    ("npmjs", "org"), ("proxy", "golang", "org"), ("crates", "io"))]
MACHINE = ["/".join(("", "work", "")), f"{ROOT}/", f"{Path.home()}/"]


def _ids(paths) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def _anchors(page: Path) -> set[str]:
    """Of the headings, as Markdown viewers make them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", prose, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-")
            for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_ids(PAGES))
def test_links_resolve(page):
    broken = []
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        file = page.parent / target if target else page
        if not file.exists() or anchor and anchor not in _anchors(file):
            broken.append(f"{target}#{anchor}")
    assert not broken


def test_the_index_lists_every_page():
    listed = {(ROOT / "docs" / target).resolve() for target in re.findall(
        r"\]\(([^)#\s]+)\)", (ROOT / "docs" / "index.md").read_text())}
    assert not {page for page in PAGES if page.name != "index.md"} - listed


def _options(parser: argparse.ArgumentParser) -> Iterator[str]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _options(command)
        yield from action.option_strings


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    return {*_options(cli.make_parser()), *_options(preprocess.make_parser()),
            *_options(anneal_gpt.make_parser()), *_options(doctor.make_parser()),
            *_options(megatron_lm.add_arguments(argparse.ArgumentParser()))}


def _flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w-]*", text))


@pytest.mark.parametrize("page", PAGES, ids=_ids(PAGES))
def test_flags_exist(page, known_flags):
    assert not _flags(page.read_text()) - known_flags - FOREIGN_FLAGS


def test_foreign_flags_are_foreign_and_named(known_flags):
    named = set().union(*(_flags(page.read_text()) for page in PAGES))
    assert not FOREIGN_FLAGS & known_flags
    assert not FOREIGN_FLAGS - named


def _named_paths(text: str) -> set[str]:
    """Files and folders that a page names as ours, from the root of the repository."""
    ours = set(re.findall(rf"(?<![\w./-])(?:{'|'.join(OUR_FOLDERS)})/[\w./-]*\w/?", text))
    rooms = "|".join(path.name for path in PACKAGE.iterdir() if path.is_dir())
    modules = re.findall(rf"`((?:{rooms})/[\w/]+\.py)`", text)  # CONTRIBUTING's short form
    return ours | {f"megatron_direct/{module}" for module in modules}


@pytest.mark.parametrize("page", PAGES, ids=_ids(PAGES))
def test_files_exist(page):
    assert not {path for path in _named_paths(page.read_text()) - FOREIGN_PATHS
                if not (ROOT / path).exists()}


@pytest.mark.parametrize("page", PAGES, ids=_ids(PAGES))
def test_names_of_the_package_exist(page):
    named = set(re.findall(r"\bmegatron_direct(?:\.[a-zA-Z_]\w*)+", page.read_text()))
    assert not {name for name in named if not _exists(name)}


def _exists(name: str) -> bool:
    """A module, found without importing it (one needs NeMo), or an attribute of a module."""
    try:
        if importlib.util.find_spec(name) is not None:
            return True
    except ModuleNotFoundError:  # what stands before the last point is not a package
        pass
    module, _, attribute = name.rpartition(".")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


def _python(page: Path) -> str:
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S))


def test_examples_of_the_api_run_in_order(tmp_path):
    code = _python(ROOT / "docs" / "api.md")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr


def test_every_public_name_has_a_section_and_an_example():
    text = (ROOT / "docs" / "api.md").read_text()
    for name in megatron_direct.__all__:
        section = re.search(rf"^## {name}\n(.*?)(?=^## |\Z)", text, re.M | re.S)
        assert section, name
        assert re.search(rf"```python\n.*?\b{name}\b.*?```", section[1], re.S), name


@pytest.mark.parametrize("page", PAGES, ids=_ids(PAGES))
def test_what_a_page_imports_is_there(page):
    """By the source, since the plug-ins import what is not installed here."""
    imported = [node for node in ast.walk(ast.parse(_python(page)))
                if isinstance(node, ast.ImportFrom) and node.module
                and node.module.split(".")[0] == "megatron_direct"]
    lost = [f"{node.module}.{name.name}" for node in imported for name in node.names
            if not _is_there(node.module.split("."), name.name)]
    assert not lost


def _is_there(module: list[str], name: str) -> bool:
    path = ROOT.joinpath(*module)
    if path.is_dir():
        return (path / f"{name}.py").is_file() or (
            path == PACKAGE and name in megatron_direct.__all__)
    return any(name == getattr(node, "name", None) for node in ast.parse(
        path.with_suffix(".py").read_text()).body)


def _literals() -> set[str]:
    """Every literal text of the package, and the literal parts of every f-string."""
    return {node.value for path in PACKAGE.rglob("*.py") for node in ast.walk(
        ast.parse(path.read_text())) if isinstance(node, ast.Constant)
        and isinstance(node.value, str)}


def test_the_messages_of_troubleshooting_are_those_of_the_source():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 20
    literals = _literals()
    lost = [part for message in messages for part in message.split("...")
            if part.strip(" ,.:()") and not any(part.strip() in text for text in literals)]
    assert not lost


def test_contributing_lists_the_rooms_in_their_order():
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "CONTRIBUTING.md").read_text(), re.M)
    assert tuple(rows) == ROOMS


def _texts() -> Iterator[tuple[Path, str]]:
    """Every file of the repository that is text."""
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for path in map(ROOT.joinpath, listed.stdout.splitlines()):
        if path.is_file() and not path.is_symlink():
            yield path, path.read_bytes().decode(errors="replace")


def test_no_registry_and_no_path_of_a_machine_is_named():
    wrong = [f"{path.relative_to(ROOT)}: {word}" for path, text in _texts()
             for word in (*REGISTRIES, *MACHINE) if word in text]
    assert not wrong
