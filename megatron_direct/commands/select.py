"""``megatron-direct select``: which K samples of the pools should the annealing see?

    RUN_DIR/pilot/              a short annealing, at whose end gradients are taken, if asked for
    RUN_DIR/proxy/              losses under a smaller model, if one was given
    RUN_DIR/sketches/           one row for each sample of pools and validation set
    RUN_DIR/curvature/          leading directions of the validation set's curvature
    RUN_DIR/selections/NAME/    the solution of the selection problem, and its masks

Each is an artefact with its own key, and is reused as long as that key is unchanged. So another
number of samples, objective or budget only solves the problem again; and so do other paths of the
same files, which the selection records.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_direct.commands.requests import SelectionRequest
from megatron_direct.data.mask import SampleMask
from megatron_direct.errors import UserError
from megatron_direct.evaluation.tokenizers import tokenizer_of
from megatron_direct.runtime import files, parallel, typed_json
from megatron_direct.runtime.manifest import Artefact
from megatron_direct.runtime.run_directory import RunDirectory
from megatron_direct.settings import Settings, flag, flag_name
from megatron_direct.steps import selection_request
from megatron_direct.steps import solve as solve_step
from megatron_direct.steps.annealed import is_annealed, is_random
from megatron_direct.steps.measure import Measured, measure
from megatron_direct.steps.onset import Onset, OnsetConfig
from megatron_direct.steps.proxy import ProxyConfig, measure_losses, open_proxy
from megatron_direct.steps.selected import SelectionOrigin, SelectionSummary, selection_folder


@dataclass(frozen=True)
class NameConfig(Settings):
    """Selection."""

    selection_name: str = flag("direct", "name of this selection; a run directory can hold several "
                               "(see `anneal --selection`)")
    tokenizer_model: str = flag("", "tokenizer that turns typical samples of each cluster back "
                                    "into text; default: their tokens are shown")

    def check(self) -> None:
        name = self.selection_name
        # anneal names the folders of random arms "random" and "random-NAME".
        if not name or is_random(name) or name.startswith(".") or \
                set(name) & set("/\\\0\n") or len(os.fsencode(name)) > files.LONGEST_NAME:
            raise UserError(
                f"--selection-name {name[:80]!r} is not a valid name: it must not be empty, begin "
                "with '.' or 'random-', contain / or \\ or a line end, be 'random', or have more "
                f"than {files.LONGEST_NAME} bytes. Choose another.")


@dataclass(frozen=True)
class SelectRequest(SelectionRequest):
    onset: OnsetConfig
    name: NameConfig = field(default_factory=NameConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)


def select(request: SelectRequest, annealing_iters: int | None = None) -> None:
    """All ranks call this.

    annealing_iters: iterations of the annealing to come, where they are known, for --num-select
    auto without --anneal-tokens.
    """
    onset = request.open(request.onset, trains=request.pilot.has_pilot)
    if annealing_iters is not None:
        request = request.for_annealing(
            annealing_iters * onset.job.batch.global_batch_size * onset.job.model.seq_length)
    tokenizer = None if not request.name.tokenizer_model else parallel.kept_on_rank_zero(
        lambda: tokenizer_of(request.name.tokenizer_model, onset.checkpoint, onset.job.model))
    proxy = open_proxy(request.proxy, request.sketch, onset, request.given)
    run = RunDirectory(request.onset.run_dir)
    with run.entered("select", request):
        # First what costs the least.
        losses = None if proxy is None else measure_losses(proxy, run.path / "proxy")
        measured = dataclasses.replace(measure(request.measure, onset, run.path), proxy=losses)
        _select(request, onset, measured, run.path,
                None if tokenizer is None else tokenizer.decode)


def _select(request: SelectRequest, onset: Onset, measured: Measured, run_path: Path,
            decode: Callable[[np.ndarray], str] | None) -> None:
    key = selection_request.selection_key(request.selection, request.curvature, measured,
                                          request.sketch)
    folder = selection_folder(run_path, request.name.selection_name)
    origin = dataclasses.replace(_origin(onset), tokenizer_model=request.name.tokenizer_model)
    if parallel.on_rank_zero(lambda: _is_there(folder, key, origin)):
        parallel.say(f"{folder} already holds this selection.")
        return
    artefact = Artefact(folder, "a selection")

    def begin(masks: Mapping[str, SampleMask]) -> None:
        _require_what_was_annealed(folder, masks)
        artefact.begin(key)

    solve_step.solve_and_write(request.selection, measured, request.sketch.seed, folder,
                               begin=begin, decode=decode)
    parallel.on_rank_zero(lambda: artefact.finish(key, dataclasses.asdict(origin)))


def _is_there(folder: Path, key: selection_request.SelectionKey, origin: SelectionOrigin) -> bool:
    """Whether it is finished, with these paths (rank 0). Another one of this name will give way,
    unless it was annealed."""
    artefact = Artefact(folder, "a selection")
    found = artefact.read()
    if found is not None and artefact.matches(key):
        others = _other_paths(found["details"], origin)
        if others:
            parallel.say(f"{folder} holds this selection with another {', '.join(others)}: it is "
                         "written again.")
        return not others
    if artefact.differs(key):
        if is_annealed(folder):
            raise UserError(f"{folder} holds a selection with other flags, and was annealed, or as "
                            "many samples at random were. Give this selection another name with "
                            "--selection-name.")
        parallel.say(f"the selection in {folder} was made with other flags, and will be replaced.")
    return False


def _other_paths(known: dict, origin: SelectionOrigin) -> list[str]:
    """Flags of the paths that a finished selection holds otherwise (known: its details). A key
    knows files by their digests, but anneal and the blend files read from the paths."""
    given = typed_json.to_json(origin)
    names = ["load", "data_path", "valid_data_path"]
    if origin.tokenizer_model:  # of a selection without one, typical samples are tokens
        names.append("tokenizer_model")
    return [flag_name(name) for name in names if known.get(name) != given[name]]


def _require_what_was_annealed(folder: Path, masks: Mapping[str, SampleMask]) -> None:
    """Raises UserError where arms were annealed on other masks (rank 0)."""
    if not (is_annealed(folder) and (folder / "selection.json").is_file()):
        return  # what was annealed says itself on which masks
    known = SelectionSummary.read(folder).mask_digests
    if sorted(known.values()) != sorted(mask.digest for mask in masks.values()):
        raise UserError(f"{folder} was annealed, and would hold other samples if it were written "
                        "again with these paths: perhaps another version of megatron-direct made "
                        "it. Give this selection another name with --selection-name, or the paths "
                        "that it was made with.")


def _origin(onset: Onset) -> SelectionOrigin:
    return SelectionOrigin(
        load=str(onset.checkpoint.path), checkpoint_digest=onset.checkpoint.digest,
        data_path=tuple(onset.pool.prefixes), valid_data_path=tuple(onset.valid.prefixes),
        digests=onset.digests, model=vars(onset.job.model))
