"""An annealing in segments, each on a selection made at its beginning.

The learning rate decays over all of them. The selection is made of the checkpoint for the first,
of the weights where the segment before ended for the others.

    FOLDER/rounds/N/     sketches/, curvature/ and selections/direct/ of segment N, counted from 0
    FOLDER/checkpoints/  of the annealing; a checkpoint at the end of each segment is among them
    FOLDER/metrics.jsonl

What was killed carries on where it was, and ends with the losses of one that was not: at the
beginning of a segment both start from its checkpoint.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_direct.data import indexed
from megatron_direct.data.blend_plan import MAX_EPOCHS, Blend, BlendPart, BlendRules
from megatron_direct.data.mask import SampleMask
from megatron_direct.mcore import blend, checkpoint, grid, model, training_folder
from megatron_direct.mcore.checkpoint_formats import iteration_folder, iteration_of
from megatron_direct.runtime import files, parallel, typed_json
from megatron_direct.runtime.manifest import Artefact
from megatron_direct.selection.config import SelectionConfig
from megatron_direct.steps import selected, selection_request
from megatron_direct.steps import solve as solve_step
from megatron_direct.steps.annealed import Losses
from megatron_direct.steps.decay import Decay, Segment, decay, set_losses
from megatron_direct.steps.measure import MeasureSettings, measure
from megatron_direct.steps.onset import Onset
from megatron_direct.steps.pilot import PilotConfig
from megatron_direct.steps.selected import SelectionSummary

_NAME = "direct"  # of the selection of each round


@dataclass(frozen=True)
class Round:
    """selected: samples, each as often as it is selected; kept: those that the round before had
    selected, too, None of the first; blend: what the segment was fed."""

    first_iteration: int
    selected: int
    kept: int | None
    blend: tuple[BlendPart, ...]


@dataclass(frozen=True)
class Rounds:
    """measured_in: where the first selection is measured, or has been; None: in its own folder.
    max_epochs: over a pool within a segment; more is an error; None: as many as it takes."""

    onset: Onset
    measure: MeasureSettings
    selection: SelectionConfig
    folder: Path
    number: int
    iterations: int
    test_data_path: tuple[str, ...] = ()
    max_epochs: float | None = MAX_EPOCHS
    save_interval: int | None = None
    load_optim: bool = True
    measured_in: Path | None = None

    @property
    def bounds(self) -> list[int]:
        """[rounds + 1] the iterations at which segments begin, and the last one ends."""
        return [self.iterations * number // self.number for number in range(self.number + 1)]

    @property
    def tokens(self) -> int:
        """Of all of it."""
        job = self.onset.job
        return self.iterations * job.batch.global_batch_size * job.model.seq_length

    @property
    def tokens_of_a_round(self) -> int:
        return self.tokens // self.number

    def folder_of(self, number: int) -> Path:
        return self.folder / "rounds" / str(number)

    def train(self) -> dict[str, Losses]:
        """The losses before and after all of it; all ranks call this."""
        for number in range(self.number):
            if number + 1 == self.number or self._done() < self.bounds[number + 1]:
                losses = self._round(number)
        return losses

    def _done(self) -> int:
        """The iteration of the newest checkpoint."""
        def look() -> int:
            newest = training_folder.latest(self.folder / "checkpoints")
            return 0 if newest is None else iteration_of(newest) or 0

        return parallel.on_rank_zero(look)

    def _round(self, number: int) -> dict[str, Losses]:
        """Selects at the beginning of a segment and trains on it; the losses, once it is the last.
        """
        job, bounds = self.onset.job, self.bounds
        masks = self._select(number)
        is_last, found = number + 1 == self.number, dict[str, Losses]()
        with grid.model_parallel(job.layout, job.num_model_chunks):
            request = blend.BlendRequest.for_job(
                job, bounds[number + 1] - bounds[number], job.batch.seed + number,
                self.folder_of(number) / "cache", self.onset.checkpoint.tokenizer_digest)
            dataset, parts = blend.build_blend(Blend(self.onset.pool.prefixes), masks, request,
                                               BlendRules(max_epochs=self.max_epochs))
            for part in parts:
                parallel.say(f"round {number + 1} of {self.number}: {part}")
            parallel.on_rank_zero(lambda: files.write_json(
                self.folder_of(number) / "blend.json",
                [dataclasses.asdict(part) for part in parts]))
            chunks = model.build(job)

            def losses(when: str) -> None:
                if is_last:
                    found[when] = Losses(**set_losses(
                        chunks, job.model, job.batch, valid=self.onset.valid.prefixes,
                        test=self.test_data_path))

            segments = [*(Segment(first, None) for first in bounds[:number]),
                        Segment(bounds[number], dataset)]
            decay(Decay(job, self.onset.checkpoint, segments, self.iterations, self.folder,
                        f"round {number + 1}", self.load_optim,
                        self.save_interval or self.iterations, stop=bounds[number + 1]),
                  chunks, when_loaded=lambda: losses("before"))
            losses("after")
        return found

    def _select(self, number: int) -> dict:
        """The masks of a segment, made if they are not there."""
        onset, folder, settings = self.onset, self.folder_of(number), self.measure
        measured_in = folder
        if number:
            # The learning rate has fallen by then, which is what a pilot would be for.
            settings = dataclasses.replace(settings, pilot=PilotConfig(at="checkpoint"))
            first = iteration_folder(self.folder / "checkpoints", self.bounds[number])
            onset = dataclasses.replace(onset, checkpoint=checkpoint.open_checkpoint(first))
        elif self.measured_in is not None:
            measured_in = self.measured_in
        measured = measure(settings, onset, measured_in)
        key = selection_request.selection_key(self.selection, settings.curvature, measured,
                                       settings.sketch)
        target = selected.selection_folder(folder, _NAME)
        artefact = Artefact(target, "a selection")
        if not parallel.on_rank_zero(lambda: artefact.matches(key)):
            solve_step.solve_and_write(self.selection, measured, settings.sketch.seed, target,
                                       begin=lambda _: artefact.begin(key))
            parallel.on_rank_zero(lambda: artefact.finish(key))
        summary = parallel.on_rank_zero(lambda: SelectionSummary.read(target))
        return selected.load_masks(target, onset.pool.prefixes, summary.mask_digests)

    def told(self) -> tuple[Round, ...]:
        """What each round was, once all are done (rank 0)."""
        counts = [self.counts(number) for number in range(self.number)]
        kept = [None, *(int(np.minimum(before, now).sum())
                        for before, now in itertools.pairwise(counts))]
        return tuple(
            Round(self.bounds[number], int(counts[number].sum()), kept[number], tuple(
                typed_json.from_json(BlendPart, part)
                for part in files.read_json(self.folder_of(number) / "blend.json")))
            for number in range(self.number))

    def counts(self, number: int) -> np.ndarray:
        """[samples] how often each is in the selection of a round (rank 0)."""
        folder = selected.selection_folder(self.folder_of(number), _NAME)
        names = indexed.prefix_names(self.onset.pool.prefixes)
        return np.concatenate([SampleMask.load(selected.mask_path(folder, names[prefix])).counts
                               for prefix in self.onset.pool.prefixes])
