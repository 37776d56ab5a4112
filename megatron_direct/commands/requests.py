"""What commands that select are asked alike, and what depends on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megatron_direct.config import (
    Execution,
    Given,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
)
from megatron_direct.runtime import parallel
from megatron_direct.runtime.manifest import Key
from megatron_direct.selection.auto import require_valid
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.steps import selection_request
from megatron_direct.steps.curvature_config import CurvatureConfig
from megatron_direct.steps.extend import num_drawn_valid, require_can_share
from megatron_direct.steps.measure import MeasureSettings
from megatron_direct.steps.onset import Onset, OnsetConfig, open_onset
from megatron_direct.steps.pilot import PilotConfig
from megatron_direct.steps.sketch import SketchConfig

_Request = TypeVar("_Request", bound="SelectionRequest")
_Key = TypeVar("_Key", bound="LossesKey")


@dataclass(frozen=True, kw_only=True)
class SelectionRequest:
    """How to select. Base of requests, to which each command adds groups of its own."""

    pilot: PilotConfig = field(default_factory=PilotConfig)
    sketch: SketchConfig = field(default_factory=SketchConfig)
    curvature: CurvatureConfig = field(default_factory=CurvatureConfig)
    selection: SelectionConfig = field(default_factory=SelectionConfig)
    layout: ParallelConfig = field(default_factory=ParallelConfig)
    given: Given = field(default_factory=Given)

    @property
    def measure(self) -> MeasureSettings:
        return MeasureSettings(self.pilot, self.sketch, self.curvature)

    def open(self, onset: OnsetConfig, test_data_path: Sequence[str] = (), *,
             trains: bool = True, execution: Execution | None = None) -> Onset:
        """Reads what the flags name; all ranks call this. trains: whether these ranks train.
        execution: of what they train.

        Raises UserError for what cannot be selected there, before any work.
        """
        self.selection.require_number_where_needed()
        opened = open_onset(onset, self.layout, self.given, test_data_path)
        if execution is not None:
            opened = dataclasses.replace(opened, job=dataclasses.replace(
                opened.job, execution=execution))
        opened.job.require_runs_on(parallel.world_size(), trains=trains)
        selection_request.check_number(self.selection, len(opened.pool.usable))
        selection_request.require_quotas(self.selection, opened.pool)
        parallel.on_rank_zero(lambda: opened.valid.sources)  # raises, if it does, before the work
        require_can_share(self.selection, self.sketch, opened)
        if self.selection.is_auto:
            require_valid(num_drawn_valid(self.sketch, opened))
        return opened

    def for_annealing(self: _Request, tokens: int) -> _Request:
        return dataclasses.replace(self, selection=self.selection.for_annealing(tokens))


@dataclass(frozen=True, kw_only=True)
class LossesKey(Key):
    """What the losses of annealings on selections depend on. Base of keys, to which each command
    adds fields of its own. How many samples are computed at once is left at its default."""

    checkpoint_digest: str
    pool_digests: tuple[str, ...]
    valid_digests: tuple[str, ...]
    test_digests: tuple[str, ...]
    lr_wsd_decay_iters: int
    global_batch_size: int
    model: ModelConfig
    optimizer: OptimizerConfig
    pilot: PilotConfig
    sketch: SketchConfig
    curvature: CurvatureConfig
    problem: SelectionConfig
    precision: Precision = field(default_factory=Precision)
    valid_sources_digest: str | None = None

    @classmethod
    def of(cls: type[_Key], onset: Onset, measure: MeasureSettings, problem: SelectionConfig,
           test_digests: Sequence[str], **own: Any) -> _Key:
        job = onset.job
        return cls(
            checkpoint_digest=onset.checkpoint.digest, pool_digests=onset.digests_of(onset.pool),
            valid_digests=onset.digests_of(onset.valid), test_digests=tuple(test_digests),
            global_batch_size=job.batch.global_batch_size, model=job.model,
            optimizer=job.optimizer, pilot=measure.pilot,
            sketch=measure.sketch.without_micro_batch(),
            curvature=measure.curvature, problem=problem, precision=job.precision,
            valid_sources_digest=onset.valid.sources_digest, **own)
