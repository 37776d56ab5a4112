"""What a pass costs on this machine, in this layout: measured on a few layers, and kept.

Layers of one kind cost alike: a model of one layer a stage and one of two are built with random
weights, timed and weighed on random text, and the line through both is followed to the model's own
number of layers. So it takes seconds where a run takes hours. What was measured is kept in a file
and found again by all that it depends on.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from megatron_direct.architecture import ModelConfig, expert_layers
from megatron_direct.config import Job
from megatron_direct.curvature.spectrum import Directions
from megatron_direct.data.samples import PassShape, SampleSource
from megatron_direct.gradients.per_sample import GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import grid, model, passes
from megatron_direct.mcore.shards import parameter_shards
from megatron_direct.runtime import digests, files, host, memory, parallel
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.selection.treatment import select_by_sketches
from megatron_direct.steps.machines import H100, Machine, PassCost, PassSetup
from megatron_direct.steps.model_size import size_of

_ROUNDS = 3  # timings of a pass, of which the median counts
_ROWS = (2000, 6000)  # rows that the solver is timed on


def default_file() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "megatron-direct" / "measured.json"


@dataclass(frozen=True)
class Calibrated:
    """A pass of this model's, and the machine as far as it can be measured in seconds."""

    one_pass: PassCost
    machine: Machine


def measured(job: Job, setup: PassSetup, path: Path) -> Calibrated:
    """From the file, or measured now and added to it; all ranks call this."""
    key = _key(job, setup)

    def known() -> dict[str, Any]:
        return files.read_json(path) if path.is_file() else {}

    found = parallel.on_rank_zero(lambda: known().get(key))
    if found is None:
        parallel.say("measuring what a pass costs here ...")
        of_ranks = parallel.gather_objects((_pass(job, setup), _machine(setup)))
        # The slowest and the largest rank counts: what is measured of the last stage is its head's.
        one_pass = PassCost(**{f.name: max(getattr(one, f.name) for one, _ in of_ranks)
                               for f in dataclasses.fields(PassCost)})
        found = files.as_json(dataclasses.asdict(Calibrated(one_pass, of_ranks[0][1])))
        parallel.on_rank_zero(lambda: files.write_json(path, {**known(), key: found}))
    return Calibrated(PassCost(**found["one_pass"]), Machine(**found["machine"]))


def _key(job: Job, setup: PassSetup) -> str:
    device = torch.cuda.get_device_name() if host.has_gpu() else "cpu"
    settings = files.as_json([dataclasses.asdict(setup), vars(job.model)])
    return digests.digest(socket.gethostname(), device, str(parallel.world_size()),
                          torch.__version__, digests.canonical(settings))


def _machine(setup: PassSetup) -> Machine:
    """Links and storage are not measured: on one machine they are memory."""
    solver = parallel.on_rank_zero(lambda: _solver_rate(setup.sketch_size))
    ranks = parallel.world_size()
    return dataclasses.replace(
        H100, name=socket.gethostname(), elements=1.7e7, solver=solver,
        memory=torch.cuda.mem_get_info()[1] if host.has_gpu() else float(
            psutil.virtual_memory().total) / ranks,
        host_memory=float(psutil.virtual_memory().total), ranks_per_node=ranks, fabric=2e9,
        node_links=2e9, storage=5e8, base=float(memory.resident_bytes()),
        start=parallel.on_rank_zero(lambda: time.time() - psutil.Process().create_time()))


def _pass(job: Job, setup: PassSetup) -> PassCost:
    """Along the line through two numbers of layers, to the model's own."""
    step = setup.layout.pipeline_model_parallel_size * (
        setup.layout.num_layers_per_virtual_pipeline_stage or 1)
    layers = job.model.num_layers
    few = [count for count in (2 * step, step) if count < layers] or [layers]
    points = [_measure(_with_layers(job, count), setup) for count in few]
    if len(points) == 1:
        return points[0]
    two, one = points
    share = (layers - few[1]) / (few[0] - few[1])
    at_all = {f.name: max(getattr(one, f.name), getattr(one, f.name) + share * (
        getattr(two, f.name) - getattr(one, f.name))) for f in dataclasses.fields(PassCost)}
    return PassCost(**at_all)


