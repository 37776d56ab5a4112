"""How much could any selection gain? The best mixture of clusters that a direct search finds.

The groups are the clusters of the default's sketches at one seed. Each trial is an annealing on
samples drawn by the shares of a mixture (mixtures.py), judged by its loss on the validation set.
The search begins with the pool as it is, and with the default's own choice. What it finds is an arm
like the others: drawn and annealed anew at each seed, and judged on the test sets, which the search
never saw. So it is what was found, and a bound from below: other samples of the same clusters, or
other clusters, may be better.

    RUN_DIR/ceiling/groups.npz       candidates and their clusters
    RUN_DIR/ceiling/trials.json      shares and validation loss of each annealing, in order
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.comparison.arms import REGISTRY, Arm, Case
from megatron_direct.comparison.mixtures import (
    GroupMixture,
    Trial,
    best,
    draw_by_shares,
    num_annealings,
    search,
)
from megatron_direct.comparison.summary import CEILING
from megatron_direct.runtime import arrays, files, parallel
from megatron_direct.selection import InfeasibleQuotas, InfeasibleSelection
from megatron_direct.selection.worth import cluster_numbers

NAME = CEILING
NUM_ROUNDS = 2
# Seed of the search's batches and draws, after that of the first replicate: none of the arms' own.
_SEED_OFFSET = 10_000

# From a seed and the positions of samples, the validation loss after an annealing; infinite if it
# diverges.
Anneal = Callable[[int, np.ndarray], float]


class NoCeiling(Exception):
    """The search has found no mixture."""


def _choose(case: Case) -> np.ndarray:
    if case.ceiling is None:
        raise NoCeiling("the annealings that the search begins with diverge")
    return draw_by_shares(case.ceiling.mixture, case.ceiling.groups, case.uncut_labels,
                          case.ceiling.num_tokens, case.rng)


REGISTRY[NAME] = Arm(NAME, "clusters in the shares that a direct search over annealings finds best "
                     "for the validation set", _choose, (NAME,))


@dataclass(frozen=True)
class CeilingSearch:
    """Where it is kept, and how long an annealing is."""

    folder: Path
    num_tokens: int

    def completed(self, case: Case | None, anneal: Anneal) -> Case | None:
        """The case, with what the search found, if anything; it carries on where it was. All ranks
        call this.

        case: on rank 0, None elsewhere; anneal: called on all ranks.
        """
        groups, labels, starts, seed = parallel.on_rank_zero(lambda: self._begin(case))

        def loss_of(mixture: np.ndarray) -> float:
            number = next(numbers)
            if number < len(known):
                assert np.allclose(known[number].mixture, mixture), self.folder
                return known[number].loss
            chosen = draw_by_shares(mixture, groups, labels, self.num_tokens,
                                    np.random.default_rng(seed))
            loss = anneal(seed, chosen)
            parallel.on_rank_zero(lambda: self._write(
                known, Trial(mixture, loss), num_annealings(len(mixture), len(starts), NUM_ROUNDS)))
            known.append(Trial(mixture, loss))
            return loss

        known, numbers = parallel.on_rank_zero(self.trials), iter(range(10**9))
        found = best(search(loss_of, starts, NUM_ROUNDS))
        parallel.on_rank_zero(lambda: shutil.rmtree(self.folder / "annealing", ignore_errors=True))
        return case if case is None or np.isinf(found.loss) else dataclasses.replace(
            case, ceiling=GroupMixture(found.mixture, self._groups_of(case), self.num_tokens))

    def trials(self) -> list[Trial]:
        """Those that are finished."""
        path = self.folder / "trials.json"
        found = files.read_json(path) if path.is_file() else []
        return [Trial(np.array(one["mixture"]), one["loss"]) for one in found]

    def _begin(self, case: Case | None) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], int]:
        """(groups, labels, mixtures to begin with, seed), of the first seed that asked (rank 0)."""
        assert case is not None
        path = self.folder / "groups.npz"
        if not path.is_file():
            evidence = case.evidence["select"]
            groups = cluster_numbers(case.config, evidence, case.seed)
            groups = np.unique(groups, return_inverse=True)[1]
            labels = case.uncut_labels.astype(np.float64)
            totals = [np.bincount(groups, labels)]
            with contextlib.suppress(InfeasibleSelection, InfeasibleQuotas):
                chosen = case.select(evidence).indices
                totals.append(np.bincount(groups[chosen], labels[chosen], groups.max() + 1))
            self.folder.mkdir(parents=True, exist_ok=True)
            with files.written_whole(path) as file:
                np.savez(file, numbers=case.numbers, groups=groups, labels=case.uncut_labels,
                         starts=np.stack([total / total.sum() for total in totals]),
                         seed=case.seed + _SEED_OFFSET)
        groups, labels, starts, seed = arrays.read_named(
            path, ["groups", "labels", "starts", "seed"], arrays.MAKE_AGAIN)
        return groups, labels, list(starts), int(seed)

    def _groups_of(self, case: Case) -> np.ndarray:
        """[N] of the candidates of this seed; a sample that the search did not have is of none."""
        numbers, groups = arrays.read_named(self.folder / "groups.npz", ["numbers", "groups"],
                                            arrays.MAKE_AGAIN)
        place = np.searchsorted(numbers, case.numbers).clip(max=len(numbers) - 1)
        return np.where(numbers[place] == case.numbers, groups[place], -1)

    def _write(self, known: list[Trial], trial: Trial, total: int) -> None:
        files.write_json(self.folder / "trials.json", [
            {"mixture": one.mixture.tolist(), "loss": one.loss} for one in (*known, trial)])
        print(f"{NAME}: annealing {len(known) + 1} of {total}, validation loss {trial.loss:.4f}, "
              f"shares {', '.join(f'{share:.3f}' for share in trial.mixture)}", flush=True)
