"""The comparison on text out of Python packages (tools/pypi_text.py).

    make study-packages          (2.6 M parameters; hours on two cores; carried on if killed)
    make study-gpu               (47 M parameters in bfloat16, on one GPU)
    python benchmarks/package_study.py --scale tiny --settings clean     (minutes: does it run?)

No package is in two of pretrain, pool, valid and test. The stable phase sees all domains of the
pretrain packages, then each setting's arms are annealed from there. Settings:

    clean    prose and Python, as many documents of each; validation and test alike
    noisy    the same, of which a tenth is shuffled token by token, and stubs, catalogues and markup
    other    stubs mixed 1 to 20 into prose and Python; validation and test sets are stubs
    shifted  ten times as much Python as prose; validation and test sets are prose
    long     clean, with an annealing of the length of the pool: a quarter is seen four times
"""

from __future__ import annotations

import argparse
import ctypes
import enum
import functools
import itertools
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.comparison.summary import read_summary
from megatron_direct.data import indexed
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.materialize import materialize
from megatron_direct.reports import markdown
from megatron_direct.runtime import files

ROOT = Path(__file__).resolve().parents[1]
MAIN = ("prose", "python")
OTHERS = ("stubs", "po", "markup")


@dataclass(frozen=True)
class Setting:
    """shares: of the pool's documents, by domain; corrupted: whether a tenth of it is shuffled;
    target: domains of validation and test sets; length: tokens of the annealing, of the pool's."""

    shares: dict[str, float]
    target: tuple[str, ...] = MAIN
    corrupted: bool = False
    length: float = 0.5


SETTINGS = {
    "clean": Setting({"prose": 0.5, "python": 0.5}),
    "noisy": Setting({"prose": 0.3, "python": 0.3, "stubs": 0.1, "po": 0.1, "markup": 0.2},
                     corrupted=True),
    "other": Setting({"prose": 0.475, "python": 0.475, "stubs": 0.05}, target=("stubs",)),
    "shifted": Setting({"prose": 0.09, "python": 0.91}, target=("prose",)),
    "long": Setting({"prose": 0.5, "python": 0.5}, length=1.0),
}
# What is run first, of all seeds, before the next: the default, also without contrast, what it has
# to beat, and averages; what else the default decides; other rivals; how much there is to gain.
FIRST = ("random", "whole-pool", "perplexity-middle", "ngrams", "ngrams-smoothed",
         "gradient-cosine", "direct", "direct-plain", "stable-averaged", "random-averaged",
         "whole-pool-averaged", "direct-averaged")
DECISIONS = ("direct-textless", "direct-pilot", "direct-plain-pilot", "direct-merged",
             "direct-ungrouped", "direct-half", "direct-quarter", "direct-unshrunk",
             "direct-unnormalized", "direct-undrawn")
RIVALS = ("domain", "oracle", "flat-energy", "perplexity-low", "perplexity-high", "direct-rounds",
          "direct-share", "direct-proxy", "influence", "influence-select", "redundancy-draw",
          "random-constant-averaged", "whole-pool-constant-averaged", "direct-constant-averaged",
          "random-moderate-averaged", "direct-moderate-averaged")
CEILING = ("ceiling",)
LONG = (*FIRST, "direct-quarter")
MOST_IMPORTANT = ("noisy", "clean", "shifted", "other")


@dataclass(frozen=True)
class Stage:
    """Arms and settings that are finished, with all seeds, before the next stage is begun."""

    arms: tuple[str, ...]
    settings: tuple[str, ...]


# (stage, seeds so far, setting)
Piece = tuple[Stage, int, str]

STAGES = (Stage(FIRST, MOST_IMPORTANT), Stage(DECISIONS, MOST_IMPORTANT),
          Stage(RIVALS, MOST_IMPORTANT), Stage(LONG, ("long",)), Stage(CEILING, MOST_IMPORTANT),
          Stage(tuple(arm for arm in (*DECISIONS, *RIVALS) if arm not in LONG), ("long",)))


