"""One sketch for each sample of the pool and of the validation set, on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_direct.config import Job, ModelConfig, Precision
from megatron_direct.curvature.preconditioner import adam_scales
from megatron_direct.data.samples import MicroBatchLimits
from megatron_direct.errors import UserError
from megatron_direct.gradients.append_thread import AppendThread
from megatron_direct.gradients.hashes import HASH_VERSION
from megatron_direct.gradients.per_sample import SAMPLE_LOSSES, GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.gradients.store import DTYPES, Sketches, SketchStore
from megatron_direct.mcore import checkpoint, grid, model
from megatron_direct.mcore.shards import ParameterShard, parameter_shards
from megatron_direct.runtime import attendance, files, parallel
from megatron_direct.runtime.manifest import Artefact, Key, State
from megatron_direct.settings import Settings, flag
from megatron_direct.steps import pass_plan
from megatron_direct.steps.pass_plan import Drawn, PassPlan
from megatron_direct.steps.pilot import GradientPoint


@dataclass(frozen=True)
class SketchConfig(Settings):
    """Samples and sketches."""

    sketch_size: int = flag(2048, "coordinates of a sketch (as in the authors' experiments)",
                            at_least=2, at_most=1 << 24)
    sketch_dtype: str = flag("fp32", "number format of sketches on disk; bf16 takes half the space "
                             "and rounds each coordinate to 3 digits", choices=DTYPES)
    sketch_share: float = flag(
        1.0, "share of the pools' samples, drawn at random, that gradients are taken of; the "
        "others are selected by features of their tokens (docs/selection.md)", above=0,
        at_most=1)
    sketch_parameters: tuple = flag(
        (), "glob patterns of the parameters that are sketched; '!PATTERN' excludes some; "
        "default: all", nargs="+")
    sample_loss: str = flag(
        "mean", "a sample's gradient is that of the mean, or of the sum, of its token losses",
        choices=SAMPLE_LOSSES)
    precondition: str = flag(
        "none", "adam: gradients are multiplied by (sqrt(v) + eps)^(-1/2), v being the "
        "checkpoint's second moments of Adam, in sketches and curvature alike",
        choices=("none", "adam"))
    micro_batch_size: int = flag(8, "samples per rank in one pass", at_least=1)
    micro_batch_tokens: int = flag(
        0, "most tokens per rank in one pass, padding included: long samples are then fewer than "
        "--micro-batch-size at a time; 0: no such limit", at_least=0)
    num_valid_samples: int = flag(
        256, "largest number of validation samples that are used, drawn at random, for everything: "
        "target, clusters, worth, likeness of texts and curvature; 0: all", at_least=0)
    seed: int = flag(1234, "seed of hashes, of the validation samples drawn and of the solver",
                     at_least=0, at_most=2**32 - 1)

    @property
    def micro_batch(self) -> MicroBatchLimits:
        return MicroBatchLimits(self.micro_batch_size, self.micro_batch_tokens)

    def without_micro_batch(self) -> SketchConfig:
        """What tells one result from another: the micro-batch does not, but for rounding."""
        defaults = SketchConfig()
        return dataclasses.replace(self, micro_batch_size=defaults.micro_batch_size,
                                   micro_batch_tokens=defaults.micro_batch_tokens)


# The question waits for what is queued on a GPU.
_PASSES_BETWEEN_STOPS = 4


@dataclass(frozen=True)
class SketchesKey(Key):
    """What a row depends on, beside the document that it is of."""

    point_digest: str
    model: ModelConfig
    sketch_size: int
    sketch_dtype: str = "fp32"
    sketch_parameters: tuple[str, ...] = ()
    sample_loss: str = "mean"
    precondition: str = "none"
    seed: int = 1234
    precision: Precision = field(default_factory=Precision)
    hash_version: int = 1
    moments_digest: str | None = None  # of the checkpoint whose moments scale it, with Adam's eps
    adam_eps: float | None = None


def sketches_key(config: SketchConfig, job: Job, point: GradientPoint) -> SketchesKey:
    scaled = (point.moments_digest, job.optimizer.adam_eps) if config.precondition == "adam" else ()
    return SketchesKey(point.digest, job.model, config.sketch_size, config.sketch_dtype,
                       tuple(config.sketch_parameters), config.sample_loss, config.precondition,
                       config.seed, job.precision, HASH_VERSION, *scaled)


def open_store(folder: Path, key: SketchesKey) -> SketchStore:
    """The store of these sketches, made if it is not there; all ranks call this.

    Raises UserError if the folder holds sketches of another or an unknown key. Its entries alone
    show whether the rows that are needed are in it.
    """
    return enter_store(SketchStore(folder, key.sketch_size, key.sketch_dtype), key, "sketches")


def enter_store(store: SketchStore, key: Key, what: str) -> SketchStore:
    """The store, with its manifest; what: its rows are called in messages."""
    def enter():
        artefact = Artefact(store.folder, what)
        if artefact.state(key) is not State.NEW:
            return
        if store.has_files():
            raise UserError(f"{store.folder} holds {what} but no manifest.json that records how "
                            "they were made, so they cannot be used. Restore the file, or delete "
                            "the folder.")
        artefact.finish(key)

    parallel.on_rank_zero(enter)
    return store


def draw(usable: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most ``count`` of the samples, drawn without replacement, ascending; all for 0."""
    if count == 0 or len(usable) <= count:
        return usable
    return np.sort(np.random.default_rng(seed).choice(usable, count, replace=False))


