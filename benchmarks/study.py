"""The comparison on the embedded text: three settings, two sizes of model.

    make compare                                (the smallest of it, some arms: minutes)
    make study                                  (hours on two cores; carried on if killed)
    python benchmarks/study.py --sizes small --settings clean --arms random direct

Text is the Python installation's own. One half of its files trains the models up to the onset of
annealing; the other half is divided by file into pool, validation and test sets. A few passages
occur in files of both halves. Settings:

    clean      docstrings and source code, as many documents of each
    corrupted  the same, a quarter of the documents shuffled token by token
    shifted    mostly source code, while validation and test sets are docstrings
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np

from megatron_direct.comparison.summary import read_summary
from megatron_direct.data import indexed
from megatron_direct.data.mask import SampleMask
from megatron_direct.data.materialize import materialize
from megatron_direct.reports import markdown

ROOT = Path(__file__).resolve().parents[1]
DOMAINS = ("docstrings", "source")
# setting -> (pool that is drawn from, documents of each domain, domains of validation and test)
SETTINGS = {
    "clean": ("clean", (900, 900), DOMAINS),
    "corrupted": ("corrupted", (900, 900), DOMAINS),
    "shifted": ("clean", (180, 1800), DOMAINS[:1]),
}
HELD_OUT = {"valid": 220, "test": 220}  # documents of each domain
NUM_SELECT = 450

# size -> flags of the architecture; 0.24 and 0.53 million parameters
SIZES = {
    "small": ["--num-layers", "2", "--hidden-size", "64"],
    "medium": ["--num-layers", "3", "--hidden-size", "96"],
}
PRETRAIN = ["--train-iters", "500", "--lr", "3e-3"]
GLOBAL_BATCH = 16
# How often, and of the larger model, which takes more time, only the arms that the default of
# `select` has to stand beside.
SEEDS_AND_ARMS = {
    "small": ["--num-seeds", "12"],
    "medium": ["--num-seeds", "5", "--arms", "random", "whole-pool", "oracle", "domain",
               "perplexity-low", "perplexity-middle", "perplexity-high", "gradient-norm",
               "gradient-dot", "gradient-cosine", "gradient-dot-adam", "direct", "flat-energy"],
}
COMPARE = ["--num-select", str(NUM_SELECT), "--lr-wsd-decay-iters", "30", "--sketch-size", "1024",
           "--seed", "1"]


class Study:
    """Everything lies under ``folder``; what is there is not made again."""

    settings = SETTINGS

    def __init__(self, folder: Path, ranks: int):
        self.folder, self.ranks = folder, ranks
        self.tokenizer = folder / "data" / "tokenizer.model"
        self.batch = ["--global-batch-size", str(GLOBAL_BATCH),
                      "--micro-batch-size", str(GLOBAL_BATCH // ranks)]

    def run(self, *command: str | Path, ranks: int = 1) -> None:
        launcher = [sys.executable] if ranks == 1 else [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
            str(ranks)]
        subprocess.run([*launcher, *map(str, command)], check=True, cwd=ROOT,
                       env={**os.environ, "OMP_NUM_THREADS": "1"})

    def prepare(self) -> None:
        """Text and datasets: ``pretrain_DOMAIN_pool``, and pools and held-out sets to draw from."""
        done = self.folder / "data" / ".done"
        if done.is_file():
            return
        for part in ("1", "2"):
            self.run("tools/embedded_text.py", "--output-dir", self.folder / "text" / part,
                     "--part", f"{part}/2", "--max-files", 10**6, "--passage-characters", 420)
        self._preprocess("1", "pretrain", "--split", "100,0,0", "--train-tokenizer",
                         "--vocab-size", "2048")
        for name, fraction in (("clean", "0"), ("corrupted", "0.25")):
            self._preprocess("2", name, "--split", "70,15,15", "--corrupt-fraction", fraction)
        for setting, (source, counts, _) in self.settings.items():
            for domain, count in zip(DOMAINS, counts, strict=True):
                self._draw(f"{source}_{domain}_pool", f"{setting}/{domain}_pool", count)
        for split, count in HELD_OUT.items():
            for domain in DOMAINS:
                self._draw(f"clean_{domain}_{split}", f"{domain}_{split}", count)
        done.touch()

    def _preprocess(self, part: str, name: str, *flags: str) -> None:
        self.run("tools/preprocess_selection.py", "--input",
                 *(self.folder / "text" / part / f"{domain}.jsonl" for domain in DOMAINS),
                 "--group-key", "file", "--tokenizer-model", self.tokenizer, "--append-eod",
                 "--output-prefix", self.folder / "data" / name, *flags)

    def _draw(self, source: str, target: str, count: int) -> None:
        """A dataset of ``count`` documents drawn from another."""
        prefix, output = (str(self.folder / "data" / name) for name in (source, target))
        total = indexed.num_documents(indexed.open_indexed(prefix))
        keep = np.zeros(total, dtype=bool)
        keep[np.random.default_rng(0).choice(total, count, replace=False)] = True
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        for suffix in (".idx", ".bin"):
            Path(output + suffix).unlink(missing_ok=True)
        materialize(prefix, SampleMask(keep, indexed.dataset_digest(prefix)), output)

    def pretrain(self, size: str) -> Path:
        data, theta = self.folder / "data", self.folder / f"theta_{size}"
        self.run("-m", "megatron_direct", "pretrain", "--data-path",
                 "0.4", data / "pretrain_docstrings_pool", "0.6", data / "pretrain_source_pool",
                 "--save", theta, *SIZES[size], *PRETRAIN, *self.batch,
                 ranks=self.ranks)
        return theta

    def compare(self, setting: str, size: str, flags: list[str]) -> Path:
        data, run = self.folder / "data", self.folder / f"{setting}-{size}"
        domains = self.settings[setting][2]
        self.run("-m", "megatron_direct", "compare", "--load", self.folder / f"theta_{size}",
                 "--run-dir", run, "--name", f"{setting} ({size} model)", "--tokenizer-model",
                 self.tokenizer,
                 "--data-path", *(data / setting / f"{domain}_pool" for domain in DOMAINS),
                 "--valid-data-path", *(data / f"{domain}_valid" for domain in domains),
                 "--test-data-path", *(data / f"{domain}_test" for domain in domains),
                 *COMPARE, *self.batch, *SEEDS_AND_ARMS[size], *flags, ranks=self.ranks)
        return run


def _about() -> str:
    """What the settings are, out of this file's own words."""
    text = __doc__[__doc__.index("Text is"):].strip()
    prose, table = text.split("\n\n", 1)
    return f"{prose}\n\n" + "\n".join(
        "- {}: {}".format(*line.split(maxsplit=1)) for line in table.splitlines()) + (
        "\n\nWhat was tried on the way to the default is in [selection.md](selection.md).")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "study")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--ranks", type=int, default=1, help="data-parallel ranks")
    parser.add_argument("--results", type=Path, help="file for the results")
    flags, others = parser.parse_known_args()  # others: flags of megatron-direct compare
    study = Study(flags.folder.resolve(), flags.ranks)
    study.prepare()
    summaries = []
    for size in flags.sizes:
        study.pretrain(size)
        for setting in flags.settings:
            summaries.append(read_summary(study.compare(setting, size, others)
                                          / "comparison.json"))
    if flags.results is not None:
        flags.results.write_text(markdown.results(summaries, again=shlex.join(
            ["python", "benchmarks/study.py", *sys.argv[1:]]), about=_about()))


if __name__ == "__main__":
    main()
