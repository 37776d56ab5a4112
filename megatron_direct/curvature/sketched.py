"""The Gram operator of sketched validation gradients: (1/M) sum_i S g_i (S g_i)^T.

What the authors' reference code takes for the Hessian. It acts on sketch coordinates [k], not on
parameters; its rank is at most M, the number of validation samples. So its whole spectrum is a
singular value decomposition of the rows, and its elbow is found among all pairs: among the leading
ones alone, all of them would count as stiff where they hold too little. With M below k most "flat"
directions are merely ones that no sample showed.
"""

from __future__ import annotations

import numpy as np

from megatron_direct.curvature.lanczos import Spectrum


class SketchedFisherOperator:
    """rows: [M, k] sketches of validation samples, finite. dimension: k."""

    def __init__(self, rows: np.ndarray):
        self._rows = rows.astype(np.float64)
        self.num_samples, self.dimension = rows.shape

    def spectrum(self) -> Spectrum:
        """All pairs, min(M, k) of them."""
        _, singular, directions = np.linalg.svd(self._rows / np.sqrt(self.num_samples),
                                                full_matrices=False)
        values = singular**2
        return Spectrum(
            eigenvalues=values, eigenvectors=list(directions),
            residuals=np.array([np.linalg.norm(self.matvec(direction) - value * direction)
                                for value, direction in zip(values, directions, strict=True)]),
            num_matvecs=len(values), converged=True, status="converged",
            smallest_ritz=0.0 if len(values) < self.dimension else float(values[-1]),
            num_invariant=0, asymmetry=0.0)

    def matvec(self, vector: np.ndarray) -> np.ndarray:
        return self._rows.T @ (self._rows @ vector) / self.num_samples

    def notes(self) -> list[str]:
        """What M means for what is called flat."""
        sketch_size = self.dimension
        if self.num_samples >= sketch_size:
            return []
        return [f"{self.num_samples} validation samples span at most {self.num_samples} of "
                f"{sketch_size} sketch coordinates, the others count as flat unseen"]
