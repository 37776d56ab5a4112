"""Weights that are the same in every layout, and whole matrices put together from ranks' shards.

``fill_by_hash`` sets each entry from a hash of its place in the whole model. ``pieces`` takes what
a rank holds of a vector over the parameters out of the rank, and ``assemble`` puts the ranks'
pieces together, after it has seen that copies of an entry agree.
"""

from __future__ import annotations

import numpy as np
import torch
from tiny_models import expert_bias

from megatron_direct.gradients import hashing

# Two ranks that compute the same entry may sum in another order; fp32 rounding of sums of some
# thousand terms stays below this.
COPIES_RTOL = {np.dtype(np.float64): 1e-12, np.dtype(np.float32): 1e-5}


def fill_by_hash(shards, scale: float = 0.3, seed: int = 0) -> None:
    """Entries uniform in [-scale, scale]; the weights of norms have 1 added, as is usual."""
    for shard in shards:
        rows = hashing.hash64(hashing.stream(seed, "weight", shard.name), shard.rows)
        hashes = hashing.hash64(0, rows[:, None] ^ hashing.hash64(1, shard.columns)[None])
        values = hashes.double() * (scale / 2**63)
        if "norm" in shard.name and shard.name.endswith("weight"):
            values += 1.0
        with torch.no_grad():
            shard.parameter.copy_(values.view(shard.parameter.shape))


def fill_expert_bias(chunks) -> None:
    """The biases on the choice of experts are buffers, no parameters."""
    for chunk in chunks:
        for name, buffer in chunk.named_buffers():
            if name.endswith("expert_bias"):
                buffer.copy_(expert_bias(len(buffer)))


def pieces(shards, tensors) -> list[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    """(name, rows, columns, values [rows, columns]) of a tensor for each shard."""
    return [(shard.name, shard.rows.numpy(), shard.columns.numpy(),
             shard.as_matrix(tensor.detach()).numpy())
            for shard, tensor in zip(shards, tensors, strict=True)]


def assemble(pieces_of_ranks) -> dict[str, np.ndarray]:
    """{name: whole matrix} from the pieces of all ranks; every entry there, all copies equal."""
    everything = [piece for rank in pieces_of_ranks for piece in rank]
    shapes: dict[str, tuple[int, int]] = {}
    for name, rows, columns, _ in everything:
        known = shapes.get(name, (0, 0))
        shapes[name] = (max(known[0], int(rows.max()) + 1), max(known[1], int(columns.max()) + 1))
    whole = {name: np.full(shape, np.nan) for name, shape in shapes.items()}
    for name, rows, columns, values in everything:
        place = np.ix_(rows, columns)
        before = whole[name][place]
        seen = ~np.isnan(before)
        scale = max(float(np.abs(values).max(initial=0.0)), np.finfo(values.dtype).tiny)
        difference = float(np.abs(before - values)[seen].max(initial=0.0)) / scale
        assert difference <= COPIES_RTOL[values.dtype], (
            f"copies of {name} differ by {difference:.1e} relative to its largest entry")
        whole[name][place] = values
    missing = [name for name, matrix in whole.items() if np.isnan(matrix).any()]
    assert not missing, f"no rank holds some entries of {missing}, or they are not finite"
    return whole
