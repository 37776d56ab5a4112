"""What `select` and `anneal` will take: time, memory and bytes moved of each stage.

A stage's time is the sum of its terms (a pass waits for its messages, and storage for both); the
largest term is what limits it. All figures are estimates: docs/scaling.md compares them with runs.

Shapes: N candidates of T tokens in all, M validation samples, k sketch coordinates, P parameters
of a rank; D copies of the model (data-parallel ranks).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_direct.config import BatchConfig, ParallelConfig
from megatron_direct.data.ngram_hashes import BYTES_OF_TEXT
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.steps.curvature_config import SKETCHED_FISHER, CurvatureConfig
from megatron_direct.steps.machines import Machine, PassCost
from megatron_direct.steps.sketch import SketchConfig

# Time of a curvature product over that of a training pass (benchmarks/RESULTS.md), and its memory.
_PRODUCTS = {"hessian": (2.68, 1.93), "gauss-newton": (1.67, 1.59), "fisher": (2.02, 1.15)}
# Of inputs and outputs of the linear layers, what is kept from one product to the next, where a
# quarter of the memory has room for it (curvature/kept.py).
_KEPT = {"hessian": 1.0, "gauss-newton": 0.5, "fisher": 0.0}
# Products that Lanczos takes for an eigenpair, and besides: fitted to runs with 4 to 64 pairs.
_PRODUCTS_PER_PAIR, _PRODUCTS_BESIDES = 2.0, 10
# Copies of the rows that a rank holds while it solves: as read, those that may be selected, and
# either of length one, while clusters are found, or treated.
_COPIES_OF_ROWS = 3
# Vectors of float64 over all candidates that the rank which leads the solve holds at its peak: 96
# were measured on one rank, by tracemalloc (tests/selection/test_worth.py). Each of the others
# knows what all candidates are worth: the 64 alignments in float32, and what is made of them.
_LEADER_VECTORS, _OTHER_VECTORS = 96, 48
# To hash a token's n-grams on a core, and to compare them with 8 groups of validation samples: all
# of these, and either half.
_SECONDS_A_TOKEN_OF_TEXT = 4e-7
# The term of a stage in which a rank does nothing.
WAITING = "other ranks"
# Bytes a parameter in training: weight, gradient, and main parameter and moments of Adam.
_TRAINED_BF16, _TRAINED_FP32, _OPTIMIZER = 2 + 4, 4 + 4, {True: 12, False: 8}
# Bytes a candidate that a node's ranks share or hold while planning (make bench-scale).
_PLANNED_BYTES = 30


@dataclass(frozen=True)
class Workload:
    """candidates: N; tokens: T, as cut at the sequence length; valid_samples: M; valid_tokens: of
    these; valid_longest: tokens of the longest of these, 0 where all are equally long."""

    candidates: float
    tokens: float
    valid_samples: int
    valid_tokens: float
    valid_longest: float = 0.0

    def padded_valid_tokens(self, samples: float, micro_batches: float) -> float:
        """Of so many validation samples, sorted by length into so many micro-batches, each of which
        is as wide as its longest sample: exact for lengths that are spread evenly."""
        mean = self.valid_tokens / self.valid_samples
        return samples * (mean + max(0.0, self.valid_longest - mean) / micro_batches)


@dataclass(frozen=True)
class Training:
    """A pilot or an annealing: iterations of batches of ``batch_tokens`` tokens."""

    iterations: int
    batch_tokens: float
    load_optim: bool = True


@dataclass(frozen=True)
class Term:
    name: str
    seconds: float


@dataclass(frozen=True)
class StageCost:
    """terms: that add up to its time; device_bytes: of a rank's device at its peak; host_bytes: of
    a node; sent_bytes: by a rank to others; stored_bytes: written to the run directory."""

    name: str
    terms: tuple[Term, ...]
    device_bytes: float = 0.0
    host_bytes: float = 0.0
    sent_bytes: float = 0.0
    stored_bytes: float = 0.0

    @property
    def seconds(self) -> float:
        return sum(term.seconds for term in self.terms)

    @property
    def worked(self) -> float:
        """Seconds without those in which a rank waits for others."""
        return sum(term.seconds for term in self.terms if term.name != WAITING)

    @property
    def limit(self) -> str:
        """What most of its time goes into."""
        return max(self.terms, key=lambda term: term.seconds).name


@dataclass(frozen=True)
class RunEstimate:
    """micro_batches: of each copy of the model, for the sketches; host_memory: that a node has."""

    stages: tuple[StageCost, ...]
    micro_batches: int
    host_memory: float

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def device_bytes(self) -> float:
        return max(stage.device_bytes for stage in self.stages)

    @property
    def host_bytes(self) -> float:
        return max(stage.host_bytes for stage in self.stages)

    @property
    def slowest(self) -> StageCost:
        return max(self.stages, key=lambda stage: stage.seconds)


@dataclass(frozen=True)
class Site:
    """Where a run takes place: the machine, its ranks and their layout, what a pass costs there.

    columns: outputs and inputs of the whole model's linear layers that a token passes.
    """

    machine: Machine
    ranks: int
    layout: ParallelConfig
    one_pass: PassCost
    micro_batch_size: int
    bf16: bool
    columns: int

    @property
    def copies(self) -> int:
        return self.layout.data_parallel_size(self.ranks)

    @property
    def ranks_of_node(self) -> int:
        return min(self.ranks, self.machine.ranks_per_node)

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.machine.ranks_per_node)

    def passing(self, seconds: float, micro_batches: float) -> tuple[Term, Term]:
        """So long a rank computes, and waits: in a pipeline of so many micro-batches a pass, or for
        a core."""
        idle = (self.layout.pipeline_model_parallel_size - 1) / micro_batches
        crowded = 1 / self.machine.cores_per_rank - 1
        return Term("computation", seconds), Term(WAITING, seconds * max(idle, crowded))

    def weight_bytes(self) -> float:
        return self.one_pass.weights * (2 if self.bf16 else 4)


def start_stage(site: Site) -> StageCost:
    """Until the checkpoint is loaded."""
    weights = site.weight_bytes()
    node_reads = weights * site.ranks_of_node
    return StageCost("start", (
        Term("latency", site.machine.start),
        Term("storage", node_reads * site.nodes / site.machine.storage)),
        weights, site.machine.base * site.ranks_of_node)


def sketch_stage(site: Site, config: SketchConfig, work: Workload) -> StageCost:
    """One pass over pool and validation set."""
    one = site.one_pass
    micro_batches = (work.candidates + work.valid_samples) / site.micro_batch_size \
        / site.copies
    stages = site.layout.pipeline_model_parallel_size
    passing = site.passing(micro_batches * one.sketch, 1 if stages == 1 else 4 * stages)
    stored = (work.candidates + work.valid_samples) * (
        config.sketch_size * (4 if config.sketch_dtype == "fp32" else 2) + 24)
    planned = work.candidates * _PLANNED_BYTES
    return StageCost("sketches", (
        *passing, Term("messages", micro_batches * one.messages),
        Term("storage", stored / site.machine.storage),
        Term("planning", work.candidates / site.machine.planner)),
        site.weight_bytes() + one.held,
        site.machine.base * site.ranks_of_node + planned,
        micro_batches * one.sent, stored)


def curvature_stage(site: Site, config: CurvatureConfig, sketch: SketchConfig, work: Workload,
              ) -> StageCost:
    """Leading eigenpairs; those of the sketched Fisher matrix need no pass."""
    one, host = site.one_pass, site.machine.base * site.ranks_of_node
    if config.curvature == SKETCHED_FISHER:
        size, samples = sketch.sketch_size, work.valid_samples
        entries = samples * min(size, samples) * size + min(size, samples)**3
        return StageCost("curvature", (Term("solver", entries / 1e9),), site.weight_bytes(),
                         host + 8.0 * samples * size)
    samples = min(config.num_curvature_samples or work.valid_samples, work.valid_samples)
    slower, larger = _PRODUCTS[config.curvature]
    products = min(config.max_matvecs,
                   _PRODUCTS_PER_PAIR * config.num_eigenpairs + _PRODUCTS_BESIDES)
    micro_batches = max(1.0, math.ceil(samples / site.micro_batch_size / site.copies))
    # In passes over micro-batches of the pool, which is what was measured.
    passed = work.padded_valid_tokens(samples, micro_batches * site.copies) / site.copies / (
        site.micro_batch_size * work.tokens / work.candidates)
    basis = min(max(2 * config.num_eigenpairs + 2, 21), config.max_matvecs + 1) + 3
    vectors = 4.0 * one.weights * basis
    kept = min(site.machine.memory / 4, 4.0 * _KEPT[config.curvature] * site.columns
               * samples * work.valid_tokens / work.valid_samples / site.ranks)
    summed = 4.0 * one.weights * 2 * (site.copies > 1)
    passing = site.passing(products * passed * one.training * slower, micro_batches)
    traffic = products * basis / 2 * 2 * 4.0 * one.weights / _memory_rate(site)
    return StageCost("curvature", (
        *passing, Term("memory traffic", traffic),
        Term("messages", products * (micro_batches * 2 * one.messages
                                     + summed / site.machine.fabric))),
        site.weight_bytes() * 2 + vectors + kept + larger * one.held, host,
        products * summed, vectors * site.layout.tensor_model_parallel_size
        * site.layout.pipeline_model_parallel_size)


def _memory_rate(site: Site) -> float:
    """Bytes a second in vector operations: an element of a pass is some 300 bytes."""
    return 300 * site.machine.elements


def solve_stage(site: Site, config: SelectionConfig, sketch: SketchConfig, work: Workload,
          ) -> StageCost:
    """The selection problem, on rank 0 or with the rows spread over all ranks."""
    machine, rows = site.machine, work.candidates * sketch.sketch_size
    tokens_of_text = work.tokens if config.counts_texts else 0.0
    texts = BYTES_OF_TEXT * tokens_of_text
    is_spread = config.sketch_rows == "spread" or (
        config.sketch_rows == "auto" and 16 * rows + texts > machine.host_memory)
    ranks = site.ranks if is_spread else 1
    of_node = site.ranks_of_node if is_spread else 1
    vectors = 8.0 * work.candidates * (_LEADER_VECTORS + _OTHER_VECTORS * (of_node - 1))
    sent = 8.0 * work.candidates * 60 if is_spread else 0.0
    return StageCost("solve", (
        Term("solver", rows / ranks / machine.solver),
        Term("texts", _SECONDS_A_TOKEN_OF_TEXT * tokens_of_text / ranks),
        Term("leader", work.candidates / machine.leader),
        Term("messages", sent / machine.fabric),
        Term("storage", 4 * rows / machine.storage)),
        0.0, machine.base * site.ranks_of_node + 4 * rows / ranks * of_node * _COPIES_OF_ROWS
        + vectors + texts / ranks * of_node, sent)


def mask_stage(site: Site, work: Workload) -> StageCost:
    return StageCost("masks", (Term("planning", work.candidates / site.machine.planner),),
                     0.0, site.machine.base * site.ranks_of_node
                     + work.candidates * _PLANNED_BYTES, 0.0, work.candidates / 8)


def training_stage(site: Site, name: str, config: Training, batch: BatchConfig,
             is_sharded: bool, tokens_of_pass: float) -> StageCost:
    """Iterations of an annealing, or of its pilot. is_sharded: over the data-parallel ranks, the
    optimizer's state is."""
    one, copies = site.one_pass, site.copies
    micro_batches = batch.global_batch_size / batch.micro_batch_size / copies
    scale = config.batch_tokens / batch.global_batch_size * batch.micro_batch_size / tokens_of_pass
    step_bytes = one.weights * (_TRAINED_BF16 if site.bf16 else _TRAINED_FP32)
    optimizer = one.weights * _OPTIMIZER[site.bf16] / (copies if is_sharded else 1)
    reduced = 2 * 4.0 * one.weights * (copies - 1) / copies
    saved = one.weights * 14.0 * site.layout.tensor_model_parallel_size \
        * site.layout.pipeline_model_parallel_size
    return StageCost(name, (
        *site.passing(config.iterations * micro_batches * one.training * scale, micro_batches),
        Term("messages", config.iterations * (
            micro_batches * one.messages * scale + reduced / site.machine.fabric)),
        Term("memory traffic", config.iterations * 3 * (step_bytes + optimizer)
             / _memory_rate(site)),
        Term("storage", saved / site.machine.storage)),
        step_bytes + optimizer + one.held * batch.micro_batch_size / site.micro_batch_size,
        site.machine.base * site.ranks_of_node, config.iterations * reduced, saved)
