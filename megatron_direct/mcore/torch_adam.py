"""torch's own Adam inside Megatron's optimizers, whose loading Megatron gets wrong.

Without Apex and Transformer Engine, Megatron falls back to it. It then asks an optimizer that has
not stepped for its step; it gives all parameters one step tensor, which each of them would then
count up; and it looks for a step among the distributed optimizer's tensors, where it is not.
"""

from __future__ import annotations

import torch

from megatron_direct.mcore import compat


def _parts(optimizer) -> list:
    return getattr(optimizer, "chained_optimizers", [optimizer])


def _torch_adam_states(part) -> list[dict]:
    """[parameters] states of torch's own Adam inside a Megatron optimizer; [] for any other."""
    inner = part.optimizer
    if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        return []
    return [inner.state[p] for group in inner.param_groups for p in group["params"]]


def give_state(optimizer) -> None:
    for part in _parts(optimizer):
        parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
        for state, parameter in zip(_torch_adam_states(part), parameters, strict=False):
            if not state:
                state.update(step=torch.zeros(()), exp_avg=torch.zeros_like(parameter),
                             exp_avg_sq=torch.zeros_like(parameter))


def load(optimizer, loaded: dict) -> None:
    parts = _parts(optimizer)
    for part, state in zip(parts, [loaded] if len(parts) == 1 else
                           [loaded[key] for key in sorted(loaded)], strict=True):
        tensors = state.pop("param_state") if _torch_adam_states(part) and \
            "param_state" in state else None
        compat.take_schedules(part.optimizer.param_groups,
                              state.get("optimizer", state)["param_groups"])
        part.load_state_dict(state)
        states = _torch_adam_states(part)
        steps = [s.pop("step").clone() for s in states]
        if tensors is not None:
            part.load_parameter_state_from_fully_reshardable(tensors)
        for s, step in zip(states, steps, strict=True):
            s["step"] = step
