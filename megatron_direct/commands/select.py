"""``megatron-direct select``: which K samples of the pools should the annealing see?

Four stages in one launch, each written to the run directory before the next begins, so that a run
that was killed takes up the first unfinished one: a pilot annealing, if asked for; sketches of
every sample's gradient; the stiff directions of the validation set's curvature; and the selection
problem.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.commands.anneal import carried_over
from megatron_direct.config import (
    BatchConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    flag,
)
from megatron_direct.curvature.preconditioner import adam_scales
from megatron_direct.curvature.spectrum import Directions
from megatron_direct.data import checks
from megatron_direct.data.indexed import dataset_digest
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients import store
from megatron_direct.gradients.per_sample import SAMPLE_LOSSES
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.mcore import checkpoint, grid, model
from megatron_direct.runtime import files, parallel
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.steps import solve as selection_stage
from megatron_direct.steps.curvature import CurvatureConfig, leading_directions
from megatron_direct.steps.pilot import PilotConfig, measured_at
from megatron_direct.steps.sketch import sketched_shards, write_sketches
from megatron_direct.steps.solve import SelectionConfig


@dataclass(frozen=True)
class SelectConfig:
    """Samples and sketches."""

    load: str = flag("", "checkpoint at the onset of annealing (a Megatron distributed one)",
                     required=True)
    data_path: tuple = flag((), "the pools: indexed datasets to select from", nargs="+",
                            required=True)
    valid_data_path: tuple = flag((), "the validation set: indexed datasets", nargs="+",
                                  required=True)
    run_dir: str = flag("", "folder for all that this run makes", required=True)
    sketch_size: int = flag(2048, "coordinates of a sketch (as in the authors' experiments)")
    sketch_dtype: str = flag("fp32", "sketches on disk; bf16 takes half the space and rounds each "
                             "coordinate to 3 digits", choices=store.DTYPES)
    sketch_parameters: tuple = flag(
        (), "glob patterns of the parameters that are sketched; '!PATTERN' leaves some out; left "
        "out: all", nargs="+")
    sample_loss: str = flag(
        "mean", "a sample's gradient is that of the mean, or of the sum, of its token losses",
        choices=SAMPLE_LOSSES)
    precondition: str = flag(
        "none", "adam: gradients are multiplied by the checkpoint's second moments of Adam to the "
        "power -1/4, in sketches and curvature alike", choices=("none", "adam"))
    micro_batch_size: int = flag(8, "samples a rank computes at once")
    num_valid_samples: int = flag(
        256, "validation samples that curvature is computed on, at most; 0: all")
    seed: int = flag(1234, "seed of hashes, of the draw of validation samples and of the solver")


_OF_SKETCHES = ("sketch_dtype", "sketch_parameters", "sample_loss", "precondition")


def select(config: SelectConfig, given_architecture: dict, layout: ParallelConfig,
           curvature: CurvatureConfig, selection: SelectionConfig,
           pilot: PilotConfig | None = None, given: dict[type, dict] | None = None) -> None:
    """given_architecture, given: the flags of the architecture, and of the pilot's optimizer and
    batches (by dataclass), that were given; the rest is the checkpoint's.
    """
    pools, valid = list(config.data_path), list(config.valid_data_path)
    checks.require_disjoint(pool=pools, validation=valid)
    found = checkpoint.require(config.load)
    architecture = model_of(found, given_architecture, [*pools, *valid])
    carried, pilot = checkpoint.read_args(found), pilot or PilotConfig()
    optimizer, batch = (kind(**carried_over(kind, carried, given or {}))
                        for kind in (OptimizerConfig, BatchConfig))
    layout.check(architecture, parallel.world_size())
    if pilot.pilot_iters:
        batch.num_microbatches(layout.data_parallel_size(parallel.world_size()))
    samples = Samples(pools, architecture.seq_length, architecture.vocab_size)
    valid_samples = Samples(valid, architecture.seq_length, architecture.vocab_size)
    numbers = draw(valid_samples.usable, config.num_valid_samples, config.seed)
    require_validation_samples(valid_samples)
    selection_stage.num_to_select(selection, len(samples.usable))

    run = RunDirectory(config.run_dir)
    identity = parallel.on_rank_zero(
        lambda: identity_of(config, architecture, curvature, selection, found,
                            identity_of_pilot(pilot, optimizer, batch)))
    if parallel.on_rank_zero(lambda: run.begin("select", identity, vars(layout))):
        parallel.say(f"{config.run_dir} already holds this selection.")
        return

    begun = clock(run.path)
    at = measured_at(pilot, found, run.path / "pilot", architecture, layout, optimizer, batch,
                     pools, carried.get("tokenizer_digest"), config.seed)
    directions = measure(config, curvature, architecture, layout, at, run.path, identity,
                         samples, valid_samples, numbers, begun)
    selection_stage.solve(selection, samples, run.path, directions, seed=config.seed)
    selection_stage.load_masks(run.path, pools)
    parallel.on_rank_zero(lambda: run.finish("select"))


def require_validation_samples(valid_samples: Samples) -> None:
    if len(valid_samples.usable) == 0:
        raise UserError(f"{', '.join(valid_samples.prefixes)}: no document of two tokens or more. "
                        "Curvature needs at least one validation sample; correct "
                        "--valid-data-path.")


def clock(folder: Path) -> float | None:
    """When the measuring into ``folder`` begins: now, or None if a part of it is there already."""
    parts = (folder / "sketches", folder / "pilot" / "checkpoints")
    is_new = parallel.on_rank_zero(lambda: not any(part.exists() for part in parts))
    return time.perf_counter() if is_new else None


def measure(config: SelectConfig, curvature: CurvatureConfig, architecture: ModelConfig,
            layout: ParallelConfig, at: Path, folder: Path, identity: dict, samples: Samples,
            valid_samples: Samples, numbers: np.ndarray, begun: float | None) -> Directions:
    """Sketches of all samples and the leading directions, into ``folder``; all ranks call this.

    at: the checkpoint whose gradients these are. numbers: of the validation samples that were
    drawn. identity: all that the selection depends on. begun: as ``clock`` has it; ``seconds.json``
    tells what it all took since, unless a part of it had been done before.
    """
    at_hand = time.perf_counter()
    of_sketches = {key: identity[key] for key in (
        "checkpoint_digest", "dataset_digests", "seq_length", "sketch_size", "seed",
        "pilot", *_OF_SKETCHES)}
    in_layout = {**vars(layout), "ranks": parallel.world_size()}
    with grid.model_parallel(layout, layout.num_model_chunks(architecture)):
        chunks = model.build(architecture, layout)
        checkpoint.load_model(at, chunks)
        shards = sketched_shards(model.parameter_shards(chunks), config.sketch_parameters)
        scales = adam_scales(at, chunks, shards) if config.precondition == "adam" else None
        sketch = Sketch(shards, config.sketch_size, config.seed, scales)
        for name, some, which in (("pool", samples, samples.usable),
                                  ("valid", valid_samples, numbers)):
            write_sketches(folder / "sketches" / name, of_sketches, in_layout, chunks, shards,
                           sketch, some, which, config.micro_batch_size,
                           dtype=config.sketch_dtype, sample_loss=config.sample_loss)
        sketched = time.perf_counter()
        valid_sketches = folder / "sketches" / "valid"
        directions = leading_directions(
            curvature, chunks, shards, sketch, valid_samples, numbers, config.micro_batch_size,
            scales=scales, sample_loss=config.sample_loss, seed=config.seed,
            folder=folder / "curvature",
            valid_rows=parallel.on_rank_zero(lambda: store.load(valid_sketches).rows),
            identity={**identity, **in_layout})
    if begun is not None:
        seconds = {"pilot": at_hand - begun, "sketch": sketched - at_hand,
                   "curvature": time.perf_counter() - sketched}
        parallel.on_rank_zero(lambda: files.write_json(folder / "seconds.json", seconds))
    return directions


def model_of(found: Path, given: dict, prefixes: list[str]) -> ModelConfig:
    """The architecture of a checkpoint, checked against the flags given and the datasets."""
    carried = checkpoint.read_args(found)
    checkpoint.require_same_architecture(given, carried, found)
    values = {**checkpoint.architecture(carried), **given}
    values["vocab_size"], _ = checks.require_one_vocabulary(
        prefixes, values.get("vocab_size"), carried.get("tokenizer_digest"))
    return ModelConfig(**values)


def draw(usable: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most ``count`` of the samples, drawn without replacement, ascending; all for 0."""
    if count == 0 or len(usable) <= count:
        return usable
    return np.sort(np.random.default_rng(seed).choice(usable, count, replace=False))


