"""A selection among a share of the samples, carried over to the others: ``--sketch-share``.

The problem is solved among the samples that have sketches, for the same share of the samples to
select and of the annealing's tokens; then features of tokens, and a smaller model's losses if there
are any, say which of the others go with it (selection/distilled.py).
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass

import numpy as np

from megatron_direct.data.token_features import TokenSource, token_features
from megatron_direct.errors import UserError
from megatron_direct.runtime import parallel
from megatron_direct.selection.auto import FEWEST_VALID
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.distilled import Distilled, Sketched, draw_share, for_share
from megatron_direct.selection.objectives import OBJECTIVES
from megatron_direct.selection.worth import Worth
from megatron_direct.steps.domains import FoundGroups
from megatron_direct.steps.measure import Measured
from megatron_direct.steps.onset import Onset
from megatron_direct.steps.sketch import SketchConfig

# Samples with sketches: fewer say nothing of a few hundred features, whatever their strength.
FEWEST_SKETCHED = 50


def num_drawn_valid(sketch: SketchConfig, onset: Onset) -> int:
    """Samples of the validation set that are drawn, before any gradient is known to be finite."""
    return min(len(onset.valid.usable), sketch.num_valid_samples or sys.maxsize)


def require_can_share(config: SelectionConfig, sketch: SketchConfig, onset: Onset) -> None:
    """Raises UserError where ``--sketch-share`` cannot keep what other flags ask for."""
    share, pool = sketch.sketch_share, onset.pool
    if share == 1:
        return
    count = len(draw_share(pool.usable, share, sketch.seed))
    num_valid = num_drawn_valid(sketch, onset)
    if count < FEWEST_SKETCHED:
        raise UserError(f"--sketch-share {share:g} takes gradients of {count} of the pools' "
                        f"{len(pool.usable)} samples: expected at least {FEWEST_SKETCHED}. Give "
                        f"{min(1.0, FEWEST_SKETCHED / max(1, len(pool.usable))):.2g} or more.")
    if num_valid < FEWEST_VALID:
        raise UserError(f"--sketch-share judges its predictions by worth, which takes "
                        f"{FEWEST_VALID} validation samples: there are {num_valid}. Give more "
                        "validation data, or leave the flag out.")
    refused = {"--quotas": bool(config.quotas), "--max-count": config.max_count > 1,
               "--stiff-budget": config.stiff_budget is not None,
               f"--objective {config.objective}": not OBJECTIVES[config.objective].treats_sketches}
    for flag_given in (name for name, given in refused.items() if given):
        raise UserError(f"{flag_given} cannot be kept with --sketch-share: most samples have no "
                        "gradient to judge by. Leave one of the two out.")


def is_share(measured: Measured) -> bool:
    return len(measured.pool.numbers) < len(measured.pool.samples.usable)


def problem_of_share(config: SelectionConfig, measured: Measured) -> SelectionConfig:
    """What is solved among the samples that have sketches; the problem itself if all have."""
    if not is_share(measured):
        return config
    samples, numbers = measured.pool.samples, measured.pool.numbers
    return for_share(config, len(numbers) / len(samples.usable), float(
        samples.num_labels[numbers].sum() / samples.num_labels[samples.usable].sum()))


@dataclass(frozen=True, eq=False)
class Extended:
    """Of all candidates: [N] sample numbers; how often each is selected; groups."""

    candidates: np.ndarray
    counts: np.ndarray
    domains: FoundGroups
    distilled: Distilled


@dataclass(frozen=True, eq=False)
class SolvedShare:
    """candidates: [n] numbers of the samples that have finite sketches; chosen: [n] bool;
    not_finite: numbers of those that have others; domains: groups among the candidates."""

    candidates: np.ndarray
    chosen: np.ndarray
    not_finite: np.ndarray
    worth: Worth
    domains: FoundGroups

    def extend(self, config: SelectionConfig, measured: Measured, seed: int) -> Extended:
        """To all samples (rank 0). config: the problem for all of them.

        Clusters are of gradients, and so of some samples alone: no blend is made of them.
        """
        pool, valid = measured.pool, measured.valid
        everyone = np.setdiff1d(pool.samples.usable, self.not_finite)
        share = self.chosen.mean()
        wanted = round(share * len(everyone)) if config.is_auto else int(config.num_select)
        losses = None if measured.proxy is None else measured.proxy.of(everyone)
        unknown = 0 if losses is None else int((~np.isfinite(losses)).sum())
        if unknown:
            parallel.say(f"--proxy-load: {unknown} of {len(everyone)} samples have no finite loss, "
                         "and count as the mean of their dataset")
        features = token_features(TokenSource(pool.samples, everyone),
                                  TokenSource(valid.samples, valid.numbers), seed, losses)
        taken, distilled = Sketched(
            features, np.isin(everyone, self.candidates), self.chosen, self.worth.values,
            self.worth.weights).extended(min(wanted, len(everyone)), seed)
        domains = dataclasses.replace(
            self.domains, of_domain=pool.samples.dataset_of(everyone), of_cluster=None,
            worth_of_clusters=[], typical=[])
        return Extended(everyone, taken.astype(np.int64), domains, distilled)
