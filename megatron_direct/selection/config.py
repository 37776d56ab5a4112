"""What a user sets of the selection problem."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from numbers import Integral

from megatron_direct.errors import UserError
from megatron_direct.selection.objectives import OBJECTIVES
from megatron_direct.settings import Settings, flag

AUTO = "auto"


def number_or_auto(text: str) -> int | str:
    return text if text == AUTO else int(text)


@dataclass(frozen=True)
class SelectionConfig(Settings):
    """Selection problem."""

    num_select: int | str = flag(
        AUTO, "K, samples to select, or auto: as many as are worth it (docs/selection.md); the "
        "whole pool, where nothing smaller is clearly worth more", type=number_or_auto)
    anneal_tokens: int | None = flag(
        None, "--num-select auto: tokens that the annealing will see; default: as many as the "
        "pools have", type=int, at_least=1)
    max_count: int = flag(
        1, "how often one sample may be selected; above 1 masks hold counts, and a sample with "
        "count 2 comes twice per epoch", at_least=1, at_most=255)
    objective: str = flag(
        "descent", "what the selected samples maximise; flat-energy is the paper's",
        choices=OBJECTIVES)
    flat_subspace: str = flag(
        "complement", "what counts as flat: all that is not stiff, or only the computed directions "
        "after the elbow whose eigenvalues are above zero", choices=("complement", "bulk"))
    stiff_budget_fraction: float = flag(
        0.05, "budget of stiff cost: 0 is the least that K samples can cost, 1 the cost of K "
        "average samples; --objective descent has none unless --stiff-budget is given", at_least=0,
        at_most=1)
    stiff_budget: float | None = flag(
        None, "absolute budget of stiff cost, instead of the fraction", type=float,
        at_least=0, at_most=math.inf)
    step_size: float = flag(
        1.0, "--objective descent: length of the step, in units of 1 / lambda_max (longer steps "
        "are worse on the embedded text: docs/selection.md)", above=0)
    normalize_gradients: bool = flag(
        True, "--objective descent: scale all gradients to equal length")
    contrast: bool = flag(
        True, "--objective descent: judge samples by what the validation gradient has in excess "
        "of the pool's mean gradient, which any data would follow (docs/selection.md)")
    valid_clusters: int = flag(
        8, "--contrast: number of clusters of the validation set, within its datasets, which "
        "bargain for the selection, so that none is left behind; 0: their mean alone counts",
        at_least=0)
    text_weight: float = flag(
        2.0, "--contrast: how much likeness by n-grams, which needs no model, counts beside "
        "gradients: the ratio of their spreads over the pool; 0: not at all", at_least=0)
    weight_by_tokens: bool = flag(
        False, "--objective descent --no-contrast: weight each sample by the tokens that it is "
        "trained on")
    shrinkage_clusters: int = flag(
        8, "--objective descent: number of clusters of the pools towards whose means gradients "
        "are shrunk; 0: no shrinkage", at_least=0)
    kept_deviation: float = flag(
        0.5, "share of a gradient's deviation from its cluster's mean that remains", at_least=0,
        at_most=1)
    draw_unstable: bool = flag(
        True, "--objective descent: what half of the evidence does not select again is drawn at "
        "random within its cluster; not under --quotas, --stiff-budget or --max-count above 1, nor "
        "with fewer than 8 validation samples")
    quotas: tuple = flag(
        (), "smallest and largest number of samples from a pool, as NAME:LEAST:GREATEST; either "
        "may be empty; NAME is the last part of its prefix", nargs="+")
    sketch_rows: str = flag(
        "auto", "where the problem is solved: with all rows on rank 0, or with the rows spread "
        "over the ranks; auto: spread if they take more than a quarter of rank 0's free "
        "memory",
        choices=("auto", "gathered", "spread"))

    @property
    def is_auto(self) -> bool:
        return self.num_select == AUTO

    def for_annealing(self, tokens: int) -> SelectionConfig:
        """With ``tokens`` as those that the annealing sees, where --anneal-tokens says nothing."""
        return self if self.anneal_tokens is not None else dataclasses.replace(
            self, anneal_tokens=tokens)

    def wherever_rows_lie(self) -> SelectionConfig:
        """For keys: where the rows lie while it is solved changes nothing of a selection."""
        return dataclasses.replace(self, sketch_rows=SelectionConfig.sketch_rows)

    @property
    def is_in_contrast(self) -> bool:
        return self.contrast and OBJECTIVES[self.objective].treats_sketches

    @property
    def counts_texts(self) -> bool:
        """Where tokens are known."""
        return self.is_in_contrast and self.text_weight > 0

    def check(self) -> None:
        if self.is_in_contrast and self.weight_by_tokens:
            raise UserError("--weight-by-tokens has no place beside --contrast: samples below the "
                            "pool's average would be selected for being short. Leave it out, or "
                            "add --no-contrast.")
        if not self.is_auto:
            if isinstance(self.num_select, bool) or not isinstance(self.num_select, Integral):
                raise UserError(f"--num-select is {self.num_select!r}: expected a number of "
                                f"samples, or {AUTO}.")
            if self.num_select < 1:
                raise UserError(f"--num-select is {self.num_select}: it must be at least 1.")

    def require_number_where_needed(self) -> None:
        """Raises UserError for auto beside flags that need a number; --objective as it will be."""
        if not self.is_auto:
            return
        if self.quotas:
            raise UserError(f"--quotas needs a number of samples: --num-select {AUTO} may select "
                            "any number of each pool. Give --num-select a number.")
        if not OBJECTIVES[self.objective].treats_sketches:
            raise UserError(f"--num-select {AUTO} is for --objective descent: it judges samples by "
                            f"what they are worth, which --objective {self.objective} does not "
                            "ask. Give --num-select a number.")
