"""How many samples to keep: annealings on the default's choice, for a grid of lengths and sizes.

    OMP_NUM_THREADS=1 python benchmarks/how_many.py                (an hour on one core; resumable)
    OMP_NUM_THREADS=1 python benchmarks/how_many.py --report       (the table of what is there)

The embedded text and the small model of benchmarks/study.py. For each setting, seed and length of
the annealing (its tokens T as a share of the pool's, P), the default of `select` is annealed at
several K, up to the whole pool. Each outcome is a line of ``losses.jsonl``; what is there is not
run again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from study import COMPARE, DOMAINS, GLOBAL_BATCH, ROOT, Study

from megatron_direct.cli import flags as cli_flags
from megatron_direct.cli import main as cli
from megatron_direct.commands.compare import CompareRequest
from megatron_direct.comparison.arms import Case
from megatron_direct.comparison.measurements import Setting, measured_case
from megatron_direct.comparison.rivals import AVERAGED, CONSTANT_AVERAGED
from megatron_direct.comparison.run_results import mean_test_loss
from megatron_direct.selection.auto import settle, worth_of
from megatron_direct.selection.baselines import random_selection

LENGTHS = (0.33, 1.0, 0.1, 3.0)  # T / P
SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # K / N
# (choice, K / N), at the first length: at random; by worth alone; what does not repeat drawn
# anew; with gradients at the checkpoint, without a pilot; the mean of the weights of the last
# quarter of the annealing, and of the second half at a constant rate.
OTHERS = (("random", 0.25), ("random", 0.5), ("worth", 0.5), ("drawn", 0.5), ("drawn", 0.25),
          ("onset", 0.5), ("averaged", 0.5), ("averaged", 1.0), ("constant", 0.5),
          ("constant", 1.0), ("direct", 0.0625))
RECIPES = {"averaged": AVERAGED, "constant": CONSTANT_AVERAGED}
# As in benchmarks/study.py, of half the size.
SETTINGS = {
    "corrupted": ("corrupted", (450, 450), DOMAINS),
    "clean": ("clean", (450, 450), DOMAINS),
    "shifted": ("clean", (90, 900), DOMAINS[:1]),
    "rare": ("clean", (45, 900), DOMAINS[:1]),
}


@dataclass(frozen=True)
class Cell:
    """One annealing. choice: how the samples are chosen (see :func:`choose`)."""

    seed: int
    length: float
    setting: str
    choice: str
    share: float


def cells(num_seeds: int) -> Iterator[Cell]:
    """In the order in which they are run: the whole grid at one length before the next one."""
    for seed in range(1, num_seeds + 1):
        for length in LENGTHS:
            for setting in SETTINGS:
                for share in SHARES:
                    yield Cell(seed, length, setting, "direct", share)
                if length == LENGTHS[0]:
                    yield from (Cell(seed, length, setting, choice, share)
                                for choice, share in OTHERS)


def choose(case: Case, cell: Cell) -> np.ndarray:
    """Positions among the candidates."""
    count = round(cell.share * len(case.losses))
    if count == len(case.losses):
        return np.arange(count)
    case = dataclasses.replace(case, num_select=count)
    evidence = case.evidence["onset" if cell.choice == "onset" else "select"]
    if cell.choice == "random":
        return random_selection(np.arange(len(case.losses)), count, case.seed)
    if cell.choice == "worth":
        return case.largest(worth_of(case.config, evidence, case.seed).values)
    if cell.choice == "drawn":
        return case.select(evidence, num_select=count).indices
    return case.solve(evidence).indices


class Calibration(Study):
    settings = SETTINGS

    def run_all(self, num_seeds: int) -> None:
        done = {Cell(**line["cell"]) for line in self.lines()}
        open_cases: dict[tuple[str, int], tuple[Setting, Case]] = {}
        for cell in cells(num_seeds):
            if cell in done:
                continue
            where = (cell.setting, cell.seed)
            if where not in open_cases:
                open_cases[where] = self._case(*where)
            self._append(cell, *self._anneal(cell, *open_cases[where]))

    def report(self) -> None:
        """The table of what is there, and what ``--num-select auto`` makes of it.

        Losses are differences from the whole pool's; the rule's is interpolated in log K.
        """
        losses: dict[tuple[str, float, int], dict[float, float]] = {}
        for line in self.lines():
            cell = Cell(**line["cell"])
            if cell.choice == "direct":
                losses.setdefault((cell.setting, cell.length, cell.seed), {})[cell.share] = \
                    line["loss"]
        shares = sorted({share for found in losses.values() for share in found})
        print("| setting | T / P | seed |", *(f"{share:g} |" for share in shares),
              "auto: K / N | loss | regret |")
        for (name, length, seed), found in sorted(losses.items()):
            if not set(SHARES) <= set(found):
                continue
            case = self._case(name, seed)[1]
            evidence = case.evidence["select"]
            worth = worth_of(case.config, evidence, seed)
            settled = settle(case.config, evidence, worth, round(length * worth.weights.sum()),
                             seed)
            share, known = settled.num_select / len(worth.values), sorted(found)
            auto = float(np.interp(np.log(share), np.log(known), [found[s] for s in known]))
            whole = found[1.0]
            print(f"| {name} | {length:g} | {seed} |", *(
                f"{found[s] - whole:+.4f} |" if s in found else "- |" for s in shares),
                f"{share:.2f} | {auto - whole:+.4f} | {auto - min(found.values()):.4f} |")

    def lines(self) -> list[dict]:
        if not self._path.is_file():
            return []
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    @property
    def _path(self) -> Path:
        return self.folder / "losses.jsonl"

    def _append(self, cell: Cell, loss: float, tokens: int, corrupted: int) -> None:
        with open(self._path, "a") as file:
            file.write(json.dumps({"cell": vars(cell), "loss": loss, "tokens": tokens,
                                   "corrupted": corrupted}) + "\n")
        print(cell, f"{loss:.4f}", flush=True)

    def setting(self, name: str) -> Setting:
        from megatron_direct.commands import compare

        data, domains = self.folder / "data", SETTINGS[name][2]
        words = ["compare", "--load", self.folder / "theta_small",
                 "--run-dir", self.folder / name,
                 "--data-path", *(data / name / f"{domain}_pool" for domain in DOMAINS),
                 "--valid-data-path", *(data / f"{domain}_valid" for domain in domains),
                 "--test-data-path", *(data / f"{domain}_test" for domain in domains),
                 *COMPARE, *self.batch]
        found = cli.make_parser(["compare"]).parse_args(list(map(str, words)))
        return compare._setting(cli_flags.request_from(CompareRequest, found))

    def _case(self, name: str, seed: int) -> tuple[Setting, Case]:
        setting = self.setting(name)
        case = measured_case(setting, seed, {"select"})
        assert case is not None
        return setting, case

    def _anneal(self, cell: Cell, setting: Setting, case: Case) -> tuple[float, int, int]:
        """(mean test loss, tokens chosen, shuffled samples chosen)."""
        from megatron_direct.data.blend_plan import Blend
        from megatron_direct.mcore import blend, grid, model
        from megatron_direct.steps.decay import Decay, Recipe, Segment, decay, set_losses
        from megatron_direct.steps.selected import masks_of

        onset, job = setting.onset, setting.onset.job
        positions = choose(case, cell)
        with np.load(setting.seed_folder(cell.seed) / "samples.npz") as arrays:
            chosen = arrays["candidates"][positions]
        labels = onset.pool.num_labels
        batch_tokens = GLOBAL_BATCH * job.model.seq_length
        iterations = max(2, round(cell.length * labels.sum() / batch_tokens))
        folder = self.folder / "annealing"
        shutil.rmtree(folder, ignore_errors=True)
        with grid.model_parallel(job.layout, job.num_model_chunks):
            request = blend.BlendRequest.for_job(job, iterations, cell.seed, folder / "cache",
                                                 onset.checkpoint.tokenizer_digest)
            masks = masks_of(onset.pool, onset.digests_of(onset.pool), chosen)
            dataset, _ = blend.build_blend(Blend(onset.pool.prefixes), masks, request,
                                           blend.BlendRules("keep", 1e6))
            chunks = model.build(job)
            decay(Decay(job, onset.checkpoint, [Segment(0, dataset)], iterations, folder, "",
                        load_optim=onset.checkpoint.has_optimizer,
                        recipe=RECIPES.get(cell.choice, Recipe())), chunks)
            losses = set_losses(chunks, job.model, job.batch, test=setting.config.test_data_path)
        return (mean_test_loss(losses["test"]), int(labels[chosen].sum()),
                int(onset.pool.corrupted[chosen].sum()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "how-many")
    parser.add_argument("--num-seeds", type=int, default=2)
    parser.add_argument("--report", action="store_true", help="only the table of what is there")
    flags = parser.parse_args()
    study = Calibration(flags.folder.resolve(), 1)
    study.prepare()
    if not (study.folder / "theta_small" / ".done").is_file():
        study.pretrain("small")
        (study.folder / "theta_small" / ".done").touch()
    cli.quiet_imports()
    raise SystemExit(cli.run(
        study.report if flags.report else lambda: study.run_all(flags.num_seeds)))


if __name__ == "__main__":
    main()
