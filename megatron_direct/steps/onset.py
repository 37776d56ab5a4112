"""The onset of annealing: a checkpoint, pools to select from, and a validation set, all checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_direct.config import (
    BatchConfig,
    Given,
    Job,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Precision,
)
from megatron_direct.data import checks, indexed
from megatron_direct.data.samples import Samples
from megatron_direct.errors import UserError
from megatron_direct.mcore.checkpoint import Checkpoint, open_checkpoint
from megatron_direct.mcore.object_storage import read_object_stores
from megatron_direct.runtime import sharing
from megatron_direct.settings import Settings, flag


@dataclass(frozen=True)
class OnsetConfig(Settings):
    """Onset of annealing."""

    load: str = flag("", "checkpoint at the onset of annealing (a Megatron distributed one)",
                     required=True)
    data_path: tuple = flag((), "the pools: indexed datasets to select from", nargs="+",
                            required=True)
    valid_data_path: tuple = flag((), "the validation set: indexed datasets", nargs="+",
                                  required=True)
    run_dir: str = flag("", "folder for everything that this run writes", required=True)
    object_storage_cache_path: str = flag(
        "", "local folder for copies of the indexes of s3:// and msc:// datasets")


@dataclass(frozen=True)
class Onset:
    """pool, valid: the documents of their datasets, as samples. digests: of each, by prefix."""

    checkpoint: Checkpoint
    job: Job
    pool: Samples
    valid: Samples
    digests: dict[str, str]

    def digests_of(self, samples: Samples) -> tuple[str, ...]:
        return tuple(self.digests[prefix] for prefix in samples.prefixes)


def open_onset(config: OnsetConfig, layout: ParallelConfig, given: Given,
               test_data_path: Sequence[str] = ()) -> Onset:
    """Reads what the flags name, once; all ranks call this.

    Raises UserError where files are missing or damaged, where datasets and checkpoint do not fit
    one another, and where a dataset is listed twice.
    """
    read_object_stores(config.object_storage_cache_path)
    pools, valid = list(config.data_path), list(config.valid_data_path)
    checks.require_disjoint(pool=pools, validation=valid, test=list(test_data_path))
    checks.require_names_of_their_own(valid, test_data_path)
    checkpoint = open_checkpoint(config.load)
    digests = dataset_digests([*pools, *valid, *test_data_path])
    job = job_of(checkpoint, layout, given, [*pools, *valid, *test_data_path])
    model = job.model
    pool_samples, valid_samples = (
        Samples(prefixes, model.seq_length, model.vocab_size, sharing.node_array)
        for prefixes in (pools, valid))
    if len(valid_samples.usable) == 0:
        raise UserError(f"{', '.join(valid)} has no document of two tokens or more. Curvature "
                        "needs at least one validation sample; correct --valid-data-path.")
    digests = {prefix: digests[prefix] for prefix in (*pools, *valid)}
    checks.require_different(digests)
    return Onset(checkpoint, job, pool_samples, valid_samples, digests)


def job_of(checkpoint: Checkpoint, layout: ParallelConfig, given: Given,
           prefixes: Sequence[str]) -> Job:
    """The model of a checkpoint, checked against the flags given and the datasets, and trained on
    as it was."""
    return as_trained(checkpoint, model_of(checkpoint, given, prefixes), layout, given)


def as_trained(checkpoint: Checkpoint, model: ModelConfig, layout: ParallelConfig, given: Given,
               ) -> Job:
    """With the optimizer, batches and precision that the checkpoint was trained with, where no flag
    says otherwise."""
    return Job(model, layout,
               checkpoint.settings(OptimizerConfig, given.optimizer),
               checkpoint.settings(BatchConfig, given.batch),
               checkpoint.settings(Precision, given.precision))


def model_of(checkpoint: Checkpoint, given: Given, prefixes: Sequence[str]) -> ModelConfig:
    checkpoint.require_same_model(given.model)
    known = {**checkpoint.arguments, **given.model}
    vocab_size, _ = checks.require_one_vocabulary(
        prefixes, known.get("vocab_size"), checkpoint.tokenizer_digest)
    return checkpoint.settings(ModelConfig, {**given.model, "vocab_size": vocab_size})


def dataset_digests(prefixes: Sequence[str]) -> dict[str, str]:
    """Digest of each dataset, by prefix, once its files were checked; all ranks call this.

    Each rank reads a part of the indexes, and the others trust what it found.
    """
    found = sharing.map_shared_out(indexed.examine, list(dict.fromkeys(prefixes)))
    for examined in found:
        indexed.trust(examined)
    return {examined.prefix: examined.digest for examined in found}
