"""What a selection is asked for: whether the pools can give it, and the key of its answer."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_direct.data import indexed
from megatron_direct.data.samples import Samples
from megatron_direct.errors import NothingFits, UserError
from megatron_direct.runtime.manifest import Key
from megatron_direct.selection import InfeasibleQuotas, InfeasibleSelection
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.quotas import state_quotas
from megatron_direct.selection.share import Share
from megatron_direct.steps.curvature_config import SKETCHED_FISHER, CurvatureConfig
from megatron_direct.steps.measure import Measured
from megatron_direct.steps.sketch import SketchConfig


@dataclass(frozen=True)
class SelectionKey(Key):
    """What a selection depends on. Left at their defaults: where the rows lie while it is solved,
    the tokens of the annealing where the number of samples is given, and products that the
    curvature has none of."""

    pool_digests: tuple[str, ...]
    sketches_digest: str
    spectrum_digest: str
    num_eigenpairs: int
    energy_share: float
    problem: SelectionConfig
    seed: int
    sketch_share: float = 1.0
    valid_sources_digest: str | None = None
    proxy_digest: str | None = None
    max_matvecs: int = CurvatureConfig.max_matvecs


def check_number(config: SelectionConfig, num_usable: int) -> None:
    """Raises UserError if the pool has no sample, or if K is given and is more than it can give."""
    if num_usable == 0:
        raise UserError("the pools have no document of two tokens or more. A selection needs at "
                        "least one; correct --data-path.")
    if not config.is_auto and int(config.num_select) > num_usable * config.max_count:
        times = f" times --max-count {config.max_count}" if config.max_count > 1 else ""
        raise UserError(f"--num-select {config.num_select} must be between 1 and the pool's "
                        f"{num_usable} samples{times}. Give a smaller number, more pools in "
                        "--data-path, or a greater --max-count.")


def check_finite(config: SelectionConfig, num_finite: int) -> None:
    """Raises UserError if no sample has a finite gradient, or if K is given and is more than those
    that have one can give."""
    if num_finite == 0:
        raise UserError("no sample has a finite gradient. Check the checkpoint: its own parameters "
                        "or losses may not be finite.")
    if not config.is_auto and int(config.num_select) > num_finite * config.max_count:
        raise UserError(f"--num-select asks for {config.num_select} of the {num_finite} samples "
                        "that have sketches and finite gradients. Give a smaller number, or check "
                        "the checkpoint.")


def selection_key(config: SelectionConfig, curvature: CurvatureConfig, measured: Measured,
                  sketch: SketchConfig) -> SelectionKey:
    is_sketched = curvature.curvature == SKETCHED_FISHER
    problem = config.wherever_rows_lie()
    if not config.is_auto:
        problem = dataclasses.replace(problem, anneal_tokens=SelectionConfig.anneal_tokens)
    return SelectionKey(tuple(measured.pool.digests), measured.sketches, measured.spectrum,
                        curvature.num_eigenpairs, curvature.energy_share, problem, sketch.seed,
                        sketch.sketch_share, measured.valid.samples.sources_digest,
                        None if measured.proxy is None else measured.proxy.digest,
                        CurvatureConfig.max_matvecs if is_sketched else curvature.max_matvecs)


def parse_quotas(texts: Sequence[str], names: Sequence[str]) -> dict[str, tuple[int, int]]:
    """{name: (least, greatest)}. Raises UserError for one that is not understood."""
    quotas = {}
    for text in texts:
        name, *bounds = text.split(":")
        if name in quotas:
            raise UserError(f"--quotas {text}: {name} has a quota already. Give both of its bounds "
                            "in one.")
        try:
            least, greatest = bounds
            quotas[name] = (int(least or 0),
                            min(int(greatest), sys.maxsize) if greatest else sys.maxsize)
        except ValueError:
            raise UserError(f"--quotas {text} is not NAME:LEAST:GREATEST, two integers of which "
                            "either may be empty. Correct it.") from None
        if name not in names:
            raise UserError(f"--quotas {text}: no pool has the name {name}. The pools are "
                            f"{', '.join(names)}.")
    return quotas


def limits(config: SelectionConfig, samples: Samples, numbers: np.ndarray) -> dict:
    """``--quotas`` as the solver takes them, for these samples; empty if there are none."""
    if not config.quotas:
        return {}
    names = list(indexed.prefix_names(samples.prefixes).values())
    quotas = parse_quotas(config.quotas, names)
    return {"groups": samples.dataset_of(numbers).astype(np.int32),
            "quotas": {_Pool.named(name, names): limit for name, limit in quotas.items()}}


class _Pool(int):
    """The number of a pool, which reads as its name: a number a sample is all that is held."""

    name: str

    @classmethod
    def named(cls, name: str, names: Sequence[str]) -> _Pool:
        pool = cls(list(names).index(name))
        pool.name = name
        return pool

    def __repr__(self) -> str:
        return repr(self.name)


def require_quotas(config: SelectionConfig, samples: Samples) -> None:
    """Raises UserError for ``--quotas`` that no so many samples of the pools can keep."""
    asked = limits(config, samples, samples.usable)
    if asked:
        with in_terms_of_flags():
            stated = state_quotas(**asked, share=Share.of_rank(len(samples.usable)))
            assert stated is not None
            stated.of_selections(int(config.num_select), config.max_count)


@contextlib.contextmanager
def in_terms_of_flags() -> Iterator[None]:
    """NothingFits, which names the flags, in the place of the solver's errors."""
    try:
        yield
    except InfeasibleSelection as error:
        raise NothingFits(
            f"no {error.num_select} samples fit a stiff budget of {error.stiff_budget!r}. Give "
            f"--stiff-budget of at least {error.min_stiff_budget!r}, which is what the cheapest "
            "cost together, a larger --stiff-budget-fraction, or a smaller --num-select."
        ) from error
    except InfeasibleQuotas as error:
        raise NothingFits(f"--quotas: {error}") from error
