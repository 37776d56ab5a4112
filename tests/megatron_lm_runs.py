"""Trainings by a checkout of Megatron-LM on the CPU, for the tests in tests/plugins.

``MEGATRON_LM_PATH=/path/to/Megatron-LM``, of the version of the installed megatron-core up to the
last number; without it, or with another version, what needs the checkout is skipped. Documents
outside the masks are overwritten with a token that occurs nowhere else.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from indexed_files import random_documents, write_dataset
from ranks import Layout

from megatron_direct import SampleMask
from megatron_direct.data.indexed import dataset_digest
from megatron_direct.data.materialize import materialize

ROOT = Path(__file__).parents[1]
ON_CPU = ROOT / "tests" / "plugins" / "megatron_lm_on_cpu.py"

VOCAB, POISON = 60, 60
SAMPLES = 32  # of 8 iterations
GPT2 = ("--num-layers 2 --position-embedding-type learned_absolute --normalization LayerNorm "
        "--no-bias-gelu-fusion").split()
LLAMA = ("--num-layers 2 --position-embedding-type rope --normalization RMSNorm --swiglu "
         "--ffn-hidden-size 32 --disable-bias-linear --group-query-attention --num-query-groups 2 "
         "--untie-embeddings-and-output-weights --no-bias-swiglu-fusion --no-rope-fusion").split()
# The layers of LLAMA, as a HybridModel of two pipeline stages.
HYBRID = ["--hybrid-layer-pattern", "*-|*-", "--spec", "local_hybrid_layers", "stack", *LLAMA[2:]]
COMMON = """
    --hidden-size 16 --num-attention-heads 4 --seq-length 16
    --max-position-embeddings 16 --micro-batch-size 2 --global-batch-size 4
    --lr 1e-2 --lr-decay-style constant --log-interval 1 --eval-interval 1000 --seed 5
    --hidden-dropout 0 --attention-dropout 0 --tokenizer-type NullTokenizer --vocab-size 61
    --distributed-backend gloo --transformer-impl local --use-cpu-initialization --num-workers 0
    --no-masked-softmax-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion
    --no-persist-layer-norm --attention-backend unfused""".split()


def release(version: str) -> str:
    return ".".join(version.split(".")[:2])


def release_of(checkout: str) -> str | None:
    """Of Megatron-LM, or None if it is none."""
    info = Path(checkout) / "megatron" / "core" / "package_info.py"
    if not info.is_file():
        return None
    return ".".join(re.findall(r"^(?:MAJOR|MINOR) = (\d+)", info.read_text(), re.MULTILINE))


def _why_not() -> str | None:
    """Why trainings cannot run here, or None."""
    path = os.environ.get("MEGATRON_LM_PATH")
    installed = release(importlib.metadata.version("megatron-core"))
    if path is None:
        return ("MEGATRON_LM_PATH is not set: needs a checkout of Megatron-LM "
                f"{installed}, as the installed megatron-core")
    found = release_of(path)
    if found is None:
        return f"MEGATRON_LM_PATH: {path} is not a checkout of Megatron-LM"
    if found != installed:
        return (f"MEGATRON_LM_PATH is Megatron-LM {found}, but megatron-core {installed} is "
                "installed")
    return None


WHY_NOT = _why_not()
needs_checkout = pytest.mark.skipif(WHY_NOT is not None, reason=WHY_NOT or "")


def has_script(name: str) -> bool:
    return (Path(os.environ.get("MEGATRON_LM_PATH", "")) / f"{name}.py").is_file()


def make_pools(folder: Path) -> Path:
    """pool0 and pool1 with masks, and as datasets of what is kept (alone0, alone1); pool2 without.

    pool2 holds no poison. Tokens have the type that Megatron-LM takes for this vocabulary.
    """
    rng = np.random.default_rng(7)
    for number, count in enumerate((60, 50, 40)):
        documents = random_documents(count, VOCAB, seed=number)
        if number == 2:
            write_dataset(folder / "pool2", documents, np.uint16)
            continue
        keep = rng.random(count) < 0.5
        documents = [document if kept else [[POISON] * len(sequence) for sequence in document]
                     for document, kept in zip(documents, keep, strict=True)]
        prefix = write_dataset(folder / f"pool{number}", documents, np.uint16)
        mask = SampleMask(keep, dataset_digest(prefix))
        mask.save(folder / "masks" / f"pool{number}.mask.npz")
        materialize(prefix, mask, str(folder / f"alone{number}"))
    return folder


def whole_blend(pools: list[str]) -> list:
    """One blend that ``--split`` gives to the training."""
    return ["--data-path", *_weighted(pools).split(), "--split", "100,0,0", "--eval-iters", 0]


def blend_per_split(folder: Path, pools: list[str]) -> list:
    """The same for the training, and one dataset for validation, from a file."""
    path = folder / f"blend-of-{pools[0]}.json"
    path.write_text(json.dumps({"train": _weighted(pools), "valid": ["pool2"], "test": None}))
    return ["--per-split-data-args-path", path, "--eval-iters", 1]


def _weighted(pools: list[str]) -> str:
    return f"1 {pools[0]} 2 {pools[1]} 1 pool2"


def run(folder: Path, layout: Layout, *flags, script="launch/pretrain_gpt_direct.py",
        record: str | None = None, kill_at: int | None = None, fails: bool = False,
        ) -> tuple[dict[int, str], str]:
    """({iteration: loss as printed}, all output). kill_at: the iteration after which all die."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    if script.startswith("tools"):
        environment["WORLD_SIZE"] = str(layout.world_size)  # of the training that it is for
    if record is not None:
        (folder / record).mkdir()
        environment["RECORD_BATCHES"] = str(folder / record)
    lines = []
    with subprocess.Popen(_command(layout, script, flags), cwd=folder, env=environment, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            lines.append(line)
            if kill_at is not None and re.search(rf" iteration +{kill_at}/", line):
                family = [*psutil.Process(process.pid).children(recursive=True), process]
                for member in family:
                    member.kill()
    output = "".join(lines)
    assert (process.returncode != 0) == (fails or kill_at is not None), output[-5000:]
    losses = re.findall(r" iteration +(\d+)/.* lm loss: (\S+)", output)
    return {int(iteration): loss for iteration, loss in losses}, output


def _command(layout: Layout, script: str, flags) -> list[str]:
    ranks = [] if script.startswith("tools") else [
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.world_size)]
    return [sys.executable, *ranks, str(ON_CPU), str(ROOT / script), *COMMON,
            "--tensor-model-parallel-size", str(layout.tp),
            "--pipeline-model-parallel-size", str(layout.pp), *map(str, flags)]


def learning_rates(output: str) -> dict[int, float]:
    """{iteration: the rate that is printed with it}."""
    found = re.findall(r" iteration +(\d+)/.* learning rate: (\S+)", output)
    return {int(iteration): float(rate) for iteration, rate in found}


def batches(folder: Path, record: str) -> dict[str, np.ndarray]:
    """Rank 0's (which sees tokens) and the last rank's (which sees labels)."""
    ranks = sorted((folder / record).glob("rank*.npz"))
    return {"tokens": np.load(ranks[0])["tokens"], "labels": np.load(ranks[-1])["labels"]}
