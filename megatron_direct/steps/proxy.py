"""Losses of the pools' samples under a smaller model (``--proxy-load``), for ``--sketch-share``.

    RUN_DIR/proxy/    a store like that of sketches, whose one coordinate is the sample's loss

A forward pass of a small model costs little beside gradients of the large one, and is taken of all
samples: what it finds hard, and easy, is a feature by which samples without a gradient are selected
(data/token_features.py). The store is resumed and extended as sketches are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_direct.config import Given, Job, ModelConfig, Precision
from megatron_direct.data.samples import MicroBatchLimits, Samples
from megatron_direct.errors import UserError
from megatron_direct.gradients.store import SketchStore
from megatron_direct.mcore import checkpoint, grid, model, passes
from megatron_direct.mcore.checkpoint import Checkpoint
from megatron_direct.runtime import host, parallel, sharing
from megatron_direct.runtime.manifest import Key
from megatron_direct.settings import Settings, flag
from megatron_direct.steps import sketch as sketch_step
from megatron_direct.steps.onset import Onset, job_of
from megatron_direct.steps.pass_plan import Drawn, PassPlan


@dataclass(frozen=True)
class ProxyConfig(Settings):
    """Smaller model."""

    proxy_load: str = flag(
        "", "checkpoint of a smaller model of the same tokenizer, whose losses of all samples help "
        "to select those without a gradient; for --sketch-share below 1")


@dataclass(frozen=True)
class ProxyKey(Key):
    """What a loss depends on, beside the document that it is of."""

    checkpoint_digest: str
    model: ModelConfig
    precision: Precision = field(default_factory=Precision)


@dataclass(frozen=True)
class Proxy:
    """pool: the usable samples of the pools, cut at the smaller model's own sequence length;
    micro_batch: the most that a rank computes at once."""

    checkpoint: Checkpoint
    job: Job
    pool: Drawn
    micro_batch: MicroBatchLimits


@dataclass(frozen=True)
class ProxyLosses:
    """digest: of the key that they were computed under."""

    store: SketchStore
    pool: Drawn
    digest: str

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """[n] float32 mean token losses of samples [n], ascending."""
        found = sketch_step.read_sketches(
            self.store, dataclasses.replace(self.pool, numbers=numbers))
        assert np.array_equal(found.samples, numbers)
        return found.losses


def open_proxy(config: ProxyConfig, sketch: sketch_step.SketchConfig, onset: Onset, given: Given,
               ) -> Proxy | None:
    """The smaller model, if one is named, which is as its checkpoint says; all ranks call this.

    Raises UserError where no sample would be judged by it, and for one of another tokenizer.
    """
    if not config.proxy_load:
        return None
    if sketch.sketch_share == 1:
        raise UserError("--proxy-load is for --sketch-share below 1: where all samples have "
                        "gradients, none is selected by a smaller model's losses. Give a share, or "
                        "leave the flag out.")
    found = checkpoint.open_checkpoint(config.proxy_load)
    _require_same_tokenizer(config.proxy_load, found, onset)
    pool = onset.pool
    job = job_of(found, onset.job.layout, dataclasses.replace(given, model={}), pool.prefixes)
    job.require_runs_on(parallel.world_size(), trains=False)
    if job.model.seq_length != pool.seq_length:
        pool = Samples(pool.prefixes, job.model.seq_length, job.model.vocab_size,
                       sharing.node_array)
    return Proxy(found, job, Drawn("pool", pool, pool.usable, onset.digests_of(pool)),
                 sketch.micro_batch)


def _require_same_tokenizer(load: str, found: Checkpoint, onset: Onset) -> None:
    """By its digest, or, where a checkpoint records none, by the size of its vocabulary."""
    remedy = ("Expected a smaller model of the same tokenizer: give another checkpoint, or leave "
              "--proxy-load out.")
    ours, theirs = onset.checkpoint.tokenizer_digest, found.tokenizer_digest
    if ours and theirs:
        if ours != theirs:
            raise UserError(f"--proxy-load {load} was trained with a tokenizer of digest {theirs}, "
                            f"{onset.checkpoint.path} with one of digest {ours}. {remedy}")
        return
    size, theirs = onset.job.model.vocab_size, found.arguments.get("vocab_size")
    if theirs not in (None, size):
        raise UserError(f"--proxy-load {load} has a vocabulary of {theirs} entries, "
                        f"{onset.checkpoint.path} one of {size}. {remedy}")


def measure_losses(proxy: Proxy, folder: Path) -> ProxyLosses:
    """Those that are not there yet, into ``folder``; all ranks call this.

    Raises UserError if the folder holds losses under another model.
    """
    key = ProxyKey(proxy.checkpoint.digest, proxy.job.model, proxy.job.precision)
    store = sketch_step.enter_store(SketchStore(folder, 1), key, "losses under a smaller model")
    if sketch_step.num_missing(store, proxy.pool):
        with grid.model_parallel(proxy.job.layout, proxy.job.num_model_chunks):
            chunks = model.build(proxy.job.of_main_loss)
            checkpoint.load_model(proxy.checkpoint.path, chunks)
            sketch_step.write_rows(store, proxy.pool, "losses under the smaller model",
                                   lambda plan: _losses(chunks, proxy, plan))
    return ProxyLosses(store, proxy.pool, key.digest())


def _losses(chunks, proxy: Proxy, plan: PassPlan,
            ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """([n, 1] losses, [n] sample numbers, [n] losses), pass by pass."""
    for micro_batches in passes.of_samples(chunks, proxy.pool.samples, plan.planned,
                                           proxy.micro_batch, plan.done):
        losses = passes.run_pass(chunks, micro_batches, backward=False).flatten().float()
        found = losses[host.to_device(passes.sample_rows(micro_batches))].cpu().numpy()
        yield found[:, None], passes.sample_numbers(micro_batches), found
