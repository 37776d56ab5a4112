"""The estimate of a run: of `select`, and of the annealing after it, stage by stage."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.config import Job, ParallelConfig
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.runtime import host, parallel
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.steps import calibrate, cost
from megatron_direct.steps.cost import RunEstimate, Site, Training, Workload
from megatron_direct.steps.curvature_config import CurvatureConfig
from megatron_direct.steps.machines import Machine, PassSetup, pass_cost, with_prediction_heads
from megatron_direct.steps.model_size import size_of
from megatron_direct.steps.pilot import PilotConfig
from megatron_direct.steps.sketch import SketchConfig

# Of a device's memory, what a plan may fill: the rest is the allocator's, and NCCL's.
_FILLED = 0.9


@dataclass(frozen=True)
class Asked:
    """What a run is to do; anneal_iters: of the annealing after the selection, 0 for none."""

    pilot: PilotConfig
    sketch: SketchConfig
    curvature: CurvatureConfig
    selection: SelectionConfig
    anneal_iters: int = 0


def workload(pool: Samples, num_valid: int, valid: Samples) -> Workload:
    """Of pools and a validation set that are there, of which ``num_valid`` samples are used."""
    share = num_valid / max(1, len(valid.usable))
    return Workload(len(pool.usable), float(pool.num_labels.sum(dtype=np.int64)), num_valid,
                    share * float(valid.num_labels.sum(dtype=np.int64)),
                    float(valid.num_labels.max(initial=0)))


def on_this_machine(job: Job, asked: Asked, work: Workload, path: Path) -> RunEstimate:
    """By a pass that is measured here, or was; path: of what was. All ranks call this."""
    setup = _setup(job, asked, work)
    measured = calibrate.measured(job, setup, path)
    site = Site(measured.machine, parallel.world_size(), job.layout, measured.one_pass,
                setup.micro_batch_size, job.precision.bf16, size_of(job.model).columns)
    found = _estimate(site, job, asked, work)
    return found if host.has_gpu() else _in_processes(found, site)


def _in_processes(found: RunEstimate, site: Site) -> RunEstimate:
    """Without GPUs a rank's process holds all: device_bytes is what the largest comes to."""
    base = site.machine.base
    return dataclasses.replace(found, stages=tuple(dataclasses.replace(
        stage, device_bytes=stage.device_bytes + stage.host_bytes - base * (site.ranks_of_node - 1),
        host_bytes=stage.host_bytes + stage.device_bytes * site.ranks_of_node)
        for stage in found.stages))


def on_gpus(machine: Machine, ranks: int, job: Job, asked: Asked, work: Workload) -> RunEstimate:
    """By the terms of a machine, on so many of its GPUs in the job's layout."""
    size = size_of(job.model)
    setup = _setup(job, asked, work)
    site = Site(machine, ranks, job.layout, pass_cost(machine, size, setup),
                setup.micro_batch_size, job.precision.bf16, size.columns)
    return _estimate(site, job, asked, work)


def fastest_layout(machine: Machine, ranks: int, job: Job, asked: Asked, work: Workload) -> Job:
    """The job in the layout that fits the memory and takes the least time.

    Raises UserError where none fits.
    """
    best, shortest, least = None, float("inf"), float("inf")
    for layout in _layouts(job, ranks, machine.ranks_per_node):
        tried = dataclasses.replace(job, layout=layout)
        found = on_gpus(machine, ranks, tried, asked, work)
        least = min(least, found.device_bytes)
        if found.device_bytes <= _FILLED * machine.memory and found.seconds < shortest:
            best, shortest = tried, found.seconds
    if best is None:
        raise UserError(
            f"no layout of {ranks} GPUs holds the model: in the best a GPU needs "
            f"{least / 1e9:.0f} GB, and {_FILLED * machine.memory / 1e9:.0f} of its "
            f"{machine.memory / 1e9:.0f} are planned with. Give more --gpus, a smaller "
            "--micro-batch-size, or --use-distributed-optimizer.")
    return best


def _layouts(job: Job, ranks: int, ranks_per_node: int) -> Iterator[ParallelConfig]:
    model = job.model
    experts = [size for size in (1, 8, 16, 32, 64) if size == 1 or (
        model.num_experts and model.num_experts % size == 0)]
    for stages in (size for size in (1, 2, 4, 8, 16, 32) if model.num_layers % size == 0):
        for expert in experts:
            for tensor in (1, 2, 4, 8):
                layout = dataclasses.replace(
                    job.layout, tensor_model_parallel_size=tensor,
                    pipeline_model_parallel_size=stages, sequence_parallel=tensor > 1,
                    expert_model_parallel_size=expert)
                if tensor > ranks_per_node or tensor * stages > ranks:
                    continue
                try:
                    layout.require_fits(model, ranks)
                except UserError:
                    continue
                yield layout


def _setup(job: Job, asked: Asked, work: Workload) -> PassSetup:
    limits, seq_length = asked.sketch.micro_batch, job.model.seq_length
    length = round(work.tokens / max(1, work.candidates), 1)
    rows = limits.rows(math.ceil(length))
    # Of the fullest micro-batch: the longest samples are fewer where tokens are limited.
    fullest = max(limits.rows(seq_length) * seq_length, min(limits.tokens, rows * seq_length))
    return PassSetup(job.layout, rows, length, fullest // rows, job.precision.bf16,
                     asked.sketch.sketch_size)


def _estimate(site: Site, job: Job, asked: Asked, work: Workload) -> RunEstimate:
    micro_batch_tokens = site.micro_batch_size * work.tokens / max(1, work.candidates)
    trains = dataclasses.replace(
        site, one_pass=with_prediction_heads(site.one_pass, job.model, job.layout))

    def trained(name: str, iterations: int):
        batch = job.batch
        return cost.training_stage(
            trains, name, Training(iterations,
                                   float(batch.global_batch_size * job.model.seq_length)),
            batch, job.optimizer.use_distributed_optimizer, micro_batch_tokens)

    stages = [cost.start_stage(site)]
    if asked.pilot.has_pilot:
        stages.append(trained("pilot", asked.pilot.pilot_iters))
    share = asked.sketch.sketch_share
    sketched = dataclasses.replace(work, candidates=share * work.candidates,
                                   tokens=share * work.tokens)
    stages += [cost.sketch_stage(site, asked.sketch, sketched),
               cost.curvature_stage(site, asked.curvature, asked.sketch, work),
               cost.solve_stage(site, asked.selection, asked.sketch, sketched),
               cost.mask_stage(site, work)]
    if asked.anneal_iters:
        stages.append(trained("anneal", asked.anneal_iters))
    micro_batches = -(-int(sketched.candidates) // (site.micro_batch_size * site.copies))
    return RunEstimate(tuple(stages), micro_batches, site.machine.host_memory)
