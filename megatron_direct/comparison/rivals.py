"""What else a team would do: arms that select by text, by influence and redundancy, and arms that
average weights, with or without a selection."""

from __future__ import annotations

import dataclasses

import numpy as np

from megatron_direct.comparison.arms import REGISTRY, Arm, Case, arm
from megatron_direct.data.ngram_likeness import likeness_of_dsir
from megatron_direct.selection.auto import worth_of
from megatron_direct.selection.distilled import Sketched, draw_share, for_share
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.problem import Selection
from megatron_direct.selection.rows import row_blocks
from megatron_direct.steps.decay import Recipe

# Of the draw: batches in which it goes, so that each knows what the ones before it took.
_ROUNDS = 64
# Damping of the inverse curvature, as a share of the mean eigenvalue of the pairs known.
_DAMPING = 0.1

SHARE = 0.1  # of the candidates that direct-share has gradients of
STABLE_AVERAGED = "stable-averaged"
AVERAGED = Recipe(average=0.25)
# Weight averaging in the place of a decay (WSM: Tian et al. 2025, arXiv 2507.17634).
CONSTANT_AVERAGED = Recipe(final=1.0, average=0.5)
MODERATE_AVERAGED = Recipe(final=0.3, average=0.5)


@arm("ngrams", "text most like the validation set's, by hashed unigrams and bigrams (DSIR)",
     ("text",))
def _ngrams(case: Case) -> np.ndarray:
    texts = case.evidence["onset"].texts
    assert texts is not None
    return case.largest(likeness_of_dsir(texts))


@arm("ngrams-smoothed", "the same with the features and the smoothing by which texts count in "
     "direct", ("text",))
def _ngrams_smoothed(case: Case) -> np.ndarray:
    evidence = case.evidence["onset"]
    assert evidence.texts is not None
    return case.largest(
        evidence.texts.likeness(np.zeros(len(evidence.valid_rows), dtype=np.int64))[0])


@arm("redundancy-draw", "drawn by cosine less likeness to what was drawn before, as OPUS does",
     ("onset",))
def _redundancy_draw(case: Case) -> np.ndarray:
    return drawn_apart(case.evidence["onset"], case.num_select, case.rng)


@arm("influence", "largest inner product with the validation gradient under the inverse of the "
     "sketched Fisher", ("onset",))
def _influence(case: Case) -> np.ndarray:
    return case.largest(influence(case.evidence["onset"]))


@arm("influence-select", "the same with the eigenpairs of --curvature, at the point where select "
     "takes gradients", ("select",))
def _influence_select(case: Case) -> np.ndarray:
    return case.largest(influence(case.evidence["select"]))


@arm("direct-share", "direct by gradients of a tenth of the candidates, extended to the others by "
     "features of their tokens (--sketch-share 0.1)", ("share",))
def _direct_share(case: Case) -> np.ndarray:
    assert case.token_features is not None
    evidence, everyone = case.evidence["select"], np.arange(len(case.losses))
    known = np.isin(everyone, draw_share(everyone, SHARE, case.seed))
    of_share = evidence.of(known)
    config = for_share(case.config, float(known.mean()),
                       float(of_share.labels.sum() / evidence.labels.sum()))
    part = dataclasses.replace(case, config=config, limits={},
                               num_select=max(1, round(float(known.mean()) * case.num_select)))
    chosen = np.zeros(len(of_share.rows), dtype=bool)
    chosen[part.select(of_share).indices] = True
    wanted = round(chosen.mean() * len(everyone)) if config.is_auto else case.num_select
    worth = worth_of(config, of_share, case.seed)
    taken, _ = Sketched(case.token_features(), known, chosen, worth.values, worth.weights).extended(
        wanted, case.seed)
    return np.flatnonzero(taken)


@arm("direct-proxy", "what select selects with these flags at the checkpoint of a smaller model "
     "(--proxy-load)", ("proxy",))
def _direct_proxy(case: Case) -> Selection:
    return case.select(case.evidence["proxy"])


def _averaged(name: str, recipe: Recipe, words: str) -> None:
    """For each way of selecting that averages are compared with: the same, brought to rest in
    another way."""
    for of in ("random", "whole-pool", "direct"):
        REGISTRY[f"{of}-{name}"] = dataclasses.replace(
            REGISTRY[of], name=f"{of}-{name}", description=f"{of}, {words}", recipe=recipe, of=of)


_averaged("averaged", AVERAGED,
          "and the mean of the weights of the last quarter of the annealing")
_averaged("constant-averaged", CONSTANT_AVERAGED,
          "at a constant rate, and the mean of the weights of the second half (as in WSM)")
_averaged("moderate-averaged", MODERATE_AVERAGED,
          "down to 0.3 of the rate, and the mean of the weights of the second half")
REGISTRY[STABLE_AVERAGED] = Arm(
    STABLE_AVERAGED, "not annealed: the mean of the weights of the last quarter of the training's "
    "states (or of those that --at merged takes)", lambda case: np.empty(0, np.int64), recipe=None)


def influence(evidence: Evidence) -> np.ndarray:
    """[N] <unit gradient, (H + lambda I)^-1 g_val>, H from the eigenpairs known and zero elsewhere.

    By Woodbury with V [p, k] their sketches, orthonormal but for the noise of the hash:
    (V^T D V + lambda I)^-1 g = (g - V^T (lambda D^-1 + V V^T)^-1 V g) / lambda.
    """
    directions = evidence.directions
    positive = directions.eigenvalues > 1e-9 * directions.eigenvalues[0]
    values = directions.eigenvalues[positive]
    vectors = directions.sketches[positive].astype(np.float64)
    damping = _DAMPING * float(values.mean())
    target = evidence.valid_rows.astype(np.float64).mean(0)
    inner = np.diag(damping / values) + vectors @ vectors.T
    solved = target - vectors.T @ np.linalg.solve(inner, vectors @ target)
    return _cosines(evidence.rows, solved)


def _cosines(rows: np.ndarray, direction: np.ndarray) -> np.ndarray:
    """[N] of each row with a vector; 0 for a row of zeros."""
    found = np.zeros(len(rows))
    direction = direction / np.linalg.norm(direction)
    for block in row_blocks(len(rows)):
        some = rows[block].astype(np.float64)
        lengths = np.linalg.norm(some, axis=1)
        found[block] = some @ direction / np.where(lengths > 0, lengths, 1.0)
    return found


def drawn_apart(evidence: Evidence, count: int, rng: np.random.Generator) -> np.ndarray:
    """[count] positions, drawn in rounds without replacement.

    The utility of a sample is the cosine u.m of its gradient with the validation set's, less its
    cosine u.r with the mean r of what was drawn before (OPUS, arXiv 2602.05400: a projected utility
    with a penalty on redundancy and a Boltzmann draw). Its temperature is the spread of the
    utilities; a draw is the largest of utility / temperature + Gumbel noise.
    """
    rows = evidence.rows
    utility = _cosines(rows, evidence.valid_rows.astype(np.float64).mean(0))
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    free, total = np.ones(len(rows), dtype=bool), np.zeros(rows.shape[1])
    for part in np.array_split(np.arange(count), min(_ROUNDS, count)):
        likeness = _cosines(rows, total) if total.any() else np.zeros(len(rows))
        scores = utility - likeness
        noise = rng.gumbel(size=len(rows))
        keys = np.where(free, scores / max(float(scores.std()), 1e-12) + noise, -np.inf)
        taken = np.argsort(-keys, kind="stable")[: len(part)]
        free[taken] = False
        total += unit[taken].sum(0, dtype=np.float64)
    return np.flatnonzero(~free)
