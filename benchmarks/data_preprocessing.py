"""Preprocessing: tokens a second by workers, against Megatron-LM's own tool, and peak memory.

    python benchmarks/data_preprocessing.py --megatron-path ../Megatron-LM

Runs take turns, and of each the fastest round counts, since other work on the machine only ever
adds time. Ratios are what to read. Times are those of whole commands, less the time of a run on one
line: what is imported is no matter of speed. Without --input the text is the source of the Python
packages that are installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

TOOL = Path(__file__).parents[1] / "tools" / "preprocess_selection.py"
WORKERS = (1, 2)
# Imported by megatron.training and not used by preprocess_data.py; stands in where triton, which is
# for GPUs, and six are not installed.
RUN_MEGATRON = """
import importlib.util, runpy, sys, types
class Anything(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"): raise AttributeError(name)
        return lambda *arguments, **keywords: None
for needs, name in [("six", "six"), ("triton",
        "megatron.core.transformer.custom_layers.batch_invariant_kernels")]:
    if importlib.util.find_spec(needs) is None: sys.modules[name] = Anything(name)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--input", type=Path, help="JSONL with the key text")
    parser.add_argument("--tokenizer-model", type=Path, help="SentencePiece model")
    parser.add_argument("--megatron-path", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("--megabytes", type=int, default=128, help="of text (default %(default)s)")
    parser.add_argument("--shard-size", default="1", help="MiB, so that the text is many shards")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        _measure(flags, Path(folder))


def _measure(flags: argparse.Namespace, folder: Path) -> None:
    inputs = {1: folder / "text1.jsonl", 8: folder / "text8.jsonl"}  # in eighths
    # Line by line: the memory that this process takes counts as its children's.
    _write(inputs[8], _lines_of(flags.input) if flags.input else _installed_source(),
           flags.megabytes << 20)
    _write(inputs[1], _lines_of(inputs[8]), inputs[8].stat().st_size // 8)
    model = flags.tokenizer_model or _trained(folder, inputs[8])

    def ours(input_path: Path, workers: int) -> list:
        return [sys.executable, TOOL, "--input", input_path, "--tokenizer-model", model,
                "--append-eod", "--output-prefix", folder / "ours", "--workers", workers,
                "--shard-size", flags.shard_size]

    def theirs(input_path: Path, workers: int) -> list:
        return [sys.executable, "-c", RUN_MEGATRON,
                flags.megatron_path / "tools" / "preprocess_data.py", "--input", input_path,
                "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model,
                "--append-eod", "--output-prefix", folder / "theirs", "--workers", workers]

    line = folder / "line.jsonl"
    _write(line, _lines_of(inputs[8]), 1)
    calls = {("megatron-direct", workers): ours(inputs[8], workers) for workers in WORKERS}
    calls |= {("megatron-direct", "start"): ours(line, 1)}
    if flags.megatron_path:
        os.environ["PYTHONPATH"] = os.pathsep.join(
            [str(flags.megatron_path.resolve()), os.environ.get("PYTHONPATH", "")])
        calls |= {("Megatron-LM", workers): theirs(inputs[8], workers) for workers in WORKERS}
        calls |= {("Megatron-LM", "start"): theirs(line, 1)}
    seconds: dict[tuple, list[float]] = {name: [] for name in calls}
    for _ in range(flags.rounds):
        for name, call in calls.items():
            seconds[name].append(_run(call)[0])
    best = {name: min(times) for name, times in seconds.items()}
    tokens = json.loads((folder / "ours_text8_pool.json").read_text())["tokens"]
    _print(best, tokens, inputs[8].stat().st_size)
    if flags.megatron_path:
        _run(theirs(inputs[8], 2))
        same = _bytes(folder, "ours_text8_pool") == _bytes(folder, "theirs_text_document")
        print(f"the same .bin and .idx as Megatron-LM's: {'yes' if same else 'NO'}")
    peaks = {size: _run(ours(path, 2))[1] for size, path in inputs.items()}
    print(f"peak memory of the largest process: {peaks[1] >> 20} MiB, with 8 times the input "
          f"{peaks[8] >> 20} MiB, ratio {peaks[8] / peaks[1]:.2f}")


def _print(best: dict[tuple, float], tokens: int, size: int) -> None:
    print(f"{size / 2**20:.0f} MiB of JSONL, {tokens / 1e6:.1f} M tokens")
    rate: dict[str, dict[int, float]] = {}
    for tool in ("megatron-direct", "Megatron-LM"):
        if (tool, 1) not in best:
            continue
        rate[tool] = {workers: tokens / (best[tool, workers] - best[tool, "start"])
                      for workers in WORKERS}
        print(f"{tool:16}" + "".join(f"{rate[tool][w] / 1e6:7.2f} M tokens/s with {w}"
                                     for w in WORKERS)
              + f"{rate[tool][2] / rate[tool][1]:8.2f} times")
    if "Megatron-LM" in rate:
        for workers in WORKERS:
            ratio = rate["megatron-direct"][workers] / rate["Megatron-LM"][workers]
            print(f"megatron-direct / Megatron-LM with {workers}: {ratio:.2f}")


def _write(path: Path, lines: Iterable[bytes], size: int) -> None:
    """As many of the lines as ``size`` bytes take, or what there is."""
    with open(path, "wb") as file:
        for line in lines:
            file.write(line)
            if file.tell() >= size:
                break


def _lines_of(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        yield from file


def _installed_source() -> Iterator[bytes]:
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("platlib")):
        for path in sorted(Path(root).rglob("*.py")):
            text = path.read_bytes().decode(errors="ignore")
            for start in range(0, len(text), 4000):  # as long as a page of the web
                yield json.dumps({"text": text[start: start + 4000]}).encode() + b"\n"


def _trained(folder: Path, text: Path) -> Path:
    """A tokenizer from every so many lines, 4 MB in all."""
    step = max(1, text.stat().st_size // (4 << 20))
    _write(folder / "sample.jsonl", itertools.islice(_lines_of(text), 0, None, step), 4 << 20)
    model = folder / "tokenizer.model"
    _run([sys.executable, TOOL, "--input", folder / "sample.jsonl", "--tokenizer-model", model,
          "--train-tokenizer", "--output-prefix", folder / "sample"])
    return model


def _run(command: list) -> tuple[float, int]:
    """Seconds, and the bytes of memory that the largest process took at most."""
    start = time.perf_counter()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE)
    message = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed:\n{message.decode()}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def _bytes(folder: Path, name: str) -> tuple[bytes, bytes]:
    return (folder / f"{name}.bin").read_bytes(), (folder / f"{name}.idx").read_bytes()


if __name__ == "__main__":
    main()
