"""One sketch for each sample of the pool and of the validation set, on disk."""

from __future__ import annotations

import contextlib
import fnmatch
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from megatron_direct.config import Job, ModelConfig, Precision
from megatron_direct.curvature.preconditioner import adam_scales
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.per_sample import SAMPLE_LOSSES, GradientModel, sketch_samples
from megatron_direct.gradients.sketch import Sketch
from megatron_direct.gradients.store import DTYPES, Entries, Sketches, SketchStore
from megatron_direct.mcore import checkpoint, grid, model
from megatron_direct.mcore.shards import ParameterShard, parameter_shards
from megatron_direct.runtime import attendance, files, parallel
from megatron_direct.runtime.manifest import Artefact, Key, State
from megatron_direct.settings import Settings, flag
from megatron_direct.steps.pilot import GradientPoint


@dataclass(frozen=True)
class SketchConfig(Settings):
    """Samples and sketches."""

    sketch_size: int = flag(2048, "coordinates of a sketch (as in the authors' experiments)",
                            at_least=2, at_most=1 << 24)
    sketch_dtype: str = flag("fp32", "number format of sketches on disk; bf16 takes half the space "
                             "and rounds each coordinate to 3 digits", choices=DTYPES)
    sketch_parameters: tuple = flag(
        (), "glob patterns of the parameters that are sketched; '!PATTERN' excludes some; "
        "default: all", nargs="+")
    sample_loss: str = flag(
        "mean", "a sample's gradient is that of the mean, or of the sum, of its token losses",
        choices=SAMPLE_LOSSES)
    precondition: str = flag(
        "none", "adam: gradients are multiplied by the checkpoint's second moments of Adam to the "
        "power -1/4, in sketches and curvature alike", choices=("none", "adam"))
    micro_batch_size: int = flag(8, "samples per rank in one pass", at_least=1)
    num_valid_samples: int = flag(
        256, "largest number of validation samples for the curvature; 0: all", at_least=0)
    seed: int = flag(1234, "seed of hashes, of the validation samples drawn and of the solver",
                     at_least=0, at_most=2**32 - 1)


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


@dataclass(frozen=True)
class Drawn:
    """Some documents of some datasets. what: how messages call them; numbers: [n], ascending, of
    the samples that are meant; digests: of the datasets, in their order."""

    what: str
    samples: Samples
    numbers: np.ndarray
    digests: Sequence[str]


def sketches_key(config: SketchConfig, job: Job, point: GradientPoint) -> SketchesKey:
    return SketchesKey(point.digest, job.model, config.sketch_size, config.sketch_dtype,
                       tuple(config.sketch_parameters), config.sample_loss, config.precondition,
                       config.seed, job.precision)


def open_store(folder: Path, key: SketchesKey) -> SketchStore:
    """The store of these sketches, made if it is not there; all ranks call this.

    Raises UserError if the folder holds sketches of another or an unknown key. Its entries alone
    show whether the rows that are needed are in it.
    """
    store = SketchStore(folder, key.sketch_size, key.sketch_dtype)

    def enter():
        artefact = Artefact(folder, "sketches")
        if artefact.state(key) is not State.NEW:
            return
        if store.has_files():
            raise UserError(f"{folder} holds sketches but no manifest.json that records how they "
                            "were made, so they cannot be used. Restore the file, or delete the "
                            "folder.")
        artefact.finish(key)

    parallel.on_rank_zero(enter)
    return store


def draw(usable: np.ndarray, count: int, seed: int) -> np.ndarray:
    """At most ``count`` of the samples, drawn without replacement, ascending; all for 0."""
    if count == 0 or len(usable) <= count:
        return usable
    return np.sort(np.random.default_rng(seed).choice(usable, count, replace=False))


@contextlib.contextmanager
def gradient_model(config: SketchConfig, job: Job, point: GradientPoint, spec: str,
                   ) -> Iterator[GradientModel]:
    """The model at a point, on its ranks for as long as the context lasts; all ranks call this.

    spec: of its layers, by which gradients differ by rounding alone.
    """
    with grid.model_parallel(job.layout, job.num_model_chunks):
        chunks = model.build(job, spec=spec)
        checkpoint.load_model(point.path, chunks)
        shards = sketched_shards(parameter_shards(chunks), config.sketch_parameters)
        scales = adam_scales(point.path, chunks, shards) if config.precondition == "adam" else None
        yield GradientModel(chunks, shards, Sketch(shards, config.sketch_size, config.seed, scales),
                            scales, config.sample_loss, config.micro_batch_size)


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
    return parallel.on_rank_zero(
        lambda: len(drawn.numbers) - len(_rows_of(store, drawn)[1]))


