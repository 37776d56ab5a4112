"""An optimizer's state out of a checkpoint that was trained in the other precision.

Megatron's optimizer for bfloat16 has main parameters in float32, which its optimizer for float32
has not, and nests Adam's state one level deeper. Here a checkpoint of either serves both. The
distributed optimizer is one and the same in both, and needs nothing.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_direct.errors import UserError
from megatron_direct.mcore import compat
from megatron_direct.mcore.checkpoint_formats import tied_to_a_layout

# Before a parameter's own key; experts have an optimizer of their own.
_MAIN_PARAMETERS = re.compile(r"^(chained_\d+\.)?optimizer\.state\.fp32_param\.")
_CHAINED = re.compile(r"^chained_\d+\.")
_NESTED = "optimizer"


def has_chained_prefix(known: Iterable[str]) -> bool:
    """Whether the state of each of several optimizers is under its number, as earlier versions
    wrote it. known: names of a checkpoint's tensors."""
    return any(map(_CHAINED.match, known))


def lr_reached(stored: Mapping[str, Any]) -> float | None:
    """The largest learning rate of an optimizer's groups as they were saved, but for their own
    factors; stored: what a checkpoint holds of it beside tensors."""
    groups = [group for part in _parts(stored).values()
              for group in part.get(_NESTED, part).get("param_groups", ())]
    return max((float(group["lr"]) / group.get("lr_mult", 1.0) for group in groups
                if "lr" in group and not group.get("is_decoupled_lr")), default=None)


def load_state(checkpoint: Path, state: dict, stored: Mapping[str, Any],
               known: Collection[str]) -> dict:
    """The sharded ``state`` of an optimizer, loaded.

    known: names of the checkpoint's tensors.
    stored: what the checkpoint holds of the optimizer's state beside tensors. Of a model that was
    trained in float32 the weights are the main parameters.
    """
    from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    tied = tied_to_a_layout(known)
    if tied is not None:
        raise UserError(f"{checkpoint} holds its optimizer ({tied}) as it lies in one layout. Save "
                        "with --dist-ckpt-optim-fully-reshardable, or add --no-load-optim.")
    if _parts(state).keys() != _parts(stored).keys():
        raise UserError(
            f"{checkpoint} was saved by {_told(stored)}, and this layout has {_told(state)}: "
            "distributed experts have one of their own. Give the --expert-model-parallel-size of "
            "the training, or add --no-load-optim.")

    def where_it_is(entry):
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or entry.key in known:
            return entry
        of_model = dataclasses.replace(entry, key=_MAIN_PARAMETERS.sub("", entry.key))
        # A factory's tensors have longer keys; Megatron names one that is missing.
        if isinstance(entry, ShardedTensor) and of_model.key not in known:
            raise UserError(f"{checkpoint} holds no {entry.key}, so its optimizer cannot be "
                            "loaded. Add --no-load-optim to start with a fresh one.")
        return of_model

    nested = {number: _NESTED in part for number, part in _parts(state).items()}
    loaded = compat.load_sharded(
        {_NESTED: dict_list_map_inplace(where_it_is, state)}, checkpoint)[_NESTED]
    for number, part in _parts(loaded).items():
        was_nested = _NESTED in _parts(stored)[number]
        if was_nested != nested[number]:
            _move_settings(_parts(stored)[number], part, was_nested)
    return loaded


def _told(state: Mapping) -> str:
    count = len(_parts(state))
    return "one optimizer" if count == 1 else f"{count} optimizers"


def _parts(state: Mapping) -> Mapping:
    """By number, of optimizers that are chained; else one, under 0."""
    return state if 0 in state else {0: state}


def _move_settings(stored: Mapping, loaded: dict, was_nested: bool) -> None:
    """Learning rates, steps and the like, from where they were to where they belong."""
    settings, place = (stored[_NESTED], loaded) if was_nested else (stored, loaded[_NESTED])
    place["param_groups"] = [{**group, "params": own["params"]} for group, own in zip(
        settings["param_groups"], place["param_groups"], strict=True)]
    if "common_step" in settings["state"]:
        place["state"]["common_step"] = settings["state"]["common_step"]