@dataclass(frozen=True)
class Scale:
    """One size of everything. proxy: the smaller model that selects for ``model``; pool: documents;
    held_out: of each domain; stable: iterations; num_states: that are saved, of which those in the
    last quarter are averaged."""

    model: tuple[str, ...]
    proxy: tuple[str, ...]
    vocab_size: int
    pool: int
    held_out: int
    stable: int
    global_batch: int
    micro_batch: int
    num_seeds: int
    precision: tuple[str, ...] = ()
    num_states: int = 80
    stages: tuple[Stage, ...] = STAGES

    @property
    def seq_length(self) -> int:
        return int(dict(zip(self.model[::2], self.model[1::2], strict=True)).get(
            "--seq-length", "256"))


SCALES = {
    "cpu": Scale(
        ("--num-layers", "4", "--hidden-size", "192"),
        ("--num-layers", "2", "--hidden-size", "64"), vocab_size=4096, pool=3000,
        held_out=300, stable=1000, global_batch=16, micro_batch=8, num_seeds=3),
    "gpu": Scale(
        ("--num-layers", "12", "--hidden-size", "512", "--num-attention-heads", "8",
         "--seq-length", "512"),
        ("--num-layers", "4", "--hidden-size", "256", "--seq-length", "512"), vocab_size=16384,
        pool=7000, held_out=512,
        stable=740, global_batch=32, micro_batch=32, num_seeds=3, precision=("--bf16",),
        # Half a gigabyte each.
        num_states=9, stages=STAGES[:1]),
    "tiny": Scale(
        ("--num-layers", "1", "--hidden-size", "32"),
        ("--num-layers", "1", "--hidden-size", "16"), vocab_size=1536, pool=120,
        held_out=24, stable=20, global_batch=8, micro_batch=4, num_seeds=2),
}


