"""Where a spectrum divides into stiff and flat.

The *energy* of an operator is the sum of its positive eigenvalues; negative ones count as flat and
have none. The *elbow* is the smallest k* such that the leading k* eigenvalues hold a given share of
the energy,

    lambda_1 + ... + lambda_k*  >=  share * energy,

0.945 in DiReCT (arXiv 2605.31175, section 5.3). Directions 1 to k* are stiff, all others flat.

Lanczos yields the leading pairs only. The energy of the whole operator comes from elsewhere: it is
the trace of a positive semi-definite operator (Gauss-Newton, Fisher), and `positive_trace` of
`density.spectral_density` for any. Without it, the elbow is only relative to the pairs that were
computed; it then grows with their number, and the result says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PAPER_ENERGY_SHARE = 0.945  # DiReCT, section 5.3
# Where all pairs are computed their sum is the trace, up to float32 rounding and Lanczos tolerance.
_ROUNDING = 1e-4


@dataclass(frozen=True)
class Elbow:
    num_stiff: int  # k*, or all positive pairs that were computed, if they do not reach the elbow
    num_computed: int  # pairs among which the elbow was searched
    energy_share: float  # asked for
    held_share: float  # share of the energy in the stiff pairs
    energy: float  # sum of the positive eigenvalues: of all, or of those computed
    whole_operator: bool  # False: energy is that of the computed pairs; no total, or one below it
    reached: bool  # False: the elbow lies beyond the computed pairs

    def __str__(self) -> str:
        held = f"{self.num_stiff} of {self.num_computed} leading pairs hold {self.held_share:.4f}"
        if not self.whole_operator:
            return (
                f"{held} of the energy of the pairs computed; the energy of the whole operator is "
                "not known, and more pairs may move the elbow"
            )
        if not self.reached:
            return (
                f"{held} of the operator's energy: the elbow at {self.energy_share:g} is not "
                "reached, and directions counted as flat hold the rest; compute more pairs"
            )
        return f"{held} of the operator's energy: elbow at {self.energy_share:g}"


def find_elbow(
    eigenvalues: np.ndarray,
    energy_share: float = PAPER_ENERGY_SHARE,
    *,
    total_energy: float | None = None,
) -> Elbow:
    """Count the stiff directions.

    Args:
        eigenvalues: [k] leading eigenvalues, descending, of either sign.
        energy_share: in (0, 1].
        total_energy: energy of the whole operator, where it is known. An estimate below the energy
            of the computed pairs is too low, so it is ignored.

    Raises:
        ValueError: eigenvalues that are empty, not finite or not descending; a bad share or total.
    """
    eigenvalues = np.asarray(eigenvalues, dtype=np.float64)
    if eigenvalues.ndim != 1 or eigenvalues.size == 0:
        raise ValueError(f"eigenvalues must be [k], k >= 1, got shape {eigenvalues.shape}")
    if not np.isfinite(eigenvalues).all() or np.any(np.diff(eigenvalues) > 0):
        raise ValueError("eigenvalues must be finite and descending; sort them")
    if not 0.0 < energy_share <= 1.0:
        raise ValueError(f"energy_share must be in (0, 1], got {energy_share}")
    if total_energy is not None and not (np.isfinite(total_energy) and total_energy >= 0):
        raise ValueError(f"total_energy must be finite and >= 0, got {total_energy}")

    held = np.concatenate([[0.0], np.cumsum(np.maximum(eigenvalues, 0.0))])
    energy = max(held[-1], total_energy or 0.0)
    whole_operator = total_energy is not None and bool(
        total_energy >= (1 - _ROUNDING) * held[-1])
    reached = bool(held[-1] >= energy_share * energy)
    # Where the elbow is not reached this counts the positive pairs: held grows with them only.
    num_stiff = int(np.searchsorted(held, min(energy_share * energy, held[-1])))
    return Elbow(
        num_stiff=num_stiff,
        num_computed=len(eigenvalues),
        energy_share=energy_share,
        held_share=float(held[num_stiff] / energy) if energy > 0 else 1.0,
        energy=float(energy),
        whole_operator=whole_operator,
        reached=reached,
    )


@dataclass(frozen=True)
class Directions:
    """The eigenpairs that were computed, in sketch coordinates; the first num_stiff are stiff.

    eigenvalues: [p], descending; sketches: [p, k], row j is S v_j.
    """

    eigenvalues: np.ndarray
    sketches: np.ndarray
    num_stiff: int
