"""What a pass costs on this machine, in this layout: measured on a few layers, and kept.

Layers of one kind cost alike: a model of one layer a stage and one of three are built with random
weights, timed and weighed on random text, and the line through both is followed to the model's own
number of layers. So it takes seconds where a run takes hours. What was measured is kept in a file
and found again by all that it depends on.

A rank of one thread on a CPU is timed by what it works itself: other work on the machine does not
count, nor does waiting for other ranks. So the estimate is that of a run on cores of its own.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from megatron_direct.architecture import ModelConfig
from megatron_direct.config import Job
from megatron_direct.curvature.spectrum import Directions
from megatron_direct.data.samples import MicroBatchLimits, PassShape, SampleSource
from megatron_direct.gradients.hashes import HASH_VERSION
from megatron_direct.gradients.per_sample import GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import grid, model, passes
from megatron_direct.mcore.shards import parameter_shards
from megatron_direct.runtime import digests, files, host, memory, parallel
from megatron_direct.runtime.run_directory import versions
from megatron_direct.selection.choice import choose
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.selection.evidence import Evidence
from megatron_direct.steps.machines import H100, Machine, PassCost, PassSetup
from megatron_direct.steps.model_size import size_of, with_last_layers

_ROUNDS = 3  # timings of a pass, of which the median counts
_APART = 3  # layers a stage of the larger model over those of the smaller one
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
        machine = _machine()  # as long as nothing has been built
        one_pass = _pass(job, setup)
        solver = parallel.on_rank_zero(lambda: _solver_rate(setup.sketch_size))
        of_ranks = parallel.gather_objects(
            (one_pass, dataclasses.replace(machine, solver=solver)))
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
                          str(torch.get_num_threads()), digests.canonical(versions()),
                          str(HASH_VERSION), digests.canonical(settings))


def _machine() -> Machine:
    """Links and storage are not measured: on one machine they are memory."""
    ranks = parallel.world_size()
    cores = len(os.sched_getaffinity(0))
    return dataclasses.replace(
        H100, name=socket.gethostname(), elements=1.7e7,
        memory=torch.cuda.mem_get_info()[1] if host.has_gpu() else float(
            psutil.virtual_memory().total) / ranks,
        host_memory=float(psutil.virtual_memory().total), ranks_per_node=ranks, fabric=2e9,
        node_links=2e9, storage=5e8, base=float(memory.resident_bytes()),
        start=time.process_time() if _works_alone()
        else parallel.on_rank_zero(lambda: time.time() - psutil.Process().create_time()),
        cores_per_rank=min(1.0, cores / ranks) if _works_alone() else 1.0)


def _works_alone() -> bool:
    """Whether this rank's own work is all that its time goes into, but for waiting."""
    return not host.has_gpu() and torch.get_num_threads() == 1


def _pass(job: Job, setup: PassSetup) -> PassCost:
    """Along the line through two numbers of layers, to the model's own."""
    step = setup.layout.pipeline_model_parallel_size * (
        setup.layout.num_layers_per_virtual_pipeline_stage or 1)
    layers = job.model.num_layers
    if layers <= _APART * step:
        return _measure(job, setup)
    more, one = (_measure(dataclasses.replace(job, model=with_last_layers(job.model, count)), setup)
                 for count in (_APART * step, step))
    share = (layers - step) / ((_APART - 1) * step)
    at_all = {f.name: max(getattr(one, f.name), getattr(one, f.name) + share * (
        getattr(more, f.name) - getattr(one, f.name))) for f in dataclasses.fields(PassCost)}
    return PassCost(**at_all)


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
    # Of what was timed, the share that a stage worked.
    busy = 1.0 if _works_alone() else at_once / (at_once + stages - 1)
    with grid.model_parallel(job.layout, job.num_model_chunks):
        longest, mean = (_RandomText(size * at_once * grid.data_size(), length, job.model)
                         for length in (setup.longest, max(1, round(setup.length))))
        built: list[GradientModel] = []

        def sketch(text: SampleSource) -> None:
            for _ in sketch_samples(built[0], text, np.arange(len(text.num_labels))):
                pass

        def build_and_sketch() -> None:
            built.append(_gradient_model(job, setup))
            sketch(longest)

        # Together: on a CPU a pass would else find room in what building it has left.
        peak = memory.peak_bytes(build_and_sketch)
        chunks = built[0].chunks
        sketching, training = (_seconds(call) / at_once * busy for call in (
            lambda: sketch(mean), lambda: _train(chunks, mean, size, at_once)))
    weights = _weights_of(job)
    held = peak - (2 if setup.bf16 else 4) * weights
    return PassCost(training, sketching, 0.0, 0.0, held, weights)


def _gradient_model(job: Job, setup: PassSetup) -> GradientModel:
    chunks = model.build(job.of_main_loss)
    shards = parameter_shards(chunks)
    return GradientModel(chunks, shards, Sketch(shards, setup.sketch_size, 0),
                         micro_batch=MicroBatchLimits(setup.micro_batch_size))


def _weights_of(job: Job) -> float:
    size, layout = size_of(job.model), job.layout
    ranks = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
    return size.parameters / ranks


def _train(chunks: Sequence[torch.nn.Module], text: SampleSource, size: int, at_once: int) -> None:
    config: Any = chunks[0].config
    shape = PassShape(
        MicroBatchLimits(size), at_once, grid.data_rank(), grid.data_size(),
        count_multiple=config.pipeline_model_parallel_size,
        length_multiple=config.tensor_model_parallel_size if config.sequence_parallel else 1)
    for micro_batches in text.passes(np.arange(len(text.num_labels)), shape):
        passes.run_pass(chunks, micro_batches, backward=True)
    for chunk in chunks:
        chunk.zero_grad(set_to_none=True)


def _clock() -> float:
    return time.process_time() if _works_alone() else time.perf_counter()


def _seconds(call: Callable[[], object]) -> float:
    """The median, until every rank is done, after a first call that does not count."""
    call()
    taken = []
    for _ in range(_ROUNDS):
        parallel.barrier()
        begun = _clock()
        call()
        if host.has_gpu():
            torch.cuda.synchronize()
        parallel.barrier()
        taken.append(_clock() - begun)
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
        begun = _clock()
        choose(SelectionConfig(num_select=count // 4), evidence, 0, {})
        taken.append(_clock() - begun)
    return (_ROWS[1] - _ROWS[0]) * sketch_size / max(taken[1] - taken[0], 1e-3)
