"""The weights at which gradients and curvature are taken: a short annealing's, for instance.

At the onset of annealing the learning rate is high, and the weights oscillate above the valley
of the loss: most of the validation gradient points down its walls, which is where any data would
take the model once the learning rate falls. A short decay over the pool as it is takes these common
directions out; what is left of the gradients is what one sample teaches and another does not.

The pilot's weights serve the measurements alone: the annealing itself begins at the checkpoint.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path

from megatron_direct.config import ModelConfig, OptimizerConfig, Precision
from megatron_direct.errors import UserError
from megatron_direct.mcore import blend, grid, model, training_folder
from megatron_direct.mcore.checkpoint import Checkpoint
from megatron_direct.mcore.merging import Average
from megatron_direct.runtime import parallel
from megatron_direct.runtime.manifest import Artefact, Key, State
from megatron_direct.settings import Settings, flag, flag_name
from megatron_direct.steps.decay import Decay, Segment, decay
from megatron_direct.steps.merged import find_states, make_average
from megatron_direct.steps.onset import Onset


@dataclass(frozen=True)
class PilotConfig(Settings):
    """Point at which gradients are taken."""

    at: str = flag(
        "pilot", "weights at which gradients are taken: the checkpoint's, the average of the last "
        "states of its training (merged), or those at the end of a pilot annealing (pilot; without "
        "--pilot-iters the checkpoint's)", choices=("checkpoint", "merged", "pilot"))
    pilot_iters: int = flag(
        0, "iterations of a pilot annealing over the whole pool; 0: gradients at the checkpoint "
        "itself", at_least=0)
    merge_load: tuple = flag(
        (), "--at merged: the checkpoints that are averaged, as in `merge`; default: the states "
        "beside --load that are no newer", nargs="+")
    merge_last: int = flag(
        0, "--at merged: how many states to take of a training's folder; 0: those of the last "
        "quarter of its iterations", at_least=0)

    def check(self) -> None:
        if self.at != "pilot" and self.pilot_iters:
            raise UserError(f"--pilot-iters {self.pilot_iters} has no effect with --at {self.at}. "
                            "Leave either out.")
        if self.at != "merged":
            for name in ("merge_load", "merge_last"):
                if getattr(self, name):
                    raise UserError(f"{flag_name(name)} has no effect without --at merged. Add "
                                    "that flag, or leave this one out.")

    @property
    def has_pilot(self) -> bool:
        return self.at == "pilot" and self.pilot_iters > 0

    def in_one_spelling(self) -> PilotConfig:
        """The same point, as every other config of it is spelt, too."""
        if self.has_pilot:
            return self
        at = "checkpoint" if self.at == "pilot" else self.at
        return dataclasses.replace(self, at=at, pilot_iters=0)


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
    """The weights at which gradients are taken. digest: of all that they depend on; moments: the
    checkpoint with Adam's second moments, if any has them, with a digest of its own."""

    path: Path
    digest: str
    moments: Path
    moments_digest: str


def gradient_point(config: PilotConfig, onset: Onset, folder: Path, seed: int) -> GradientPoint:
    """The end of the pilot or the average of states, made if it is not there, or the checkpoint;
    all ranks call this.

    folder: of the run, for ``pilot/`` or ``merged/``. A pilot that was killed starts again.
    """
    start = onset.checkpoint
    if config.has_pilot:
        return _end_of_pilot(config, onset, folder / "pilot", seed)
    if config.at != "merged":
        return GradientPoint(start.path, start.digest, start.path, start.digest)
    key = make_average(Average.uniform(states_to_merge(config, start)), folder / "merged")
    return GradientPoint(_newest_in(folder / "merged"), key.digest(), start.path, start.digest)


def states_to_merge(config: PilotConfig, start: Checkpoint) -> list[Checkpoint]:
    """Those that the flags name, or the last ones up to ``start``; all ranks call this."""
    folders = [os.fspath(path) for path in config.merge_load]
    return find_states(folders or [str(start.path.parent)], config.merge_last,
                       None if folders else start.iteration, "--merge-load")


def _end_of_pilot(config: PilotConfig, onset: Onset, folder: Path, seed: int) -> GradientPoint:
    key = PilotKey(onset.checkpoint.digest, onset.digests_of(onset.pool), config.pilot_iters,
                   onset.job.model, onset.job.optimizer, onset.job.batch.global_batch_size, seed,
                   onset.job.precision)
    artefact = Artefact(folder, "a pilot")
    earlier = parallel.on_rank_zero(lambda: _of_fewer_pools(artefact, key))
    if earlier is not None:
        parallel.say(f"pilot: {folder} was annealed over some of these pools, and is kept so "
                     "that its sketches can be reused.")
        return _pilot_in(folder, earlier)
    if parallel.on_rank_zero(lambda: artefact.state(key)) is not State.FINISHED:
        parallel.on_rank_zero(lambda: artefact.begin(key))
        _anneal(config, onset, folder, seed)
        parallel.on_rank_zero(lambda: artefact.finish(key))
    return _pilot_in(folder, key.digest())


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
                    "pilot", load_optim=onset.checkpoint.has_readable_optimizer,
                    save_interval=config.pilot_iters), model.build(job))


def _pilot_in(folder: Path, digest: str) -> GradientPoint:
    path = _newest_in(folder / "checkpoints")
    return GradientPoint(path, digest, path, digest)


def _newest_in(folder: Path) -> Path:
    return parallel.on_rank_zero(lambda: training_folder.latest(folder))
