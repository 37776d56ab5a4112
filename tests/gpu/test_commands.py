"""Pre-training, selection with a pilot, and annealing on one GPU, by the real command.

Two tensor-parallel ranks share the GPU over gloo: NCCL wants one for each rank.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from indexed_files import random_documents, write_dataset

from megatron_direct.data.mask import SampleMask
from megatron_direct.gradients.store import Sketches, SketchStore

pytestmark = [pytest.mark.gpu,
              pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

ROOT, VOCAB_SIZE, ITERATIONS = Path(__file__).parents[2], 90, 6
_MODEL = ("--num-layers 2 --hidden-size 64 --num-attention-heads 4 --num-query-groups 2 "
          "--seq-length 128 --make-vocab-size-divisible-by 32").split()
_BATCH = "--micro-batch-size 4 --global-batch-size 8".split()


_TWO_RANKS = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def _run(*arguments: str, launcher: tuple[str, ...] = ()) -> None:
    done = subprocess.run([sys.executable, *launcher, "-m", "megatron_direct", *arguments],
                          cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


def _select(folder: Path, name: str, *flags: str, launcher: tuple[str, ...] = ()) -> None:
    _run("select", "--load", str(folder / "theta"), "--data-path", str(folder / "pool"),
         "--valid-data-path", str(folder / "valid"), "--run-dir", str(folder / name),
         "--pilot-iters", "3", "--sketch-size", "256", "--num-select", "20",
         "--num-eigenpairs", "6", *_BATCH[:2], *flags, launcher=launcher)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A checkpoint trained in bfloat16, which is what the other commands then compute in."""
    folder = tmp_path_factory.mktemp("commands")
    for seed, (name, count) in enumerate({"pool": 80, "valid": 20}.items()):
        write_dataset(folder / name, random_documents(count, VOCAB_SIZE, seed, longest=140))
    _run("pretrain", "--bf16", "--data-path", str(folder / "pool"), "--save", str(folder / "theta"),
         "--vocab-size", str(VOCAB_SIZE), "--train-iters", "8", "--save-interval", "8", *_MODEL,
         *_BATCH)
    _select(folder, "run")
    return folder


def _rows(run: Path) -> bytes:
    return (run / "sketches" / "rows-0.f32").read_bytes()


def test_a_selection_is_made_and_annealed(folder):
    _run("anneal", "--run-dir", str(folder / "run"), "--lr-wsd-decay-iters", str(ITERATIONS),
         "--save-interval", str(ITERATIONS))
    arm = folder / "run" / "anneal" / "direct"
    lines = [json.loads(line) for line in (arm / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == ITERATIONS
    assert np.isfinite([line["loss"] for line in lines]).all()
    key = json.loads((arm / "manifest.json").read_text())["key"]
    assert key["bf16"] is True
    result = json.loads((arm / "result.json").read_text())
    assert np.isfinite(list(result["after"]["valid"].values())).all()


def test_a_selection_is_made_again_with_the_same_bytes(folder):
    _select(folder, "again")
    assert _rows(folder / "again") == _rows(folder / "run")
    selections = [folder / run / "selections" / "direct" for run in ("run", "again")]
    masks = [sorted((path / "masks").glob("*.npz")) for path in selections]
    for first, second in zip(*masks, strict=True):
        np.testing.assert_array_equal(SampleMask.load(first).keep, SampleMask.load(second).keep)


def _in_float32(folder: Path, name: str, *flags: str, launcher: tuple[str, ...] = ()) -> Sketches:
    """Sketches at the checkpoint itself, whose weights are then the same in every layout."""
    _select(folder, name, "--pilot-iters", "0", "--no-bf16", *flags, launcher=launcher)
    store = SketchStore(folder / name / "sketches", 256)
    entries = store.entries()
    return store.read(entries, 1000 * entries.dataset + entries.document)


def test_two_tensor_parallel_ranks_share_the_gpu_over_gloo(folder):
    """They end with the rows of one rank: float32 sums in another order, as between layouts on a
    CPU."""
    one = _in_float32(folder, "one-rank")
    two = _in_float32(folder, "two-ranks", "--tensor-model-parallel-size", "2",
                      "--distributed-backend", "gloo", launcher=_TWO_RANKS)
    np.testing.assert_array_equal(two.samples, one.samples)
    errors = np.linalg.norm(two.rows - one.rows, axis=1) / np.linalg.norm(one.rows, axis=1)
    assert errors.max() < 1e-4
