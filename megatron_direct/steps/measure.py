"""What a selection is made of: sketches of pool and validation set, and leading directions."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from megatron_direct.curvature.spectrum import Directions
from megatron_direct.gradients.store import SketchStore
from megatron_direct.runtime import files, parallel
from megatron_direct.selection.distilled import draw_share
from megatron_direct.steps import curvature as curvature_step
from megatron_direct.steps import sketch as sketch_step
from megatron_direct.steps.curvature_config import (
    SKETCHED_FISHER,
    CurvatureConfig,
    layer_spec,
    require_precision,
)
from megatron_direct.steps.eigenpairs import SpectrumKey, known_directions, spectrum_key
from megatron_direct.steps.onset import Onset
from megatron_direct.steps.pass_plan import Drawn
from megatron_direct.steps.pilot import PilotConfig, gradient_point
from megatron_direct.steps.proxy import ProxyLosses
from megatron_direct.steps.sketch import SketchConfig


@dataclass(frozen=True)
class MeasureSettings:
    pilot: PilotConfig
    sketch: SketchConfig
    curvature: CurvatureConfig


@dataclass(frozen=True)
class Measured:
    """pool: the usable samples of it, or the share of them that is sketched; valid: the validation
    samples that were drawn; sketches, spectrum: digests of the keys of what was measured; proxy:
    losses of all usable samples under a smaller model, if one was given."""

    store: SketchStore
    pool: Drawn
    valid: Drawn
    directions: Directions
    sketches: str
    spectrum: str
    proxy: ProxyLosses | None = None


def measure(settings: MeasureSettings, onset: Onset, folder: Path) -> Measured:
    """Measures what is not there yet, into ``folder``; all ranks call this.

    ``seconds.json`` tells what the stages took, unless a part had been done before.
    """
    require_precision(settings.curvature, onset.job.precision)
    clock = _Clock(folder)
    point = gradient_point(settings.pilot, onset, folder, settings.sketch.seed)
    clock.stop("pilot")
    pool = Drawn("pool", onset.pool, draw_share(
        onset.pool.usable, settings.sketch.sketch_share, settings.sketch.seed),
        onset.digests_of(onset.pool))
    valid = Drawn("valid", onset.valid, sketch_step.draw(
        onset.valid.usable, settings.sketch.num_valid_samples, settings.sketch.seed),
        onset.digests_of(onset.valid))
    key = sketch_step.sketches_key(settings.sketch, onset.job, point)
    store = sketch_step.open_store(folder / "sketches", key)
    spectrum = spectrum_key(settings.curvature, key, valid)
    missing = [drawn for drawn in (pool, valid) if sketch_step.num_missing(store, drawn)]
    directions = None if valid in missing else known_directions(
        settings.curvature, spectrum, folder / "curvature")
    if missing or directions is None:
        work = _Work(folder, point, store, missing, valid, spectrum, directions)
        directions = _compute(settings, onset, work, clock)
    clock.write()
    return Measured(store, pool, valid, directions, key.digest(), spectrum.digest())


@dataclass(frozen=True)
class _Work:
    """What is left to do. missing: of whom rows are missing; directions: None if they are, too."""

    folder: Path
    point: sketch_step.GradientPoint
    store: SketchStore
    missing: list[Drawn]
    valid: Drawn
    spectrum: SpectrumKey
    directions: Directions | None


def _compute(settings: MeasureSettings, onset: Onset, work: _Work, clock: _Clock) -> Directions:
    def leading_directions(gradients) -> Directions:
        rows = parallel.on_rank_zero(
            lambda: sketch_step.read_sketches(work.store, work.valid).rows)
        return curvature_step.leading_directions(
            settings.curvature, work.spectrum, work.folder / "curvature", work.valid, rows,
            gradients)

    directions = work.directions
    needs_model = directions is None and settings.curvature.curvature != SKETCHED_FISHER
    if work.missing or needs_model:
        with sketch_step.gradient_model(
                settings.sketch, onset.job, work.point,
                layer_spec(settings.curvature)) as gradients:
            for drawn in work.missing:
                sketch_step.write_sketches(work.store, gradients, drawn)
            clock.stop("sketch")
            if needs_model:
                directions = leading_directions(gradients)
    if directions is None:
        directions = leading_directions(None)
    clock.stop("curvature")
    return directions


class _Clock:
    """Seconds of each stage, of a measuring of which no part had been done before."""

    def __init__(self, folder: Path):
        self._path = folder / "seconds.json"
        parts = (folder / "sketches", folder / "pilot", folder / "merged")
        self._is_new = parallel.on_rank_zero(lambda: not any(part.exists() for part in parts))
        self._seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    def stop(self, stage: str) -> None:
        """The stage ends here, and the next one begins."""
        now = time.perf_counter()
        self._seconds[stage], self._began = now - self._began, now

    def write(self) -> None:
        if self._is_new:
            parallel.on_rank_zero(lambda: files.write_json(self._path, self._seconds))
