"""What a selection is compared with."""

from __future__ import annotations

import numpy as np


def random_selection(candidates: np.ndarray, num_select: int, seed: int) -> np.ndarray:
    """[K] of the candidates, drawn without replacement, ascending."""
    return np.sort(np.random.default_rng(seed).choice(candidates, num_select, replace=False))