@contextlib.contextmanager
def gradient_model(config: SketchConfig, job: Job, point: GradientPoint, spec: str | None,
                   ) -> Iterator[GradientModel]:
    """The model at a point, on its ranks for as long as the context lasts; all ranks call this.

    spec: of its layers, by which gradients differ by rounding alone.
    """
    with grid.model_parallel(job.layout, job.num_model_chunks):
        chunks = model.build(job.of_main_loss, spec=spec)
        checkpoint.load_model(point.path, chunks)
        shards = sketched_shards(parameter_shards(chunks), config.sketch_parameters)
        scales = None if config.precondition != "adam" else adam_scales(
            point.moments, chunks, shards, job.optimizer.adam_eps)
        yield GradientModel(chunks, shards, Sketch(shards, config.sketch_size, config.seed, scales),
                            scales, config.sample_loss, config.micro_batch)


def sketched_shards(shards: Sequence[ParameterShard], patterns: Sequence[str],
                    ) -> list[ParameterShard]:
    """The shards whose names match one of the glob patterns, and none that begins with ``!``.

    All, if there is no pattern; those that begin with ``!`` alone leave out of all. Raises
    UserError, on all ranks, for a pattern that no parameter of the whole model matches, and if
    nothing is left.
    """
    leave_out = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    take = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    names = set().union(*parallel.gather_objects({shard.name for shard in shards}))
    for pattern in (*take, *leave_out):
        if not fnmatch.filter(names, pattern):
            raise UserError(f"--sketch-parameters: no parameter matches {pattern}. The parameters "
                            f"are {', '.join(sorted(names))}.")
    chosen = {name for name in names if any(fnmatch.fnmatchcase(name, p) for p in take)
              and not any(fnmatch.fnmatchcase(name, p) for p in leave_out)}
    if not chosen:
        raise UserError("--sketch-parameters leaves no parameter to sketch. Exclude fewer.")
    if len(chosen) < len(names):
        parallel.say(f"sketches cover {len(chosen)} of {len(names)} parameters")
    return [shard for shard in shards if shard.name in chosen]


def num_missing(store: SketchStore, drawn: Drawn) -> int:
    """How many of the samples drawn have no row; all ranks call this."""
    return parallel.on_rank_zero(lambda: _count_missing(store, drawn))