def identity_of(config: SelectConfig, architecture: ModelConfig, curvature: CurvatureConfig,
                selection: SelectionConfig, found: Path, pilot: dict | None) -> dict:
    """All that the selection depends on. How many samples are computed at once is not, nor where
    the rows lie when the problem is solved."""
    prefixes = [*config.data_path, *config.valid_data_path]
    return {
        **vars(architecture), **vars(curvature),
        **{key: value for key, value in vars(selection).items() if key != "sketch_rows"},
        "pilot": pilot, "sketch_size": config.sketch_size,
        "num_valid_samples": config.num_valid_samples,
        "seed": config.seed, "load": str(config.load),
        **{name: getattr(config, name) for name in _OF_SKETCHES},
        "data_path": list(config.data_path), "valid_data_path": list(config.valid_data_path),
        "checkpoint_digest": checkpoint.digest(found),
        "dataset_digests": {prefix: dataset_digest(prefix) for prefix in prefixes},
    }


def identity_of_pilot(pilot: PilotConfig, optimizer: OptimizerConfig, batch: BatchConfig,
                      ) -> dict | None:
    """What the pilot's weights depend on beside checkpoint, pools and seed; None without one."""
    if pilot.pilot_iters == 0:
        return None
    return {**vars(pilot), **vars(optimizer), "global_batch_size": batch.global_batch_size}
