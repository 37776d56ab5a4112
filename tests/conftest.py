"""Checkpoints that several test modules start from, each pre-trained once a run of the tests.

A module copies the folder, and leaves in its own copy what its tests make. The modules that take
longest come first, so that no process of ``make test`` is left with one of them at the end.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from indexed_files import random_documents, write_dataset
from ranks import Layout, run_on_ranks
from trained import LEARNT, SMALL, documents, train

if not torch.cuda.is_available():  # before Triton is imported: kernels for GPUs run on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

# By their processor time.
_LONGEST = ("curvature/test_exact_products.py", "commands/test_pipeline.py",
            "mcore/test_checkpoints.py", "mcore/test_models.py", "mcore/test_fused_attention.py",
            "mcore/test_bf16.py", "commands/test_compare.py", "commands/test_merge.py",
            "mcore/test_blend.py", "commands/test_alternate.py", "curvature/test_all_reduces.py",
            "faults/test_faults.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        name = "/".join(item.path.parts[-2:])
        return _LONGEST.index(name) if name in _LONGEST else len(_LONGEST)

    items.sort(key=place)


@pytest.fixture(scope="session")
def _small(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    for seed, (name, count) in enumerate((("pool", 41), ("valid", 12))):
        write_dataset(folder / name, random_documents(count, 60, seed=seed, longest=16))
    run_on_ranks(1, train, folder, Layout(), SMALL, "theta")
    return folder


@pytest.fixture(scope="session")
def _learnt(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("learnt")
    for seed, (name, count) in enumerate((("a", 90), ("b", 60), ("valid", 24), ("test", 12),
                                          ("test-2", 9))):
        write_dataset(folder / name, documents(seed, count))
    run_on_ranks(1, train, folder, Layout(), LEARNT, "theta")
    return folder


@pytest.fixture(scope="module")
def small_folder(_small, tmp_path_factory) -> Path:
    """Random documents (``pool``, ``valid``), and a checkpoint ``theta`` of SMALL."""
    return shutil.copytree(_small, tmp_path_factory.mktemp("copy") / "small")


@pytest.fixture(scope="module")
def learnt_folder(_learnt, tmp_path_factory) -> Path:
    """``documents`` (``a``, ``b``, ``valid``, ``test``, ``test-2``), and ``theta`` of LEARNT."""
    return shutil.copytree(_learnt, tmp_path_factory.mktemp("copy") / "learnt")
