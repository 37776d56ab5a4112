"""Estimates of `plan --machine here` against runs of `select`: time and peak memory.

    python benchmarks/estimates.py [--only 0 2] [--folder build/estimates]

Each configuration is estimated under torchrun, by a pass that is measured, and then run. Memory is
the largest resident size of any rank. Time is what the busiest rank worked, in processor time from
the start of its process, which other work on the machine does not change, against the estimate
without what it waits; the clock of both is shown beside it, and means something on free cores.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

from megatron_direct.data import indexed

VOCAB_SIZE, SEQ_LENGTH = 4096, 256


@dataclass(frozen=True)
class Configuration:
    ranks: int
    candidates: int
    model: str
    layout: str = ""
    flags: str = ""


CONFIGURATIONS = (
    Configuration(1, 600, "--num-layers 6 --hidden-size 256"),
    Configuration(2, 1200, "--num-layers 6 --hidden-size 256"),
    Configuration(2, 400, "--num-layers 8 --hidden-size 512",
                  "--tensor-model-parallel-size 2"),
    Configuration(2, 400, "--num-layers 8 --hidden-size 512",
                  "--pipeline-model-parallel-size 2", "--pilot-iters 3"),
    Configuration(1, 100, "--num-layers 12 --hidden-size 512", "",
                  "--curvature gauss-newton --num-eigenpairs 4 --max-matvecs 18 "
                  "--num-curvature-samples 8"),
    Configuration(4, 400, "--num-layers 8 --hidden-size 384",
                  "--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2"),
)


def _write(prefix: Path, count: int, seed: int) -> str:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(SEQ_LENGTH // 4, SEQ_LENGTH + 2, count).astype(np.int32)
    rng.integers(0, VOCAB_SIZE, int(lengths.sum()), np.uint16).tofile(f"{prefix}.bin")
    indexed.write_index(f"{prefix}.idx", np.uint16, lengths)
    return str(prefix)


def _torchrun(ranks: int, *arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                    "--nproc-per-node", str(ranks), *arguments], check=True)


def compare(configuration: Configuration, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pool = _write(folder / "pool", configuration.candidates, 0)
    valid = _write(folder / "valid", 32, 1)
    model = [*configuration.model.split(), "--num-attention-heads", "8", "--vocab-size",
             str(VOCAB_SIZE), "--seq-length", str(SEQ_LENGTH)]
    layout = configuration.layout.split()
    theta = str(folder / "theta")
    _torchrun(configuration.ranks, "-m", "megatron_direct", "pretrain", "--data-path", pool,
              "--save", theta, "--train-iters", "2", *model, *layout)
    asked = [*layout, "--load", theta, "--data-path", pool, "--valid-data-path", valid,
             "--pilot-iters", "0", *configuration.flags.split()]
    _torchrun(configuration.ranks, __file__, "estimate", str(folder / "estimate.json"), *asked,
              "--measured-file", str(folder / "measured.json"))
    _torchrun(configuration.ranks, __file__, "run", str(folder / "run.json"), *asked,
              "--run-dir", str(folder / "run"))
    found, run = (json.loads((folder / name).read_text())
                  for name in ("estimate.json", "run.json"))
    print(f"{configuration.ranks} ranks, {configuration.model} {configuration.layout} "
          f"{configuration.flags}")
    for what, unit, size in (("worked", "s", 1), ("clock", "s", 1), ("bytes", "GB", 1e9)):
        estimated, measured = found[what] / size, run[what] / size
        print(f"    {what}: estimated {estimated:.2f} {unit}, measured {measured:.2f}: "
              f"{estimated / measured:.2f}")
    print(f"    by stage: {found['stages']}; {run['stages']}", flush=True)


def on_a_rank(what: str, output: str, arguments: list[str]) -> None:
    """Estimates or runs, as one of the ranks that torchrun started."""
    from megatron_direct.cli import main as cli
    from megatron_direct.cli.flags import request_from
    from megatron_direct.commands import plan
    from megatron_direct.runtime import files, memory, parallel

    def work() -> None:
        command = "plan" if what == "estimate" else "select"
        extra = ["--machine", "here"] if what == "estimate" else []
        parsed = cli.make_parser([command]).parse_args([command, *extra, *arguments])
        if what == "estimate":
            found, *_ = plan.estimated(request_from(plan.PlanRequest, parsed))
            told = {"worked": sum(stage.worked for stage in found.stages), "clock": found.seconds,
                    "bytes": found.device_bytes, "stages": {
                        stage.name: (round(stage.worked, 1), round(stage.device_bytes / 1e9, 2))
                        for stage in found.stages}}
        else:
            cli.call(parsed)
            worked, peaks = zip(*parallel.gather_objects(
                (time.process_time(), memory.resident_bytes("VmHWM"))), strict=True)
            told = {"worked": max(worked), "bytes": max(peaks),
                    "clock": time.time() - psutil.Process().create_time(),
                    "stages": files.read_json(Path(parsed.run_dir) / "seconds.json")}
        parallel.on_rank_zero(lambda: files.write_json(output, told))

    sys.exit(cli.run(work))


def main() -> None:
    if sys.argv[1:2] in (["estimate"], ["run"]):
        on_a_rank(sys.argv[1], sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--only", type=int, nargs="+", default=range(len(CONFIGURATIONS)))
    parser.add_argument("--folder", type=Path)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for number in flags.only:
            compare(CONFIGURATIONS[number], (flags.folder or Path(scratch)) / str(number))


if __name__ == "__main__":
    main()