def _count_missing(store: SketchStore, drawn: Drawn) -> int:
    has_row = pass_plan.with_rows(store, drawn)
    return len(drawn.numbers) - int(np.count_nonzero(has_row[drawn.numbers]))


# Yields ([n, k] rows, [n] sample numbers, [n] losses) of what is left of a plan.
_Compute = Callable[[PassPlan], Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]]


def write_sketches(store: SketchStore, gradients: GradientModel, drawn: Drawn) -> None:
    """Rows of all that is drawn and has none yet; all ranks call this."""
    write_rows(store, drawn, f"sketch {drawn.what}", lambda plan: sketch_samples(
        gradients, drawn.samples, plan.planned, plan.done))


def write_rows(store: SketchStore, drawn: Drawn, what: str, compute: _Compute) -> None:
    """The same of any rows; what: the work is called in messages."""
    plan = pass_plan.make_plan(store, drawn)
    num_left = plan.num_left
    if num_left == 0:
        return
    if num_left < len(drawn.numbers):
        parallel.say(f"{what}: {len(drawn.numbers) - num_left} of "
                     f"{len(drawn.numbers)} samples are already done")
    dataset_numbers = pass_plan.dataset_numbers(store, drawn)
    attendance.at(what)
    begun = time.perf_counter()
    with _writer(store) as writer, \
            tqdm(total=num_left, desc=what, unit="sample",
                 disable=None if parallel.is_rank_zero() else True) as progress:
        for number, (rows, samples, losses) in enumerate(compute(plan)):
            if writer is not None:
                which = drawn.samples.dataset_of(samples)
                writer.append(rows, dataset_numbers[which],
                              samples - drawn.samples.first[which], losses)
            # The other data-parallel ranks are about as far.
            progress.update(min(len(samples) * grid.data_size(), num_left - progress.n))
            attendance.at(f"{what}, about {progress.n} of {num_left} samples")
            if number % _PASSES_BETWEEN_STOPS == 0 and grid.copy_stops():
                parallel.stop()
    parallel.wait_for_all()  # copies of the model exchange nothing in between, and drift apart
    parallel.on_rank_zero(lambda: pass_plan.plan_path(store, drawn).unlink(missing_ok=True))
    left = parallel.on_rank_zero(lambda: files.once_seen(
        lambda: _count_missing(store, drawn), lambda count: not count))
    if left:
        raise UserError(f"{store.folder} lacks {left} of {len(drawn.numbers)} {drawn.what} samples "
                        "that were computed: rows were lost while being written. Check the disk, "
                        "and run the command again: it computes what is missing.")
    seconds = time.perf_counter() - begun
    parallel.say(f"{what}: {num_left} samples in {seconds:.1f} s "
                 f"({num_left / seconds:.1f} samples/s)")


def _writer(store: SketchStore) -> contextlib.AbstractContextManager[AppendThread | None]:
    """Of this rank's rows, on the rank that speaks for those that see the same samples. However the
    context is left, what was appended is on the disk then."""
    if not grid.is_first_model_rank():
        return contextlib.nullcontext()
    return contextlib.closing(AppendThread(store.writer(grid.data_rank())))


def read_sketches(store: SketchStore, drawn: Drawn, share: int = 0, num_shares: int = 1,
                  ) -> Sketches:
    """The rows of what is drawn, or of an even share of it, by ascending sample number.

    Raises UserError if a row is not there.
    """
    mine = np.array_split(drawn.numbers, num_shares)[share]
    entries, samples = files.once_seen(lambda: pass_plan.rows_of(store, drawn, mine),
                                       lambda found: len(found[1]) == len(mine))
    if len(samples) < len(mine):
        raise UserError(f"{store.folder} has rows of {len(samples)} of the {len(mine)} "
                        f"{drawn.what} samples that this rank reads. Give a --run-dir on a file "
                        "system that all nodes share (megatron-direct doctor tries it), and run "
                        "the command again.")
    return store.read(entries, samples)