def _with_layers(job: Job, count: int) -> Job:
    """With the last so many layers, which have experts where any have."""
    changed: dict[str, Any] = {"num_layers": count}
    if job.model.num_experts is not None:
        changed["moe_layer_freq"] = "+".join(
            f"[{int(has_experts)}]" for has_experts in expert_layers(job.model)[-count:])
    return dataclasses.replace(job, model=dataclasses.replace(job.model, **changed))


class _RandomText(SampleSource):
    def __init__(self, count: int, length: int, config: ModelConfig):
        self.num_labels = np.full(count, length, np.int32)
        self._vocab_size = config.known_vocab_size

    def tokens(self, sample: int) -> np.ndarray:
        return np.random.default_rng(sample).integers(
            0, self._vocab_size, int(self.num_labels[sample]) + 1)


def _measure(job: Job, setup: PassSetup) -> PassCost:
    size, stages = setup.micro_batch_size, setup.layout.pipeline_model_parallel_size
    at_once = 1 if stages == 1 else 4 * stages
    found: dict[str, float] = {}
    held = 0

    def run() -> None:
        nonlocal held
        chunks = model.build(job)
        shards = parameter_shards(chunks)
        gradients = GradientModel(chunks, shards, Sketch(shards, setup.sketch_size, 0),
                                  micro_batch_size=size)
        mean, longest = (_RandomText(size * at_once * grid.data_size(), length, job.model)
                         for length in (max(1, round(setup.length)), setup.longest))
        held = memory.peak_bytes(lambda: list(sketch_samples(
            gradients, longest, np.arange(len(longest.num_labels)))))
        busy = at_once / (at_once + stages - 1)
        for name, call in (("sketch", lambda: list(sketch_samples(
                gradients, mean, np.arange(len(mean.num_labels))))),
                ("training", lambda: _train(chunks, mean, size, at_once))):
            found[name] = _seconds(call) / at_once * busy

    with grid.model_parallel(job.layout, job.num_model_chunks):
        whole = memory.peak_bytes(run)
    weights = float(parallel.on_rank_zero(lambda: 0) + _weights_of(job))
    # The larger of what the pass was seen to add, and of all that was there less the weights.
    number = 2 if setup.bf16 else 4
    return PassCost(found["training"], found["sketch"], 0.0, 0.0,
                    float(max(held, whole - number * weights)), weights)


def _weights_of(job: Job) -> float:
    size, layout = size_of(job.model), job.layout
    ranks = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    return size.parameters / ranks


def _train(chunks: Sequence[torch.nn.Module], text: SampleSource, size: int, at_once: int) -> None:
    shape = PassShape(size, at_once, grid.data_rank(), grid.data_size(),
                      count_multiple=chunks[0].config.pipeline_model_parallel_size)  # type: ignore
    for micro_batches in text.passes(np.arange(len(text.num_labels)), shape):
        passes.run_pass(chunks, micro_batches, backward=True)
    for chunk in chunks:
        chunk.zero_grad(set_to_none=True)


def _seconds(call) -> float:
    """The median, until every rank is done, after a first call that does not count."""
    call()
    taken = []
    for _ in range(_ROUNDS):
        parallel.barrier()
        begun = time.perf_counter()
        call()
        if host.has_gpu():
            torch.cuda.synchronize()
        parallel.barrier()
        taken.append(time.perf_counter() - begun)
    return sorted(taken)[_ROUNDS // 2]


def _solver_rate(sketch_size: int) -> float:
    """Entries of rows a second, from what more rows take more."""
    taken = []
    for count in _ROWS:
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((count, sketch_size), np.float32)
        directions = np.linalg.qr(rng.standard_normal((sketch_size, 8)))[0].T
        evidence = Evidence(rows, np.full(count, 100), np.zeros(count, np.int64), 1,
                            np.arange(count), rows[:64] + 1,
                            Directions(np.geomspace(10, 1, 8), directions, 4))
        begun = time.perf_counter()
        select_by_sketches(SelectionConfig(), evidence, count // 4, 0)
        taken.append(time.perf_counter() - begun)
    return (_ROWS[1] - _ROWS[0]) * sketch_size / max(taken[1] - taken[0], 1e-3)
