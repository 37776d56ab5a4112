"""The work that faults happen to: commands over tiny data, and what has to come out of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from indexed_files import write_dataset
from trained import LEARNT, documents

from megatron_direct.data.mask import SampleMask
from megatron_direct.gradients.store import SketchStore
from megatron_direct.settings import flag_name

SKETCH_SIZE = 64
PRETRAIN_ITERATIONS = 4
FROM_CHECKPOINT = ("select", "compare")  # commands that begin with one


@dataclass(frozen=True)
class Job:
    """Commands in one folder, on some ranks. layout: flags of each."""

    name: str
    ranks: int
    layout: tuple[str, ...] = ()
    commands: tuple[str, ...] = ("select", "anneal", "report")


PIPELINE = ("--pipeline-model-parallel-size", "2")
JOBS = {job.name: job for job in (
    Job("one rank", 1), Job("two ranks", 2), Job("four ranks", 4, PIPELINE),
    Job("comparison", 1, commands=("compare",)),
    Job("pretraining", 1, commands=("pretrain",)),
    Job("pretraining on two ranks", 2, commands=("pretrain",)),
    Job("preprocessing", 1, commands=("preprocess",)))}


def prepare(folder: Path) -> None:
    """Everything but the checkpoint ``theta``, which ``arguments("theta", ...)`` makes."""
    for seed, (name, count) in enumerate((("a", 40), ("b", 30), ("valid", 12), ("test", 8))):
        write_dataset(folder / name, documents(seed, count))
    lines = [json.dumps({"text": f"entry {i} of {i * i} words " * (1 + i % 3)}) for i in range(60)]
    for name in ("one", "two"):
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
        lines.reverse()


def arguments(command: str, data: Path, run: Path, layout: Sequence[str] = ()) -> list[str]:
    """Of megatron-direct. run: the folder that is written into."""
    def of(*names: str) -> list[str]:
        return [str(data / name) for name in names]

    measure = ["--load", *of("theta"), "--data-path", *of("a", "b"), "--valid-data-path",
               *of("valid"), "--sketch-size", str(SKETCH_SIZE), "--micro-batch-size", "2",
               "--pilot-iters", "2", "--num-eigenpairs", "3", "--lanczos-tol", "0.01"]
    model = [text for group in (LEARNT.model, LEARNT.optimizer, LEARNT.batch)
             for name, value in vars(group).items()
             if value != type(group).__dataclass_fields__[name].default
             for text in (flag_name(name), str(value))]
    pretrain = ["pretrain", "--data-path", *of("a", "b"), "--train-iters",
                str(PRETRAIN_ITERATIONS), "--save-interval", "2", *model]
    return {
        "theta": [*pretrain, "--save", *of("theta")],
        "pretrain": [*pretrain, "--save", str(run)],
        "select": ["select", *measure, "--run-dir", str(run), "--num-select", "20",
                   "--curvature", "fisher", *layout],
        "anneal": ["anneal", "--run-dir", str(run), "--test-data-path", *of("test"),
                   "--lr-wsd-decay-iters", "5", "--save-interval", "2", *layout],
        "report": ["report", "--run-dir", str(run), *layout],
        "compare": ["compare", *measure, "--run-dir", str(run), "--num-select", "20",
                    "--test-data-path", *of("test"), "--num-seeds", "1",
                    "--arms", "random", "gradient-dot", "--lr-wsd-decay-iters", "2"],
        "preprocess": ["preprocess", "--input", *of("one.jsonl", "two.jsonl"), "--output-prefix",
                       str(run / "text"), "--tokenizer-model", str(run / "tokenizer.model"),
                       "--train-tokenizer", "--vocab-size", "300", "--append-eod", "--split",
                       "80,10,10", "--drop-duplicates", "--shard-size", "0.0005",
                       "--corrupt-fraction", "0.2"],
    }[command]


def contents(run: Path) -> dict[str, str]:
    """By file, a digest of all that has to be the same as after a run without a fault.

    Not in it: times, versions, paths, and what is only there to carry on with.
    """
    found = {}
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(run))
        if path.is_dir() or ".shards" in name:
            continue
        if path.name in ("results.md", "report.html"):
            found[name] = "there"  # they tell times
        elif path.name in ("metrics.jsonl", "chosen.npy") or path.suffix in (
                ".bin", ".idx", ".model") and "sketches" not in name:
            found[name] = _of(path.read_bytes())
        elif path.suffix == ".json" and path.name not in ("run.json", "seconds.json", "step.json"):
            found[name] = _of(json.dumps(_without_times(json.loads(path.read_text())),
                                         sort_keys=True).encode())
        elif path.name.endswith(".mask.npz"):
            found[name] = _of(SampleMask.load(path).keep.tobytes())
        elif path.name == "datasets.json":
            found[name] = _of(path.read_bytes())
    for folder in sorted(run.rglob("sketches")):
        store = SketchStore(folder, SKETCH_SIZE)
        entries = store.entries()
        order = np.lexsort((entries.document, entries.dataset))
        rows = store.read(entries, entries.dataset * 1000 + entries.document)
        found[f"{folder.relative_to(run)}/rows"] = _of(
            rows.rows.tobytes() + rows.losses.tobytes() + entries.document[order].tobytes())
    return {name: text for name, text in found.items() if "checkpoints" not in name
            and "iter_" not in name}


def _without_times(value):
    if isinstance(value, dict):
        return {key: _without_times(item) for key, item in value.items()
                if not any(word in key for word in ("seconds", "passes"))
                and key not in ("provenance", "ranks", "versions", "cost")}
    return [_without_times(item) for item in value] if isinstance(value, list) else value


def _of(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
