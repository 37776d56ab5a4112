"""``--dry-run``: the exact commands, which rank would hold what, and what a selection would take.

Nothing is written into the run directory. Time and memory are estimated where as many ranks were
started as the run would have, from a pass over the model that is measured once (``plan``).
"""

from __future__ import annotations

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from megatron_direct.commands.plan import HERE, PlanConfig, PlanRequest, estimated, in_words
from megatron_direct.commands.requests import SelectionRequest
from megatron_direct.commands.select import SelectRequest
from megatron_direct.config import BatchConfig, ModelConfig, ParallelConfig
from megatron_direct.errors import UserError
from megatron_direct.mcore.checkpoint import Checkpoint, read_checkpoint
from megatron_direct.runtime import parallel, ranks
from megatron_direct.settings import Settings, fields_in_order, flag_name
from megatron_direct.steps.placement import Placement


def show(calls: list[tuple[str, Any]], planned: Any) -> None:
    """Prints on rank 0; all ranks call this.

    calls: commands and their requests, in order. planned: the request whose layout and model count.
    """
    lines = ["commands, on every rank:"]
    lines += [f"  {command_line(name, request)}" for name, request in calls]
    if hasattr(planned, "given") or hasattr(planned, "model"):  # else no model is built
        placed = placement(planned, planned.layout)
        lines += [*placed.lines(), *_estimate(planned, placed)]
    parallel.say("\n".join(lines))


def _estimate(request: Any, placed: Placement) -> list[str]:
    """Of a selection, and of the annealing that is asked for with it."""
    if not isinstance(request, SelectRequest):
        return []
    if placed.model is None:
        return []  # there is no checkpoint yet
    if placed.model.hybrid_layer_pattern:
        return ["time and memory of hybrid models are not estimated"]
    if placed.num_ranks != parallel.world_size():
        return ["time and memory: start the dry run on the ranks that the run will have, or see "
                "megatron-direct plan"]
    onset, annealing = request.onset, getattr(request, "anneal", None)
    plan = PlanConfig(
        load=onset.load, data_path=onset.data_path, valid_data_path=onset.valid_data_path,
        machine=HERE, object_storage_cache_path=onset.object_storage_cache_path,
        lr_wsd_decay_iters=0 if annealing is None else annealing.lr_wsd_decay_iters)
    asked = {f.name: getattr(request, f.name) for f in dataclasses.fields(SelectionRequest)}
    lines = [in_words(*estimated(PlanRequest(plan, **asked)))]
    if request.proxy.proxy_load:
        lines.append("the smaller model's forward pass over the pools (--proxy-load) comes on top: "
                     "it is not estimated")
    return lines


def with_anneal_tokens(request: SelectRequest, iterations: int) -> SelectRequest:
    """What `select` is asked by a launch that anneals for so many iterations; as it is where the
    number of samples does not depend on it, or there is no checkpoint yet."""
    checkpoint = _checkpoint(request) if request.selection.is_auto else None
    if checkpoint is None:
        return request
    model = checkpoint.settings(ModelConfig, request.given.model)
    batch = checkpoint.settings(BatchConfig, request.given.batch)
    return request.for_annealing(iterations * batch.global_batch_size * model.seq_length)


def command_line(name: str, request: Any) -> str:
    """The command whose flags make this request; those that are at their defaults are left out."""
    words = ["megatron-direct", name]
    seen: set[str] = set()
    for f in fields_in_order(type(request)):
        for key, value in _set_in(getattr(request, f.name), f.metadata.get("groups")).items():
            if key not in seen:
                words += _flag(key, value)
                seen.add(key)
    return shlex.join(words)


def placement(request: Any, layout: ParallelConfig,
              environment: Mapping[str, str] = os.environ) -> Placement:
    """Of the ranks of this launch; of a process alone, of the launch script's variables."""
    hosts = parallel.gather_objects(ranks.discover().node)
    if len(hosts) > 1:
        count, per_node = len(hosts), hosts.count(0)
    else:
        smallest = layout.tensor_model_parallel_size * layout.pipeline_model_parallel_size
        per_node = _number(environment, "GPUS_PER_NODE", smallest)
        count = per_node * _number(environment, "NUM_NODES", 1)
    model = _model(request)
    if model is not None:
        layout.require_fits(model, count)
    return Placement(layout, count, per_node, model)


def _set_in(group: Any, of_checkpoint: Sequence[str] | None) -> dict[str, Any]:
    """What of a group of flags is not at its default; of a checkpoint's settings, what was given.

    of_checkpoint: those of its groups that the command takes; None for all.
    """
    if isinstance(group, Settings):
        return {f.name: getattr(group, f.name) for f in dataclasses.fields(group)
                if f.metadata and getattr(group, f.name) != f.default}
    return {key: value for part, values in vars(group).items()
            if of_checkpoint is None or part in of_checkpoint for key, value in values.items()}


def _flag(key: str, value: Any) -> list[str]:
    if isinstance(value, bool):
        return [flag_name(key if value else f"no_{key}")]
    return [flag_name(key), *map(str, value if isinstance(value, tuple | list) else [value])]


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name) or str(default)
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{name} is {text!r}: expected a whole number of 1 or more.")
    return int(text)


def _model(request: Any) -> ModelConfig | None:
    """That of the request, or of its checkpoint if there is one already."""
    # Where the size of the vocabulary is read from datasets later: one that every layout divides.
    some_size = request.layout.tensor_model_parallel_size * 128
    if isinstance(getattr(request, "model", None), ModelConfig):
        model = request.model
        return dataclasses.replace(model, vocab_size=model.vocab_size or some_size)
    checkpoint = _checkpoint(request)
    if checkpoint is None:
        return None
    vocab_size = checkpoint.arguments.get("vocab_size") or some_size
    return checkpoint.settings(ModelConfig, {**request.given.model, "vocab_size": vocab_size})


def _checkpoint(request: Any) -> Checkpoint | None:
    load = getattr(getattr(request, "onset", None), "load", "")
    return read_checkpoint(load) if load and os.path.exists(load) else None
