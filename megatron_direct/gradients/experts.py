"""What the hooks note of mixture-of-experts layers (see ``hooks``).

An expert gets tokens of all samples together, sorted by Megatron's token dispatcher, and with
expert parallelism those of other ranks too. To know whose they are, each token's sample number goes
through the same dispatcher, as a hidden state of width 1, just before the token itself does.
Samples are numbered 0 .. ep * b - 1, by expert-parallel rank and row of its micro-batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch

from megatron_direct.errors import UserError
from megatron_direct.gradients.pieces import OuterProducts, RoutedOuterProducts
from megatron_direct.mcore import grid

# (field of TransformerConfig, the values it may have, the flag that gives it)
_REQUIRED = (
    ("moe_aux_loss_coeff", (0, 0.0), "--moe-aux-loss-coeff 0"),
    ("moe_z_loss_coeff", (None, 0, 0.0), "no --moe-z-loss-coeff"),
    ("moe_expert_capacity_factor", (None,), "no --moe-expert-capacity-factor"),
    ("moe_input_jitter_eps", (None,), "no --moe-input-jitter-eps"),
    ("moe_router_load_balancing_type", ("none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
     "--moe-router-load-balancing-type none"),
    ("moe_shared_expert_overlap", (False,), "no --moe-shared-expert-overlap"),
    ("add_bias_linear", (False,), "--disable-bias-linear"),
)


def watched(moe: Any) -> Iterator[tuple[torch.nn.Module, Callable]]:
    """(layer, watch) of router, experts one by one, and the gate of the shared experts.

    Raises UserError under settings that tie the samples of a batch to one another.
    """
    _require_independent_samples(moe.config)
    routing = _Routing(moe.token_dispatcher)
    yield moe.router, routing.watch_router
    for number, expert in enumerate(getattr(moe.experts, "local_experts", ())):
        for linear in (expert.linear_fc1, expert.linear_fc2):
            yield linear, functools.partial(routing.watch_linear, number)
    if hasattr(moe.experts, "linear_fc1"):  # Transformer Engine's, all experts in one
        for linear in (moe.experts.linear_fc1, moe.experts.linear_fc2):
            yield linear, routing.watch_grouped_linear
    if moe.shared_experts is not None:
        yield moe.shared_experts, _shared_experts_gate


def _require_independent_samples(config) -> None:
    for field, allowed, flag in _REQUIRED:
        found = getattr(config, field)
        if found not in allowed:
            raise UserError(
                f"per-sample gradients of experts need {field} in {allowed}, but it is {found}. "
                f"Build the model for selection with {flag} (Megatron-LM's flag).")


class _Routing:
    """One layer's routing in the micro-batch that passes through it."""

    def __init__(self, dispatcher):
        self._dispatcher = dispatcher
        self._samples: tuple[torch.Tensor, ...] = ()  # of each local expert's tokens: [n] int64
        self._num_samples = 0

    def watch_router(self, router, arguments, _keywords, output):
        inputs = arguments[0].detach()  # [s, b, h], this rank's slice under sequence parallelism
        probabilities, routing_map = output  # [s * b, experts]
        self._follow(inputs.shape[:2], probabilities.detach(), routing_map)

        def pieces(probability_grads):
            grads = _logit_grads(router, inputs, probability_grads)
            if grads.dtype != inputs.dtype:  # --moe-router-dtype; no row is of float64
                grads = grads.float()
            yield router.weight, OuterProducts(inputs.to(grads.dtype), grads)

        return pieces

    def _follow(self, shape: torch.Size, probabilities, routing_map) -> None:
        """Sends the sample numbers of [s, b] tokens where the tokens will go."""
        length, size = shape
        self._num_samples = size * grid.expert_size()
        own = grid.own_rows(size)
        numbers = torch.arange(own.start, own.stop, dtype=torch.float32,
                               device=probabilities.device)
        dispatcher = self._dispatcher
        with torch.no_grad():
            sent = dispatcher.dispatch_preprocess(
                numbers.repeat(length).view(length, size, 1), routing_map, probabilities)
            arrived, counts, _ = dispatcher.dispatch_postprocess(*dispatcher.token_dispatch(*sent))
        self._samples = arrived[:, 0].long().split(counts.tolist())

    def watch_linear(self, expert: int, layer, arguments, _keywords, _output):
        """Tokens [n, i] in and [n, o] out; the dispatcher does what messages there are."""
        inputs = arguments[0].detach()
        samples, num_samples = self._samples[expert], self._num_samples

        def pieces(output_grads):
            yield layer.weight, RoutedOuterProducts(inputs, output_grads, samples, num_samples)

        return pieces

    def watch_grouped_linear(self, layer, arguments, keywords, _output):
        """All experts' tokens [n, i] in and [n, o] out, and how many each expert has."""
        inputs = arguments[0].detach()
        counts = arguments[1] if len(arguments) > 1 else keywords["m_splits"]
        all_samples, num_samples = self._samples, self._num_samples

        def pieces(output_grads):
            parts = zip(inputs.split(counts), output_grads.split(counts), all_samples, strict=True)
            for number, (some, grads, samples) in enumerate(parts):
                yield (getattr(layer, f"weight{number}"),
                       RoutedOuterProducts(some, grads, samples, num_samples))

        return pieces


def _logit_grads(router, inputs: torch.Tensor, probability_grads: torch.Tensor) -> torch.Tensor:
    """[s, b, experts] gradients of the logits, by going through the router's choice once more."""
    with torch.enable_grad():
        logits = router.gating(inputs).detach().requires_grad_(True)
        probabilities, _ = router.routing(logits)
        return torch.autograd.grad(probabilities, logits, probability_grads)[0]


def _shared_experts_gate(shared, arguments, _keywords, output):
    """y = sigmoid(x . w) f(x): with p = sigmoid(x . w) the logit's gradient is <dy, y> (1 - p)."""
    inputs, outputs = arguments[0].detach(), output.detach()

    def pieces(output_grads):
        if shared.gate_weight is not None:
            gate = torch.sigmoid(torch.nn.functional.linear(inputs, shared.gate_weight))
            logit_grads = (output_grads * outputs).sum(-1, keepdim=True) * (1 - gate)
            yield shared.gate_weight, OuterProducts(inputs, logit_grads)

    return pieces