def write_sketches(store: SketchStore, gradients: GradientModel, drawn: Drawn) -> None:
    """Rows of all that is drawn and has none yet; all ranks call this."""
    planned, done = parallel.on_rank_zero(lambda: _plan(store, drawn))
    num_left = int((~done[planned]).sum())
    if num_left == 0:
        return
    if num_left < len(drawn.numbers):
        parallel.say(f"sketch {drawn.what}: {len(drawn.numbers) - num_left} of "
                     f"{len(drawn.numbers)} samples are already done")
    dataset_numbers = _dataset_numbers(store, drawn)
    writer = store.writer(grid.data_rank()) if grid.is_first_model_rank() else None
    attendance.at(f"sketch {drawn.what}")
    begun = time.perf_counter()
    with tqdm(total=num_left, desc=f"sketch {drawn.what}", unit="sample",
              disable=None if parallel.is_rank_zero() else True) as progress:
        for number, (rows, samples, losses) in enumerate(
                sketch_samples(gradients, drawn.samples, planned, done)):
            if writer is not None:
                which = drawn.samples.dataset_of(samples)
                writer.append(rows, dataset_numbers[which],
                              samples - drawn.samples.first[which], losses)
            # The other data-parallel ranks are about as far.
            progress.update(min(len(samples) * grid.data_size(), num_left - progress.n))
            attendance.at(f"sketch {drawn.what}, about {progress.n} of {num_left} samples")
            if number % _PASSES_BETWEEN_STOPS == 0 and grid.copy_stops():
                parallel.stop()
    if writer is not None:
        writer.close()
    parallel.barrier()
    parallel.on_rank_zero(lambda: _plan_path(store, drawn).unlink(missing_ok=True))
    left = num_missing(store, drawn)
    if left:
        raise UserError(f"{store.folder} lacks {left} of {len(drawn.numbers)} {drawn.what} samples "
                        "that were computed: rows were lost while being written. Check the disk, "
                        "and run the command again: it computes what is missing.")
    seconds = time.perf_counter() - begun
    parallel.say(f"sketch {drawn.what}: {num_left} samples in {seconds:.1f} s "
                 f"({num_left / seconds:.1f} samples/s)")


def read_sketches(store: SketchStore, drawn: Drawn, share: int = 0, num_shares: int = 1,
                  ) -> Sketches:
    """The rows of what is drawn, or an even share of them, by ascending sample number."""
    entries, samples = _rows_of(store, drawn)
    mine = np.array_split(np.argsort(samples), num_shares)[share]
    return store.read(entries[mine], samples[mine])


def _rows_of(store: SketchStore, drawn: Drawn) -> tuple[Entries, np.ndarray]:
    """(entries, [n] sample numbers) of those that are drawn and have a row, one row each."""
    entries = store.entries()
    sample = _sample_numbers(store, drawn, entries.dataset, entries.document)
    is_drawn = np.zeros(len(drawn.samples) + 1, dtype=bool)  # one more, for samples of others
    is_drawn[drawn.numbers] = True
    # A row may be there twice, if two ranks computed it: one of them serves.
    found, first = np.unique(np.where(is_drawn[sample], sample, -1), return_index=True)
    first = first[found >= 0]
    return entries[first], sample[first]


_PLANNED = np.dtype([("dataset", "<i4"), ("document", "<i8")])


def _plan_path(store: SketchStore, drawn: Drawn) -> Path:
    return store.folder / f"plan-{drawn.what}.npy"


def _plan(store: SketchStore, drawn: Drawn) -> tuple[np.ndarray, np.ndarray]:
    """([p] samples in which passes are planned, [samples] bool whether it has a row) (rank 0).

    The plan is kept until all of it is done, so that a run that was killed goes through the same
    micro-batches, and ends with the same bytes.
    """
    store.number_datasets(drawn.digests)
    done = np.zeros(len(drawn.samples), dtype=bool)
    done[_rows_of(store, drawn)[1]] = True
    missing = drawn.numbers[~done[drawn.numbers]]
    path = _plan_path(store, drawn)
    if path.is_file():
        plan = np.load(path)
        planned = np.intersect1d(
            _sample_numbers(store, drawn, plan["dataset"], plan["document"]), drawn.numbers)
        if np.isin(missing, planned).all():
            return planned, done
    which = drawn.samples.dataset_of(missing)
    plan = np.empty(len(missing), _PLANNED)
    plan["dataset"] = _dataset_numbers(store, drawn)[which]
    plan["document"] = missing - drawn.samples.first[which]
    with files.written_whole(path) as file:
        np.save(file, plan)
    return missing, done


def _dataset_numbers(store: SketchStore, drawn: Drawn) -> np.ndarray:
    """[datasets drawn] the number by which the store knows each."""
    numbers = {digest: number for number, digest in enumerate(store.datasets())}
    return np.array([numbers[digest] for digest in drawn.digests])


def _sample_numbers(store: SketchStore, drawn: Drawn, datasets: np.ndarray, documents: np.ndarray,
                    ) -> np.ndarray:
    """[n] of documents, by the numbers that the store has for their datasets; -1 for others."""
    order = {digest: number for number, digest in enumerate(drawn.digests)}
    places = np.array([order.get(digest, -1) for digest in store.datasets()], np.int64)
    place = places[datasets] if len(places) else np.empty(0, np.int64)
    return np.where(place >= 0, drawn.samples.first[place] + documents, -1)
