"""What a selection is compared with."""

from __future__ import annotations

import numpy as np


def random_selection(candidates: np.ndarray, num_select: int, seed: int) -> np.ndarray:
    """[K] of the candidates, ascending, drawn without replacement; where K is more than there are,
    all of them as often as that goes, and the rest drawn."""
    times, rest = divmod(num_select, len(candidates))
    drawn = np.random.default_rng(seed).choice(candidates, rest, replace=False)
    return np.sort(np.concatenate([*[candidates] * times, drawn]))
