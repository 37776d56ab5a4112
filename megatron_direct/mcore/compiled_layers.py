"""Layers whose ``forward`` is compiled by torch while the model trains.

Modules, and so the names of their parameters in checkpoints, stay as they are. A training iteration
has one shape, for which one compilation serves all layers of a kind; what has other shapes, such as
losses on documents, runs outside and as it is.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

import torch

from megatron_direct.runtime import parallel


class CompiledLayers:
    """What torch.compile makes of the transformer layers of ``chunks``, but for those with experts:
    their shapes change from batch to batch.

    backend: torch.compile's.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], backend: str | Callable = "inductor"):
        self._forwards = [(layer, torch.compile(layer.forward, dynamic=False, backend=backend))
                          for chunk in chunks for layer in _layers_of_one_shape(chunk)]
        self._failures = _Failures()
        self._is_reported = False

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While it is entered, the layers run compiled; a part that cannot be compiled runs as it
        is, and what the model itself raises is raised."""
        from torch._dynamo import config as tracing
        from torch._functorch import config as differentiation

        log = logging.getLogger("torch._dynamo.convert_frame")
        log.addFilter(self._failures)
        for layer, forward in self._forwards:
            layer.forward = forward
        try:
            with contextlib.ExitStack() as stack:
                # torch gives up a part before any of it was run: no collective runs twice.
                stack.enter_context(tracing.patch(suppress_errors=True))
                # Otherwise the backward pass is compiled while it runs, where a failure is raised;
                # not every torch has the setting.
                if hasattr(differentiation, "force_non_lazy_backward_lowering"):
                    stack.enter_context(
                        differentiation.patch(force_non_lazy_backward_lowering=True))
                yield
        finally:
            for layer, _ in self._forwards:
                del layer.forward
            log.removeFilter(self._failures)

    def report(self) -> None:
        """Says once, on one rank, what runs as it is; all ranks call this, after an iteration."""
        if self._is_reported:
            return
        self._is_reported = True
        found = parallel.gather_objects((len(self._forwards), self._failures.reasons))
        failed = [(rank, reasons) for rank, (_, reasons) in enumerate(found) if reasons]
        if not any(number for number, _ in found):
            parallel.say("--torch-compile has no effect: the model has no transformer layers "
                         "without experts.")
        elif failed:
            rank, reasons = failed[0]
            parallel.say(f"--torch-compile: {len(reasons)} parts of the layers could not be "
                         f"compiled on rank {rank}, and run as they are; {len(failed)} of "
                         f"{len(found)} ranks have such parts. The first reason: {reasons[0]}. "
                         "Install what is missing, or leave the flag out.")


class _Failures(logging.Filter):
    """Keeps the reasons of torch's warnings, which every rank would print for every part."""

    def __init__(self):
        super().__init__()
        self.reasons: list[str] = []

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if error is None or record.levelno < logging.WARNING:
            return True
        cause = getattr(error, "inner_exception", error)
        self.reasons.append(": ".join([type(cause).__name__, *str(cause).splitlines()[:1]]))
        return False


def _layers_of_one_shape(chunk: torch.nn.Module) -> Iterator[torch.nn.Module]:
    from megatron.core.transformer.moe.moe_layer import MoELayer
    from megatron.core.transformer.transformer_layer import TransformerLayer

    for layer in chunk.modules():
        if isinstance(layer, TransformerLayer) and not any(
                isinstance(part, MoELayer) for part in layer.modules()):
            yield layer
