"""``megatron-direct alternate``: selection and annealing in turn.

The annealing is cut into segments, the learning rate decaying over all of them. Each segment is
trained on a selection made at its beginning: of the checkpoint for the first, of the weights where
the segment before ended for the others.

    RUN_DIR/rounds/N/     sketches/, curvature/ and selections/direct/ of segment N, counted from 0
    RUN_DIR/checkpoints/  of the annealing; a checkpoint at the end of each segment is among them
    RUN_DIR/metrics.jsonl, result.json

A run that was killed carries on where it was, and ends with the losses of one that was not: at the
beginning of a segment both start from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.commands.requests import LossesKey, SelectionRequest
from megatron_direct.data import indexed
from megatron_direct.data.blend_plan import MAX_EPOCHS, Blend, BlendPart, BlendRules
from megatron_direct.data.mask import SampleMask
from megatron_direct.errors import UserError
from megatron_direct.mcore import blend, checkpoint, grid, model
from megatron_direct.runtime import files, parallel, typed_json
from megatron_direct.runtime.manifest import Artefact, State
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.settings import Settings, flag
from megatron_direct.steps import selected
from megatron_direct.steps import solve as solve_step
from megatron_direct.steps.annealed import Losses
from megatron_direct.steps.decay import Decay, Segment, decay, set_losses
from megatron_direct.steps.measure import measure
from megatron_direct.steps.onset import Onset, OnsetConfig, dataset_digests
from megatron_direct.steps.pilot import PilotConfig
from megatron_direct.steps.selected import SelectionSummary

_NAME = "direct"  # of the selection of each round


@dataclass(frozen=True)
class AlternateConfig(Settings):
    """Selection and annealing in turn."""

    rounds: int = flag(2, "segments of the annealing, each on a selection of its own", at_least=1)
    lr_wsd_decay_iters: int = flag(
        100, "iterations of the annealing, over which the learning rate decays", at_least=1)
    max_epochs: float = flag(
        MAX_EPOCHS, "largest number of epochs over a pool within a segment (more is an error)",
        above=0)
    test_data_path: tuple = flag((), "indexed datasets whose loss is reported", nargs="+")
    save_interval: int = flag(50, "iterations between checkpoints", at_least=1)
    load_optim: bool = flag(True, "start from the checkpoint's optimizer state; "
                                  "--no-load-optim: start with a fresh one")

    def check(self) -> None:
        if self.rounds > self.lr_wsd_decay_iters:
            raise UserError(f"--rounds {self.rounds} is more than --lr-wsd-decay-iters "
                            f"{self.lr_wsd_decay_iters}. Give fewer rounds.")

    @property
    def bounds(self) -> list[int]:
        """[rounds + 1] the iterations at which segments begin, and the last one ends."""
        return [self.lr_wsd_decay_iters * number // self.rounds
                for number in range(self.rounds + 1)]


@dataclass(frozen=True)
class AlternateRequest(SelectionRequest):
    alternate: AlternateConfig
    onset: OnsetConfig


@dataclass(frozen=True, kw_only=True)
class AlternationKey(LossesKey):
    rounds: int
    max_epochs: float
    load_optim: bool
    order_seed: int


@dataclass(frozen=True)
class Round:
    """selected: samples, each as often as it is selected; kept: those that the round before had
    selected, too, None of the first; blend: what the segment was fed."""

    first_iteration: int
    selected: int
    kept: int | None
    blend: tuple[BlendPart, ...]


@dataclass(frozen=True)
class Alternation:
    """``result.json``."""

    before: Losses
    after: Losses
    tokens: int
    rounds: tuple[Round, ...]


@dataclass(frozen=True)
class _Run:
    request: AlternateRequest
    onset: Onset

    @property
    def config(self) -> AlternateConfig:
        return self.request.alternate

    @property
    def folder(self) -> Path:
        return Path(self.request.onset.run_dir)

    def round_folder(self, number: int) -> Path:
        return self.folder / "rounds" / str(number)


def alternate(request: AlternateRequest) -> None:
    """All ranks call this."""
    config = request.alternate
    onset = request.open(request.onset, config.test_data_path)
    key = _key(_Run(request, onset))
    tokens_of_a_round = config.lr_wsd_decay_iters * onset.job.batch.global_batch_size \
        * onset.job.model.seq_length // config.rounds
    run = _Run(request.for_annealing(tokens_of_a_round), onset)
    directory, artefact = RunDirectory(run.folder), Artefact(run.folder, "an annealing in rounds")
    with directory.entered("alternate", request):
        _alternate(run, artefact, key)


def _alternate(run: _Run, artefact: Artefact, key: AlternationKey) -> None:
    config = run.config
    state = parallel.on_rank_zero(lambda: artefact.state(key))
    if state is State.FINISHED:
        parallel.say(f"{run.folder} has already been annealed.")
        return
    if state is State.NEW:
        parallel.on_rank_zero(lambda: artefact.begin(key))
    for number in range(config.rounds):
        if number + 1 == config.rounds or _done(run) < config.bounds[number + 1]:
            losses = _round(run, number)
    parallel.on_rank_zero(lambda: _finish(run, losses))
    parallel.on_rank_zero(lambda: artefact.finish(key))


def _key(run: _Run) -> AlternationKey:
    request, config, onset = run.request, run.config, run.onset
    if request.pilot.at == "merged":
        raise UserError("--at merged is not supported by alternate: the later rounds have no "
                        "training behind them whose states could be averaged. Use --at checkpoint "
                        "or --at pilot.")
    return AlternationKey.of(
        onset, dataclasses.replace(request.measure, pilot=request.pilot.in_one_spelling()),
        dataclasses.replace(request.selection, sketch_rows=SelectionConfig().sketch_rows),
        tuple(dataset_digests(config.test_data_path).values()),
        lr_wsd_decay_iters=config.lr_wsd_decay_iters, rounds=config.rounds,
        max_epochs=config.max_epochs, load_optim=config.load_optim,
        order_seed=onset.job.batch.seed)


def _done(run: _Run) -> int:
    """The iteration of the newest checkpoint."""
    def look() -> int:
        newest = checkpoint.latest(run.folder / "checkpoints")
        return 0 if newest is None else int(newest.name.removeprefix("iter_"))

    return parallel.on_rank_zero(look)


def _round(run: _Run, number: int) -> dict[str, Losses]:
    """Selects at the beginning of a segment and trains on it; the losses before and after all of
    the annealing, once this is the last segment."""
    config, job, bounds = run.config, run.onset.job, run.config.bounds
    masks = _select(run, number)
    is_last, found = number + 1 == config.rounds, dict[str, Losses]()
    with grid.model_parallel(job.layout, job.num_model_chunks):
        request = blend.BlendRequest.for_job(
            job, bounds[number + 1] - bounds[number], job.batch.seed + number,
            run.round_folder(number) / "cache", run.onset.checkpoint.tokenizer_digest)
        dataset, parts = blend.build_blend(Blend(run.onset.pool.prefixes), masks, request,
                                           BlendRules(max_epochs=config.max_epochs))
        for part in parts:
            parallel.say(f"round {number + 1} of {config.rounds}: {part}")
        parallel.on_rank_zero(lambda: files.write_json(
            run.round_folder(number) / "blend.json", [dataclasses.asdict(part) for part in parts]))
        chunks = model.build(job)

        def losses(when: str) -> None:
            if is_last:
                found[when] = Losses(**set_losses(
                    chunks, job.model, job.batch, valid=run.onset.valid.prefixes,
                    test=config.test_data_path))

        segments = [*(Segment(first, None) for first in bounds[:number]),
                    Segment(bounds[number], dataset)]
        decay(Decay(job, run.onset.checkpoint, segments, config.lr_wsd_decay_iters, run.folder,
                    f"round {number + 1}", config.load_optim, config.save_interval,
                    stop=bounds[number + 1]), chunks, when_loaded=lambda: losses("before"))
        losses("after")
    return found


def _select(run: _Run, number: int) -> dict:
    """The masks of a segment, made if they are not there."""
    request, onset, folder = run.request, run.onset, run.round_folder(number)
    settings = request.measure
    if number:
        # The learning rate has fallen by then, which is what a pilot would be for.
        settings = dataclasses.replace(settings, pilot=PilotConfig(at="checkpoint"))
        first = run.folder / "checkpoints" / f"iter_{run.config.bounds[number]:07d}"
        onset = dataclasses.replace(onset, checkpoint=checkpoint.open_checkpoint(first))
    measured = measure(settings, onset, folder)
    key = solve_step.selection_key(request.selection, request.curvature, measured, request.sketch)
    target = selected.selection_folder(folder, _NAME)
    artefact = Artefact(target, "a selection")
    if not parallel.on_rank_zero(lambda: artefact.matches(key)):
        solve_step.solve_and_write(request.selection, measured, request.sketch.seed, target,
                                   begin=lambda: artefact.begin(key))
        parallel.on_rank_zero(lambda: artefact.finish(key))
    summary = parallel.on_rank_zero(lambda: SelectionSummary.read(target))
    return selected.load_masks(target, onset.pool.prefixes, summary.mask_digests)


def _finish(run: _Run, losses: dict[str, Losses]) -> None:
    """Writes the result and says what it is (rank 0)."""
    config, batch = run.config, run.onset.job.batch
    counts = [_counts(run, number) for number in range(config.rounds)]
    kept = [None, *(int(np.minimum(before, now).sum())
                    for before, now in itertools.pairwise(counts))]
    rounds = tuple(
        Round(config.bounds[number], int(counts[number].sum()), kept[number], tuple(
            typed_json.from_json(BlendPart, part)
            for part in files.read_json(run.round_folder(number) / "blend.json")))
        for number in range(config.rounds))
    tokens = config.lr_wsd_decay_iters * batch.global_batch_size * run.onset.job.model.seq_length
    result = Alternation(losses["before"], losses["after"], tokens, rounds)
    files.write_json(run.folder / "result.json", typed_json.to_json(result))
    for part in rounds[1:]:
        print(f"iteration {part.first_iteration}: {part.kept} of {part.selected} samples stay",
              flush=True)
    for kind in ("valid", "test"):
        before, after = (getattr(of, kind).get("all") for of in (result.before, result.after))
        if after is not None:
            print(f"{kind} loss: {before:.4f} before, {after:.4f} after", flush=True)


def _counts(run: _Run, number: int) -> np.ndarray:
    """[samples] how often each is in the selection of a round."""
    folder = selected.selection_folder(run.round_folder(number), _NAME)
    names = indexed.prefix_names(run.onset.pool.prefixes)
    return np.concatenate([SampleMask.load(selected.mask_path(folder, names[prefix])).counts
                           for prefix in run.onset.pool.prefixes])
