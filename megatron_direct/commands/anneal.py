"""``megatron-direct anneal``: the decay phase over the masked blend, and its losses.

An *arm* is one annealing: over a selection of the run, by its name, or over as many samples drawn
at ``random``. Arms start from one checkpoint, optimizer included, and see the same number of tokens
in batches of the same order of work under the same schedule; only the masks differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from megatron_direct.commands.arm import RANDOM, AnnealedArm, AnnealRequest, ArmKey, checked_arm
from megatron_direct.data.mask import SampleMask
from megatron_direct.mcore import blend, grid, model
from megatron_direct.mcore.checkpoint import load_model
from megatron_direct.mcore.merging import Average
from megatron_direct.mcore.object_storage import read_object_stores
from megatron_direct.mcore.training_folder import latest
from megatron_direct.runtime import parallel
from megatron_direct.runtime.manifest import Artefact, State
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.selection.baselines import random_selection
from megatron_direct.steps import selected
from megatron_direct.steps.annealed import (
    ArmResult,
    Losses,
    average_folder,
    measured_on,
    require_same_tests,
    write_composition,
)
from megatron_direct.steps.decay import Decay, Segment, decay, set_losses
from megatron_direct.steps.merged import find_states, make_average
from megatron_direct.steps.selected import SelectionSummary


def anneal(request: AnnealRequest) -> None:
    """Anneals one arm, or carries on where a killed run left its last checkpoint; all ranks call
    this."""
    config = request.anneal
    read_object_stores(config.object_storage_cache_path)
    run = RunDirectory(config.run_dir)
    parallel.on_rank_zero(run.require)
    origin, summary = parallel.on_rank_zero(
        lambda: selected.find_selection(run.path, config.selection_name))
    arm = checked_arm(request, origin)
    with run.entered("anneal", request):
        _anneal(arm, run, summary)


def _anneal(arm: AnnealedArm, run: RunDirectory, summary: SelectionSummary) -> None:
    config = arm.config
    masks = _drawn_masks(arm, summary) if config.selection == RANDOM else selected.load_masks(
        selected.selection_folder(run.path, config.selection_name), arm.origin.data_path,
        summary.mask_digests)
    key, artefact = arm.key(masks), Artefact(arm.folder, "an annealed arm")
    state = parallel.on_rank_zero(lambda: artefact.state(key))
    if state is State.FINISHED:
        parallel.say(f"{arm.folder} has already been annealed.")
    else:
        parallel.on_rank_zero(lambda: require_same_tests(arm.folder, arm.tests))
        if state is State.NEW:
            parallel.on_rank_zero(lambda: _begin(arm, masks, artefact, key))
        result = _run(arm, masks)
        parallel.on_rank_zero(lambda: result.write(arm.folder))
        parallel.on_rank_zero(lambda: artefact.finish(key, measured_on(arm.tests)))
    if config.average_last:
        _average(arm)


def _run(arm: AnnealedArm, masks: Mapping[str, SampleMask]) -> ArmResult:
    config, job = arm.config, arm.job
    found: dict[str, dict] = {}
    with grid.model_parallel(job.layout, job.num_model_chunks):
        request = blend.BlendRequest.for_job(job, config.lr_wsd_decay_iters, job.batch.seed,
                                             arm.folder / "cache", arm.checkpoint.tokenizer_digest)
        dataset, parts = blend.build_blend(arm.blend, {**masks, **arm.parts}, request, arm.rules)
        for part in parts:
            parallel.say(f"{config.arm}: {part}")
        chunks = model.build(job)

        def measure(when: str) -> None:
            found[when] = set_losses(chunks, job.model, job.batch,
                                     valid=arm.origin.valid_data_path, test=arm.test)

        decay(Decay(job, arm.checkpoint, [Segment(0, dataset)], config.lr_wsd_decay_iters,
                    arm.folder, f"anneal {config.arm}", config.load_optim, config.save_interval),
              chunks, when_loaded=lambda: measure("before"))
        measure("after")
    return ArmResult(config.arm, Losses(**found["before"]), Losses(**found["after"]),
                     request.num_sequences * job.model.seq_length, tuple(parts))


def _average(arm: AnnealedArm) -> None:
    """The average of the arm's last states, and its losses."""
    job, annealed = arm.job, parallel.on_rank_zero(lambda: ArmResult.read(arm.folder))
    states = find_states([str(arm.folder / "checkpoints")], arm.config.average_last, None,
                         "--average-last")
    folder = average_folder(arm.folder, len(states))
    make_average(Average.uniform(states), folder)
    if parallel.on_rank_zero((folder / "result.json").is_file):
        return
    with grid.model_parallel(job.layout, job.num_model_chunks):
        chunks = model.build(job.of_main_loss)
        load_model(parallel.on_rank_zero(lambda: latest(folder)), chunks)
        after = Losses(**set_losses(chunks, job.model, job.batch,
                                    valid=arm.origin.valid_data_path, test=arm.test))
    result = dataclasses.replace(annealed, after=after, arm=f"{annealed.arm}, last "
                                 f"{len(states)} averaged")
    parallel.on_rank_zero(lambda: result.write(folder))
    parallel.say(f"{result.arm}: test loss {after.test.get('all', float('nan')):.4f}, "
                 f"{annealed.after.test.get('all', float('nan')):.4f} without averaging"
                 if arm.test else f"{result.arm}: {folder}")


def _drawn_masks(arm: AnnealedArm, summary: SelectionSummary) -> dict[str, SampleMask]:
    """Of as many samples as the selection has, drawn at random."""
    def draw() -> dict[str, SampleMask]:
        samples = arm.pool
        chosen = random_selection(np.setdiff1d(samples.usable, summary.not_finite),
                                  summary.num_select, arm.job.batch.seed)
        return selected.masks_of(samples, [arm.digests[p] for p in samples.prefixes], chosen)

    return parallel.on_rank_zero(draw)


def _begin(arm: AnnealedArm, masks: Mapping[str, SampleMask], artefact: Artefact, key: ArmKey,
           ) -> None:
    """Writes what a random arm drew: no other place has it (rank 0)."""
    if arm.config.selection == RANDOM:
        selected.write_masks(arm.folder, masks)
        counts = np.concatenate([mask.counts for mask in masks.values()])
        chosen = np.repeat(np.arange(len(counts)), counts)
        write_composition(arm.folder, selected.composition(arm.pool, chosen))
    artefact.begin(key, measured_on(arm.tests))
