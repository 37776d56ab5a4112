"""A short annealing over the whole pool, at whose end gradients and curvature are taken.

At the onset of annealing the learning rate is high, and the weights rattle about above the valley
of the loss: most of the validation gradient points down its walls, which is where any data would
take the model once the learning rate falls. A short decay over the pool as it is takes these common
directions out; what is left of the gradients is what one sample teaches and another does not.

The pilot's weights serve the measurements alone: the annealing itself begins at the checkpoint.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from megatron_direct.config import ModelConfig, OptimizerConfig, Precision
from megatron_direct.mcore import blend, checkpoint, grid, model
from megatron_direct.runtime import parallel
from megatron_direct.runtime.manifest import Artefact, Key, State
from megatron_direct.settings import Settings, flag
from megatron_direct.steps.decay import Decay, Segment, decay
from megatron_direct.steps.onset import Onset


@dataclass(frozen=True)
class PilotConfig(Settings):
    """Pilot annealing."""

    pilot_iters: int = flag(
        20, "iterations of a pilot annealing over the whole pool, at the end of which gradients "
        "are taken; 0: gradients at the checkpoint itself", at_least=0)


@dataclass(frozen=True)
class PilotKey(Key):
    """What the pilot's weights depend on."""

    checkpoint_digest: str
    pool_digests: tuple[str, ...]
    pilot_iters: int
    model: ModelConfig
    optimizer: OptimizerConfig
    global_batch_size: int
    seed: int
    precision: Precision = field(default_factory=Precision)


@dataclass(frozen=True)
class GradientPoint:
    """The weights at which gradients are taken. digest: of all that they depend on."""

    path: Path
    digest: str


def gradient_point(config: PilotConfig, onset: Onset, folder: Path, seed: int) -> GradientPoint:
    """The end of the pilot, run if it is not there, or the checkpoint; all ranks call this.

    folder: for the pilot's checkpoint and metrics. A pilot that was killed starts again.
    """
    if config.pilot_iters == 0:
        return GradientPoint(onset.checkpoint.path, onset.checkpoint.digest)
    key = PilotKey(onset.checkpoint.digest, onset.digests_of(onset.pool), config.pilot_iters,
                   onset.job.model, onset.job.optimizer, onset.job.batch.global_batch_size, seed,
                   onset.job.precision)
    artefact = Artefact(folder, "a pilot")
    earlier = parallel.on_rank_zero(lambda: _of_fewer_pools(artefact, key))
    if earlier is not None:
        parallel.say(f"pilot: {folder} was annealed over some of these pools, and is kept so "
                     "that its sketches can be reused.")
        return GradientPoint(_checkpoint_in(folder), earlier)
    if parallel.on_rank_zero(lambda: artefact.state(key)) is not State.FINISHED:
        parallel.on_rank_zero(lambda: artefact.begin(key))
        _anneal(config, onset, folder, seed)
        parallel.on_rank_zero(lambda: artefact.finish(key))
    return GradientPoint(_checkpoint_in(folder), key.digest())


def _of_fewer_pools(artefact: Artefact, key: PilotKey) -> str | None:
    """The digest of a finished pilot that differs in this alone: pools were added since (rank 0).
    """
    found = artefact.read()
    if found is None or not found["finished"]:
        return None
    different = key.differences(found["key"])
    if [name for name, _, _ in different] != ["pool_digests"]:
        return None
    _, before, now = different[0]
    return found["digest"] if set(before) < set(now) else None


def _anneal(config: PilotConfig, onset: Onset, folder: Path, seed: int) -> None:
    job = onset.job
    with grid.model_parallel(job.layout, job.num_model_chunks):
        dataset, _ = blend.build_blend(
            blend.Blend(onset.pool.prefixes), {}, blend.BlendRequest.for_job(
                job, config.pilot_iters, seed, folder / "cache",
                onset.checkpoint.tokenizer_digest))
        decay(Decay(job, onset.checkpoint, [Segment(0, dataset)], config.pilot_iters, folder,
                    "pilot", load_optim=onset.checkpoint.has_optimizer,
                    save_interval=config.pilot_iters), model.build(job))


def _checkpoint_in(folder: Path) -> Path:
    return parallel.on_rank_zero(lambda: checkpoint.latest(folder / "checkpoints"))
