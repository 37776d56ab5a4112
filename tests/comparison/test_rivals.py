"""Arms that other teams would try: draws apart, averages."""

from __future__ import annotations

import numpy as np

from megatron_direct.comparison.arms import REGISTRY
from megatron_direct.comparison.rivals import drawn_apart
from megatron_direct.curvature.spectrum import Directions
from megatron_direct.selection.evidence import Evidence


def _evidence(rows: np.ndarray, target: np.ndarray) -> Evidence:
    count, size = rows.shape
    return Evidence(rows.astype(np.float32), np.full(count, 9), np.zeros(count, np.int64), 1,
                    np.arange(count), np.tile(target, (3, 1)).astype(np.float32),
                    Directions(np.ones(1), np.eye(1, size), 1))


def test_the_draw_avoids_what_it_has_and_what_does_not_help():
    """Two kinds that help alike, one of them in four fifths of the pool, and one that harms."""
    rng = np.random.default_rng(0)
    kinds = np.eye(3, 64)
    kind = np.repeat([0, 1, 2], [160, 40, 100])
    target = kinds[0] + kinds[1] - kinds[2]
    rows = kinds[kind] + 0.03 * rng.standard_normal((300, 64))
    counts = np.zeros(3)
    for seed in range(20):
        chosen = drawn_apart(_evidence(rows, target), 60, np.random.default_rng(seed))
        assert len(np.unique(chosen)) == 60
        counts += np.bincount(kind[chosen], minlength=3) / 20
    # In proportion it would be 48 and 12 of what helps; 20 each if all kinds were alike.
    assert counts[1] > 18 and counts[2] < 12


def test_averaged_arms_select_as_those_that_they_are_named_after():
    for name in ("random", "whole-pool", "direct"):
        for suffix, final in (("averaged", None), ("constant-averaged", 1.0),
                              ("moderate-averaged", 0.3)):
            arm = REGISTRY[f"{name}-{suffix}"]
            assert (arm.of, arm.needs) == (name, REGISTRY[name].needs)
            assert arm.choose is REGISTRY[name].choose
            assert arm.recipe.average > 0 and arm.recipe.final == final
            assert REGISTRY[name].recipe == type(arm.recipe)()
    assert REGISTRY["stable-averaged"].recipe is None
