"""``megatron-direct plan``: what a selection, and the annealing after it, would take.

On GPUs that need not be there, by the terms of a cost model; or on this machine, by a pass that is
measured in seconds. Nothing is written but what was measured.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_direct.commands.requests import SelectionRequest
from megatron_direct.config import (
    BatchConfig,
    Job,
    OptimizerConfig,
    ParallelConfig,
    Precision,
)
from megatron_direct.errors import UserError
from megatron_direct.runtime import parallel
from megatron_direct.settings import Settings, flag
from megatron_direct.steps import calibrate, estimate
from megatron_direct.steps.cost import RunEstimate, Workload
from megatron_direct.steps.machines import H100
from megatron_direct.steps.model_shapes import MODEL_SHAPES
from megatron_direct.steps.onset import OnsetConfig, open_onset

_MACHINES = {"h100": H100}
HERE = "here"


@dataclass(frozen=True)
class PlanConfig(Settings):
    """Plan."""

    load: str = flag("", "checkpoint at the onset of annealing, whose model is planned for; "
                     "default: that of --shape, and of the flags of the architecture")
    data_path: tuple = flag((), "the pools, with --load; default: --candidates", nargs="+")
    valid_data_path: tuple = flag((), "the validation set, with --load", nargs="+")
    shape: str = flag("8b", "model to plan for, where there is no --load",
                      choices=tuple(MODEL_SHAPES))
    candidates: float = flag(1e8, "samples in the pools, where there is no --load", at_least=1)
    tokens_per_sample: int = flag(
        1024, "mean length of a sample, where there is no --load", at_least=1)
    machine: str = flag("h100", "GPUs of a machine whose terms are known, or the ranks that this "
                        "command was started on (here)", choices=(*_MACHINES, HERE))
    gpus: int = flag(8, "number of GPUs, unless --machine is here", at_least=1)
    lr_wsd_decay_iters: int = flag(
        0, "iterations of the annealing after the selection; 0: the selection alone", at_least=0)
    object_storage_cache_path: str = flag(
        "", "local folder for copies of the indexes of s3:// and msc:// datasets")
    measured_file: str = flag("", "JSON file of what was measured here; default: "
                              "~/.cache/megatron-direct/measured.json")

    def check(self) -> None:
        if bool(self.load) != bool(self.data_path and self.valid_data_path):
            raise UserError("--load, --data-path and --valid-data-path are given together, or "
                            "none of them. Add what is missing.")


@dataclass(frozen=True)
class PlanRequest(SelectionRequest):
    plan: PlanConfig = field(default_factory=PlanConfig)


def plan_run(request: PlanRequest) -> None:
    """All ranks call this."""
    parallel.say(in_words(*estimated(request)))


def estimated(request: PlanRequest) -> tuple[RunEstimate, Job, int, Workload]:
    """(the estimate; of what job, on how many ranks, over what); all ranks call this."""
    config = request.plan
    asked = estimate.Asked(request.pilot, request.sketch, request.curvature, request.selection,
                           config.lr_wsd_decay_iters)
    job, work = _of_files(request) if config.load else _of_shape(request)
    if config.machine == HERE:
        job.layout.require_fits(job.model, parallel.world_size())
        path = Path(config.measured_file) if config.measured_file else calibrate.default_file()
        found = estimate.on_this_machine(job, asked, work, path)
        ranks = parallel.world_size()
    else:
        machine, ranks = _MACHINES[config.machine], config.gpus
        if job.layout == ParallelConfig():
            job = estimate.fastest_layout(machine, ranks, job, asked, work)
        job.layout.require_fits(job.model, ranks)
        found = estimate.on_gpus(machine, ranks, job, asked, work)
    return found, job, ranks, work


def in_words(found: RunEstimate, job: Job, ranks: int, work: Workload) -> str:
    """A table of the stages, and what it comes to."""
    layout = job.layout
    sizes = f"TP {layout.tensor_model_parallel_size}, PP {layout.pipeline_model_parallel_size}"
    if layout.expert_model_parallel_size > 1:
        sizes += f", EP {layout.expert_model_parallel_size}"
    lines = [
        f"{work.candidates:.3g} candidates, {work.tokens:.3g} tokens; {ranks} ranks: {sizes}, "
        f"DP {layout.data_parallel_size(ranks)}; {found.micro_batches} micro-batches a copy "
        "of the model",
        f"{'stage':10s} {'time':>10s} {'limited by':>15s} {'rank GB':>9s} {'node GB':>9s} "
        f"{'sent GB':>9s} {'stored GB':>10s}"]
    for stage in found.stages:
        gigabytes = (stage.device_bytes, stage.host_bytes, stage.sent_bytes, stage.stored_bytes)
        rank, node, sent, stored = (f"{value / 1e9:.1f}" for value in gigabytes)
        lines.append(f"{stage.name:10s} {_duration(stage.seconds):>10s} {stage.limit:>15s} "
                     f"{rank:>9s} {node:>9s} {sent:>9s} {stored:>10s}")
    lines.append(f"in all {_duration(found.seconds)} ({found.seconds / 3600 * ranks:.3g} "
                 f"rank-hours), most of it {found.slowest.name}, limited by "
                 f"{found.slowest.limit}; at most {found.device_bytes / 1e9:.1f} GB a rank")
    if found.host_bytes > found.host_memory:
        largest = max(found.stages, key=lambda stage: stage.host_bytes)
        lines.append(f"{largest.name} needs {found.host_bytes / 1e9:.0f} GB on a node, which has "
                     f"{found.host_memory / 1e9:.0f}: give more nodes, or see docs/scaling.md for "
                     "what to do with so many candidates")
    return "\n".join(lines)


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _of_files(request: PlanRequest) -> tuple[Job, Workload]:
    config = request.plan
    onset = open_onset(
        OnsetConfig(load=config.load, data_path=config.data_path,
                    valid_data_path=config.valid_data_path, run_dir="none",
                    object_storage_cache_path=config.object_storage_cache_path),
        request.layout, request.given)
    most = request.sketch.num_valid_samples or len(onset.valid.usable)
    return onset.job, estimate.workload(onset.pool, min(most, len(onset.valid.usable)),
                                        onset.valid)


def _of_shape(request: PlanRequest) -> tuple[Job, Workload]:
    config = request.plan
    given: dict[str, dict[str, Any]] = {name: dict(group)
                                        for name, group in vars(request.given).items()}
    model = dataclasses.replace(MODEL_SHAPES[config.shape], **given["model"])
    job = Job(model, request.layout, OptimizerConfig(**given["optimizer"]),
              BatchConfig(**{"global_batch_size": 1024, **given["batch"]}),
              Precision(**{"bf16": True, **given["precision"]}))
    length = min(config.tokens_per_sample, model.seq_length)
    valid = request.sketch.num_valid_samples or 256
    return job, Workload(config.candidates, config.candidates * length, valid,
                         float(valid * length))
