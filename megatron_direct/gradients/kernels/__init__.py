"""Ways of hashing a layer's gradients, one per file, and the choice among them.

All of them compute the same sketch, and differ in what it costs. The choice rests on shapes alone,
so that a run that is repeated makes the same choices and ends with the same bytes.
"""

from __future__ import annotations

from megatron_direct.gradients.hashes import Hashes
from megatron_direct.gradients.kernels import costs
from megatron_direct.gradients.kernels.entries import ByEntries
from megatron_direct.gradients.kernels.frames import ByFrames
from megatron_direct.gradients.kernels.kept_axis import ByKeptAxis
from megatron_direct.gradients.kernels.kernel import Kernel, Work
from megatron_direct.gradients.kernels.spectra import BySpectra
from megatron_direct.gradients.pieces import Entries, Piece

KERNELS: tuple[type[Kernel], ...] = (ByEntries, ByKeptAxis, BySpectra, ByFrames)


def cheapest(piece: Piece, hashes: Hashes, device_type: str, scaled: bool) -> type[Kernel]:
    """The kernel that adds a piece in the least time; scaled: by one that applies a scale."""
    able = [kernel for kernel in KERNELS
            if kernel.takes(piece, hashes, device_type) and (kernel.applies_scale or not scaled)]
    assert able, (type(piece).__name__, hashes.narrowed is not None, device_type)
    if len(able) == 1:
        return able[0]
    assert not isinstance(piece, Entries), "one kernel takes them"
    work, table = Work.of(piece, hashes), costs.of(device_type)
    return min(able, key=lambda kernel: kernel.cost(work, table))
