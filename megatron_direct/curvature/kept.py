"""Matrix products that are the same in every curvature product, kept from one to the next.

Of the eight matrix products that a linear layer takes in an exact Hessian-vector product, two know
nothing of the vector: the layer's output y = x W^T, and W's part in the gradient with respect to
x', which is the ordinary backward pass. Weights and samples stay the same throughout a Lanczos run,
so these are the same each time, bit for bit. Kept, they leave six, which is twice the three of a
gradient; a Gauss-Newton product keeps the first alone.

They take as much memory as the inputs and outputs of all linear layers, over all samples. Whatever
does not find room is computed again, with the same result.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class KeptProducts:
    """Room for so many bytes of them; ``num_bytes`` are taken.

    :meth:`begin` names what a model chunk is about to compute, which then takes a slot a linear
    layer, always in the same order.
    """

    def __init__(self, room: int):
        self._room, self.num_bytes = room, 0
        self._slots: dict[tuple[Hashable, int], Slot] = {}
        self._place: Hashable = None
        self._count = 0

    def begin(self, place: Hashable) -> None:
        self._place, self._count = place, 0

    def slot(self) -> Slot:
        """Of the next linear layer."""
        key = self._place, self._count
        self._count += 1
        return self._slots.setdefault(key, Slot(self))

    def take(self, size: int) -> bool:
        """Whether there is room for so many bytes more, which are then taken."""
        if self.num_bytes + size > self._room:
            return False
        self.num_bytes += size
        return True


class Slot:
    """The two products of one linear layer in one micro-batch, once they have been kept."""

    def __init__(self, products: KeptProducts):
        self._products = products
        self._kept: dict[str, torch.Tensor] = {}

    def once(self, name: str, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What ``compute`` returns, not to be written to; kept if there is room."""
        if name in self._kept:
            return self._kept[name]
        tensor = compute()
        if self._products.take(tensor.nbytes):
            self._kept[name] = tensor
        return tensor
