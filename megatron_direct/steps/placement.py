"""Which rank of a layout holds what, before any of them is started.

Megatron numbers ranks with tensor parallelism innermost, then data, then pipeline parallelism:
rank = t + T (d + D p). Launchers fill one node after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_direct.config import ModelConfig, ParallelConfig

_MOST_LINES = 32


@dataclass(frozen=True)
class Placement:
    """model: None where it is not known yet, as when its checkpoint is still to be made."""

    layout: ParallelConfig
    num_ranks: int
    ranks_per_node: int
    model: ModelConfig | None = None

    @property
    def num_copies(self) -> int:
        return self.layout.data_parallel_size(self.num_ranks)

    def rank(self, tensor: int, copy: int, stage: int) -> int:
        return tensor + self.layout.tensor_model_parallel_size * (copy + self.num_copies * stage)

    def layers(self, stage: int) -> list[tuple[int, int]]:
        """First and last layer of each chunk that a stage holds, counted from 1."""
        assert self.model is not None
        stages, chunks = (self.layout.pipeline_model_parallel_size,
                          self.layout.num_model_chunks(self.model))
        count = self.model.num_layers // (stages * chunks)
        firsts = [(chunk * stages + stage) * count + 1 for chunk in range(chunks)]
        return [(first, first + count - 1) for first in firsts]

    def lines(self) -> Iterator[str]:
        """For a reader."""
        layout = self.layout
        tp, pp = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
        nodes = -(-self.num_ranks // self.ranks_per_node)
        sizes = f"TP {tp} x PP {pp} x DP {self.num_copies}"
        if layout.expert_model_parallel_size > 1:
            sizes += f", EP {layout.expert_model_parallel_size} among DP"
        yield f"{_count(self.num_ranks, 'rank')} on {_count(nodes, 'node')}: {sizes}"
        groups = [(copy, copy) for copy in range(self.num_copies)]
        if pp * len(groups) > _MOST_LINES:
            groups = [(0, self.num_copies - 1)]
        for stage in range(pp):
            for first, last in groups:
                yield f"  {self._line(stage, first, last)}"
        if self.ranks_per_node % tp and tp > 1 and nodes > 1:
            yield (f"  note: {self.ranks_per_node} ranks a node are no multiple of TP {tp}: some "
                   "tensor-parallel groups lie across nodes, where their traffic is slow.")

    def _line(self, stage: int, first_copy: int, last_copy: int) -> str:
        first = self.rank(0, first_copy, stage)
        last = self.rank(self.layout.tensor_model_parallel_size - 1, last_copy, stage)
        on = _span("node", first // self.ranks_per_node, last // self.ranks_per_node)
        copies = _span("copy", first_copy, last_copy, "copies")
        return (f"{_span('rank', first, last):<14} {on:<11} {copies:<10} stage {stage}: "
                f"{self._content(stage)}")

    def _content(self, stage: int) -> str:
        stages = self.layout.pipeline_model_parallel_size
        if self.model is None:
            parts = ["all layers" if stages == 1 else f"layers, part {stage + 1} of {stages}"]
        else:
            parts = [_span("layer", *chunk) for chunk in self.layers(stage)]
        if stage == 0:
            parts.insert(0, "embedding")
        if stage == stages - 1:
            parts.append("output layer")
        return ", ".join(parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _span(noun: str, first: int, last: int, plural: str = "") -> str:
    return f"{noun} {first}" if first == last else f"{plural or noun + 's'} {first}-{last}"