class Study:
    """Everything lies under ``folder``; what is there is not made again."""

    def __init__(self, folder: Path, scale: Scale, ranks: int):
        self.folder, self.scale, self.ranks = folder, scale, ranks
        self.data = folder / "data"
        self.tokenizer = self.data / "tokenizer.model"
        self.batch = ["--global-batch-size", str(scale.global_batch),
                      "--micro-batch-size", str(scale.micro_batch)]
        self._training = threading.Lock()

    def run(self, *command: str | Path, ranks: int = 1) -> None:
        launcher = [sys.executable] if ranks == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(ranks)]
        subprocess.run([*launcher, *map(str, command)], check=True, cwd=ROOT,
                       env={"OMP_NUM_THREADS": "1", **os.environ}, preexec_fn=_stop_with_parent)

    def prepare(self, text: Path) -> None:
        """Datasets out of ``text``, the folder that tools/pypi_text.py wrote."""
        done = self.data / ".done"
        if done.is_file():
            return
        domains = (*MAIN, *OTHERS)
        for number, part in enumerate(("pretrain", "pool", "valid", "test")):
            training = ("--train-tokenizer", "--vocab-size", str(self.scale.vocab_size))
            for name, fraction in ((part, "0"), *(((f"{part}-corrupted", "0.1"),)
                                                  if part == "pool" else ())):
                self.run("tools/preprocess_selection.py", "--input",
                         *(text / part / f"{domain}.jsonl.gz" for domain in domains),
                         "--tokenizer-model", self.tokenizer, "--append-eod", "--split", "100,0,0",
                         "--group-key", "package", "--corrupt-fraction", fraction,
                         "--output-prefix", self.data / name,
                         *(training if number == 0 else ()))
        for name, setting in SETTINGS.items():
            source = "pool-corrupted" if setting.corrupted else "pool"
            for domain, share in setting.shares.items():
                self._draw(f"{source}_{domain}_pool", f"{name}/{domain}_pool",
                           round(share * self.scale.pool))
        for split in ("valid", "test"):
            for domain in (*MAIN, "stubs"):
                self._draw(f"{split}_{domain}_pool", f"{domain}_{split}", self.scale.held_out)
        done.touch()

    def _draw(self, source: str, target: str, count: int) -> None:
        """A dataset of ``count`` documents drawn from another, or of all if it has fewer."""
        prefix, output = (str(self.data / name) for name in (source, target))
        total = indexed.num_documents(indexed.open_indexed(prefix))
        keep = np.zeros(total, dtype=bool)
        keep[np.random.default_rng(0).choice(total, min(count, total), replace=False)] = True
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".idx", ".bin"):
            Path(output + suffix).unlink(missing_ok=True)
        materialize(prefix, SampleMask(keep, indexed.dataset_digest(prefix)), output)

    def pretrain(self, name: str, model: tuple[str, ...]) -> Path:
        with self._training:  # settings that are run at once need it once
            return self._pretrained(name, model)

    @functools.cache  # noqa: B019  (one study lives as long as the process)
    def _pretrained(self, name: str, model: tuple[str, ...]) -> Path:
        folder = self.folder / name
        self.run("-m", "megatron_direct", "pretrain", "--data-path",
                 *(self.data / f"pretrain_{domain}_pool" for domain in (*MAIN, *OTHERS)),
                 "--save", folder, *model, "--train-iters", str(self.scale.stable),
                 "--save-interval", str(max(1, self.scale.stable // self.scale.num_states)),
                 "--lr", "2e-3", *self.batch, *self.scale.precision, ranks=self.ranks)
        return folder

    def compare(self, name: str, num_seeds: int, flags: Sequence[str]) -> None:
        theta = self.pretrain("theta", self.scale.model)
        if "direct-proxy" in flags:
            flags = [*flags, "--proxy-load", str(self.pretrain("proxy", self.scale.proxy))]
        setting, run = SETTINGS[name], self.folder / name
        pools = [str(self.data / name / f"{domain}_pool") for domain in setting.shares]
        tokens = sum(int(indexed.document_lengths(indexed.open_indexed(pool)).sum())
                     for pool in pools)
        iterations = max(2, round(setting.length * tokens / self.scale.global_batch
                                  / self.scale.seq_length))
        self.run("-m", "megatron_direct", "compare", "--load", theta, "--run-dir", run, "--name",
                 name, "--tokenizer-model", self.tokenizer, "--data-path", *pools,
                 "--valid-data-path", *(self.data / f"{d}_valid" for d in setting.target),
                 "--test-data-path", *(self.data / f"{d}_test" for d in setting.target),
                 "--lr-wsd-decay-iters", str(iterations), "--seed", "1", "--num-seeds",
                 str(num_seeds), *self.batch, *flags, ranks=self.ranks)


def _stop_with_parent() -> None:
    """A command that is left alone by a study that was killed is stopped, in order (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _about() -> str:
    text = __doc__[__doc__.index("No package is"):].strip()
    prose, table = text.split("\n\n", 1)
    return f"{prose}\n\n" + "\n".join(
        "- {}: {}".format(*line.split(maxsplit=1)) for line in table.splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--text", type=Path, default=ROOT / "build" / "package-text",
                        help="folder that tools/pypi_text.py wrote (default %(default)s)")
    parser.add_argument("--folder", type=Path, help="default: runs/packages-SCALE")
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--arms", nargs="+", help="these alone, in one stage; default: in the "
                        "stages of the scale")
    parser.add_argument("--num-seeds", type=int, help="of each setting; default: the scale's")
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks")
    parser.add_argument("--at-once", type=int, default=1, help="settings that are run at once, "
                        "where one of them leaves the machine idle in between")
    parser.add_argument("--seconds", type=float, default=float("inf"),
                        help="no further seed of a setting is begun after so long; the same "
                        "command carries on")
    parser.add_argument("--results", type=Path, help="file for the results")
    flags, others = parser.parse_known_args()  # others: flags of megatron-direct compare
    began = time.monotonic()
    scale = SCALES[flags.scale]
    folder = (flags.folder or ROOT / "runs" / f"packages-{flags.scale}").resolve()
    study = Study(folder, scale, flags.ranks)
    study.prepare(flags.text.resolve())
    study.pretrain("theta", scale.model)  # where this fails, no piece would go on
    stages = scale.stages if flags.arms is None else (
        Stage(tuple(flags.arms), tuple(flags.settings)),)
    work = Work(study, tuple(others), began + flags.seconds, flags.results, tuple(flags.settings),
                flags.at_once)
    failed = work.failing(order(stages, flags.num_seeds or scale.num_seeds, flags.settings))
    if failed:
        raise SystemExit("\n".join(f"failed: {name}, {num_seeds} seeds of {', '.join(stage.arms)}"
                                   for stage, num_seeds, name in failed))


class Outcome(enum.Enum):
    DONE = "it has its results"
    FAILED = "it ended with an error"
    NOT_BEGUN = "the time was over"


@dataclass(frozen=True)
class Work:
    """ends: when nothing more is begun; results: file that is written anew after each piece;
    at_once: settings."""

    study: Study
    flags: tuple[str, ...]
    ends: float
    results: Path | None
    settings: tuple[str, ...]
    at_once: int = 1

    def failing(self, pieces: Iterable[Piece]) -> list[Piece]:
        """Those that failed, and were not done by a second try."""
        outcomes = self.run(pieces)
        # Once more: such as one that met the last breath of a study that was killed before.
        again = self.run([piece for piece, outcome in outcomes.items()
                          if outcome is Outcome.FAILED])
        return [piece for piece, outcome in again.items() if outcome is not Outcome.DONE]

    def run(self, pieces: Iterable[Piece]) -> dict[Piece, Outcome]:
        """Where one fails, the others go on."""
        outcomes = {}
        for _, of_all_settings in itertools.groupby(pieces, key=lambda piece: piece[:2]):
            with ThreadPoolExecutor(self.at_once) as pool:
                try:
                    begun = {pool.submit(self._run, piece): piece for piece in of_all_settings}
                    for future in as_completed(begun):
                        outcomes[begun[future]] = future.result()
                        if self.results is not None:
                            write_results(self.study.folder, self.settings, self.results)
                except BaseException:  # Ctrl-C, which ends the piece that runs: no other begins
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise
        return outcomes

    def _run(self, piece: Piece) -> Outcome:
        stage, num_seeds, name = piece
        if time.monotonic() > self.ends:
            print(f"{name}, {num_seeds} seeds: not begun, the time is over", flush=True)
            return Outcome.NOT_BEGUN
        try:
            self.study.compare(name, num_seeds, ["--arms", *stage.arms, *self.flags])
        except subprocess.CalledProcessError as error:
            print(f"{name}, {num_seeds} seeds: {error}", flush=True)
            return Outcome.FAILED
        return Outcome.DONE


def order(stages: Sequence[Stage], num_seeds: int, settings: Sequence[str]) -> Iterator[Piece]:
    """Within a stage one seed of every setting before the next."""
    for stage in stages:
        for seeds in range(1, num_seeds + 1):
            yield from ((stage, seeds, name) for name in stage.settings if name in settings)


def write_results(folder: Path, settings: Sequence[str], path: Path) -> None:
    """Of the settings that have any."""
    there = [folder / name / "comparison.json" for name in settings]
    path.parent.mkdir(parents=True, exist_ok=True)
    text = markdown.results(
        [read_summary(file) for file in there if file.is_file()], about=_about(),
        again=shlex.join(["python", "benchmarks/package_study.py", *sys.argv[1:]]))
    with files.written_whole(path, "w") as file:
        file.write(text)


if __name__ == "__main__":
    main()
