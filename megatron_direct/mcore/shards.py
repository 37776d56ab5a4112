"""What a rank's parameters are in the whole model: their names, rows and columns.

:func:`parameter_shards` reads them off Megatron's own sharded state dict, so that they are right
for whatever Megatron shards: gated MLPs, grouped QKV, padded vocabularies.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from megatron_direct.mcore import grid
from megatron_direct.runtime import host


@dataclass(frozen=True)
class ParameterShard:
    """A parameter as this rank holds it, and where it lies in the whole model.

    name: of the whole parameter, with the global layer number: the same in every layout.
    rows: [local rows] row numbers in the whole matrix (a vector's entries are its rows).
    columns: [local columns] column numbers; [0] for a vector.
    shape: (rows, columns) of the whole matrix.
    owned: True on exactly one rank of a copy of the model, for each entry: what sums over
        parameters (dot products) count. With expert parallelism, the ranks that share a set of
        experts are one copy.
    adds_gradient: the gradient on this rank is a summand of the whole gradient. False on all but
        one rank for a replicated parameter; True on both holders of tied embeddings, and where
        the gradient is partial.
    is_partial: a replicated parameter of which each tensor-parallel rank has a part of the
        gradient: its slice of the sequence (sequence parallelism), or its heads (norms of
        queries and keys).
    of_local_experts: only this expert-parallel rank has these entries, and its gradient is that
        of the samples of all data-parallel ranks which share the set of experts.
    of_vocabulary: a matrix of embeddings, of words or positions, or the output layer's.
    """

    name: str
    parameter: torch.nn.Parameter
    rows: torch.Tensor
    columns: torch.Tensor
    shape: tuple[int, int]
    owned: bool
    adds_gradient: bool
    is_partial: bool = False
    of_local_experts: bool = False
    of_vocabulary: bool = False

    def as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape as [local rows, local columns]."""
        return tensor.reshape(len(self.rows), len(self.columns))


def parameter_shards(chunks: Sequence[Any]) -> list[ParameterShard]:
    """One shard for each parameter of this rank's chunks, in the order of the chunks."""
    shards = []
    for chunk in chunks:
        sharded = chunk.sharded_state_dict(metadata=checkpoint_metadata())
        # Not of latents, which are whole on each rank.
        head_norms = chunk.config.qk_layernorm and not chunk.config.multi_latent_attention
        for local_name, parameter in chunk.named_parameters():
            of_heads = head_norms and re.search(r"attention\.[qk]_layernorm\.", local_name)
            shards.append(_parameter_shard(parameter, sharded[local_name], bool(of_heads)))
    return shards


def checkpoint_metadata(chained_prefix: bool = False) -> dict:
    """chained_prefix: whether the state of each of several optimizers, as experts have one of their
    own, is under its number. Megatron-LM writes it without."""
    from megatron.core import parallel_state

    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # The optimizer's state in the shape of the model's: it can be loaded in any layout.
        "distrib_optim_sharding_type": "fully_reshardable",
        # Gathered on the host of one data-parallel rank, which alone writes. The other way takes a
        # whole float32 copy of the weights on each GPU, and three on the host of each rank.
        "distrib_optim_fully_reshardable_mem_efficient": True,
        "chained_optim_avoid_prefix": not chained_prefix,
    }


def _parameter_shard(parameter: torch.nn.Parameter, sharded, of_heads: bool) -> ParameterShard:
    num_rows = parameter.shape[0]
    rows = torch.empty(num_rows, dtype=torch.int64)
    columns = torch.arange(parameter.numel() // num_rows)
    name, first_rows, rows_before, num_columns = "", {}, 0, len(columns)
    for tile, local_rows in _tiles(sharded, num_rows):
        axes = tile.prepend_axis_num
        name = _global_name(sharded.key, tile.global_offset[:axes])
        if tile.key not in first_rows:
            first_rows[tile.key] = rows_before
            rows_before += tile.global_shape[axes]
        offset = tile.global_offset[axes:]
        rows[local_rows] = first_rows[tile.key] + offset[0] + torch.arange(len(local_rows))
        if parameter.dim() == 2:
            columns = offset[1] + torch.arange(parameter.shape[1])
            num_columns = tile.global_shape[axes + 1]
    is_tied_copy = getattr(parameter, "shared", False)
    is_replica = (not getattr(parameter, "tensor_model_parallel", False)
                  and grid.tensor_rank() > 0)
    is_partial = of_heads or getattr(parameter, "sequence_parallel", False)
    of_local_experts = not getattr(parameter, "allreduce", True)
    return ParameterShard(
        name=name,
        parameter=parameter,
        rows=rows.to(parameter.device),
        columns=columns.to(parameter.device),
        shape=(rows_before, num_columns),
        owned=(not is_replica and not is_tied_copy
               and (of_local_experts or grid.expert_rank() == 0)),
        adds_gradient=not is_replica or is_partial,
        is_partial=is_partial,
        of_local_experts=of_local_experts,
        of_vocabulary=name.startswith(("embedding.", "output_layer.")),
    )


def _tiles(sharded, num_rows: int):
    """(tile, its local rows): one tile, or several where Megatron cuts a parameter.

    Those of a gated fc1 are parts of one matrix in the checkpoint; those of a Mamba layer's
    projection are matrices of their own, which are one below the other in the whole one.
    """
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if not isinstance(sharded, ShardedTensorFactory):
        yield sharded, torch.arange(num_rows)
        return
    # Built on row numbers in place of weights, the tiles say which rows went into each.
    row_numbers = torch.arange(num_rows)
    row_numbers = row_numbers.view(-1, *[1] * (sharded.data.dim() - 1)).expand(sharded.data.shape)
    for tile in sharded.build_fn(sharded.key, row_numbers, sharded.replica_id, None):
        yield tile, tile.data.reshape(len(tile.data), -1)[:, 0]


def _global_name(key: str, axes: tuple[int, ...]) -> str:
    """The key with the numbers of layer and expert in their places, where it does not have them.

    Megatron stacks what all layers have, and all experts, along axes in front.
    """
    numbers = list(axes)
    if numbers and re.search(r"layers\.\D", key):
        key = re.sub(r"layers\.", f"layers.{numbers.pop(0)}.", key, count=1)
    if numbers:
        key = re.sub(r"experts\.experts\.", f"experts.experts.{numbers.pop(0)}.", key, count=1)
    return key


def num_parameters(chunks: Sequence[Any]) -> int:
    """Of the whole model; tied and replicated parameters count once."""
    owned = sum(s.parameter.numel() for s in parameter_shards(chunks) if s.owned)
    count = torch.tensor(float(owned), dtype=torch.float64, device=host.device())
    return int(grid.sum_over_model(count))
