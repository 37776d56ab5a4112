"""What a user sets of the curvature, and which operators there are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_direct.config import Precision
from megatron_direct.curvature.fisher import FisherOperator
from megatron_direct.curvature.gauss_newton import GaussNewtonOperator
from megatron_direct.curvature.hessian import HessianOperator
from megatron_direct.curvature.spectrum import PAPER_ENERGY_SHARE
from megatron_direct.errors import UserError
from megatron_direct.settings import Settings, flag

OPERATORS: dict[str, Any] = {"hessian": HessianOperator, "gauss-newton": GaussNewtonOperator,
                             "fisher": FisherOperator}
SKETCHED_FISHER = "sketched-fisher"
EXACT = ("hessian", "gauss-newton")  # with second derivatives of the layers


@dataclass(frozen=True)
class CurvatureConfig(Settings):
    """Curvature."""

    curvature: str = flag(
        SKETCHED_FISHER, "operator whose leading directions are the stiff ones; sketched-fisher "
        "is computed from the validation set's sketches and needs no further pass",
        choices=(*OPERATORS, SKETCHED_FISHER))
    num_eigenpairs: int = flag(
        64, "leading eigenpairs to compute; those up to the elbow are stiff; sketched-fisher "
        "has all of its pairs, and uses so many, or all up to the elbow", at_least=1)
    energy_share: float = flag(
        PAPER_ENERGY_SHARE, "share of the energy that the stiff directions hold", above=0,
        at_most=1)
    lanczos_tol: float = flag(
        1e-3, "residual of an eigenpair, relative to the largest eigenvalue, that stops Lanczos",
        above=0, below=1)
    max_matvecs: int = flag(200, "largest number of operator products of Lanczos", at_least=2)
    num_curvature_samples: int = flag(
        0, "largest number of validation samples in operator products; 0: all",
        at_least=0)
    density_samples: int = flag(
        0, "random vectors for the spectral density and the trace, at least 2; 0: none, and "
        "the elbow of --curvature hessian and gauss-newton is found among the computed pairs",
        at_least=0)
    density_steps: int = flag(16, "Lanczos steps from each of the random vectors", at_least=2)

    def check(self) -> None:
        if self.density_samples == 1:
            raise UserError("--density-samples is 1: it must be 0, or at least 2 for an estimate "
                            "with a standard error.")


def layer_spec(config: CurvatureConfig) -> str | None:
    """Of the layers that its products can be taken of; None: any that the job has."""
    return "local" if config.curvature in EXACT else None


def require_precision(config: CurvatureConfig, precision: Precision) -> None:
    """Raises UserError for exact products of a model in bfloat16, before any work."""
    if precision.bf16 and config.curvature in EXACT:
        raise UserError(
            f"--curvature {config.curvature} needs float32: its products are exact, which they "
            "would not be with bfloat16 weights and activations. Add --no-bf16, or use "
            "--curvature fisher.")
