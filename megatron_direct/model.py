"""Megatron-Core's GPTModel from our flags, and what its parameters are called in the whole model.

A rank holds one or more *model chunks* (one, unless the pipeline is interleaved), each a GPTModel
with some of the layers. :func:`parameter_shards` gives, for each parameter that a rank holds, the
name, rows and columns it has in the whole model. They are read off Megatron's own sharded state
dict, so that they are right for whatever it shards: gated MLPs, grouped QKV, padded vocabularies.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

import torch

from megatron_direct import config, host, parallel
from megatron_direct.config import ModelConfig, ParallelConfig


def build(model: ModelConfig, layout: ParallelConfig, *, seed: int = 1234,
          dtype: torch.dtype = torch.float32) -> list[torch.nn.Module]:
    """This rank's model chunks, with weights drawn anew. Needs parallel.model_parallel()."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
    transformer_config = _transformer_config(model, layout, dtype)
    num_chunks = layout.num_model_chunks(model)
    chunks = []
    for chunk in range(num_chunks):
        vp_stage = chunk if num_chunks > 1 else None
        chunks.append(GPTModel(
            config=transformer_config,
            transformer_layer_spec=_block_spec(transformer_config, vp_stage),
            vocab_size=model.padded_vocab_size,
            max_sequence_length=model.max_position_embeddings or model.seq_length,
            pre_process=parallel_state.is_pipeline_first_stage(False, vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(False, vp_stage),
            share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
            position_embedding_type=model.position_embedding_type,
            rotary_base=model.rotary_base,
            rotary_percent=model.rotary_percent,
            vp_stage=vp_stage,
        ).to(device=host.device(), dtype=dtype))
    return chunks


def _transformer_config(model: ModelConfig, layout: ParallelConfig, dtype: torch.dtype):
    from megatron.core.transformer import TransformerConfig

    num_chunks = layout.num_model_chunks(model)
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size(model),
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        normalization=model.normalization,
        gated_linear_unit=model.swiglu,
        activation_func=torch.nn.functional.silu if model.swiglu else torch.nn.functional.gelu,
        add_bias_linear=model.add_bias_linear,
        init_method_std=model.init_method_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        # Between two stages with several chunks each, a batched exchange takes one chunk's message
        # for another's, without a word.
        overlap_p2p_comm=num_chunks > 1,
        batch_p2p_comm=num_chunks == 1,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        use_cpu_initialization=not host.has_gpu(),
        # Losses come out of a pass as sums: sample weights and token counts are ours to apply.
        calculate_per_token_loss=True,
        # Fused kernels are left out: they need a GPU, and none has a second derivative.
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


class _SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm over a slice of the sequence: its weight's gradient is a partial sum."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused):
        super().__init__(hidden_size, eps=eps)
        _mark_sequence_parallel(self)


class _SequenceParallelLayerNorm(torch.nn.LayerNorm):
    """LayerNorm over a slice of the sequence: its parameters' gradients are partial sums."""

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_unused):
        super().__init__(hidden_size, eps=eps)
        _mark_sequence_parallel(self)


def _mark_sequence_parallel(norm: torch.nn.Module) -> None:
    for parameter in norm.parameters():
        parameter.sequence_parallel = True


def _block_spec(transformer_config, vp_stage: int | None):
    """Megatron's local layer spec; its norms replaced where they must carry sequence parallelism.

    Megatron's own torch norms refuse sequence parallelism.
    """
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_block import (
        TransformerBlockSubmodules,
        get_num_layers_to_build,
    )

    norm = WrappedTorchNorm
    layer = get_gpt_layer_local_spec(normalization=transformer_config.normalization)
    if transformer_config.sequence_parallel:
        norm = (_SequenceParallelRMSNorm if transformer_config.normalization == "RMSNorm"
                else _SequenceParallelLayerNorm)
        layer = dataclasses.replace(layer, submodules=dataclasses.replace(
            layer.submodules, input_layernorm=norm, pre_mlp_layernorm=norm))
    num_layers = get_num_layers_to_build(transformer_config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=norm)


@dataclass(frozen=True)
class ParameterShard:
    """A parameter as this rank holds it, and where it lies in the whole model.

    name: of the whole parameter, with the global layer number: the same in every layout.
    rows: [local rows] row numbers in the whole matrix (a vector's entries are its rows).
    columns: [local columns] column numbers; [0] for a vector.
    owned: True on exactly one rank of a copy of the model, for each entry: what sums over
        parameters (dot products) count.
    adds_gradient: the gradient on this rank is a summand of the whole gradient. False on all but
        one rank for a replicated parameter; True on both holders of tied embeddings, and on all
        holders of a sequence-parallel norm, since there each has a part of the gradient.
    """

    name: str
    parameter: torch.nn.Parameter
    rows: torch.Tensor
    columns: torch.Tensor
    owned: bool
    adds_gradient: bool

    def as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape as [local rows, local columns]."""
        return tensor.reshape(len(self.rows), len(self.columns))


def parameter_shards(chunks: list[torch.nn.Module]) -> list[ParameterShard]:
    """One shard for each parameter of this rank's chunks, in the order of the chunks."""
    shards = []
    for chunk in chunks:
        sharded = chunk.sharded_state_dict(metadata=checkpoint_metadata())
        for local_name, parameter in chunk.named_parameters():
            shards.append(_parameter_shard(parameter, sharded[local_name]))
    return shards


def checkpoint_metadata() -> dict:
    from megatron.core import parallel_state

    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # The optimizer's state in the shape of the model's: it can be loaded in any layout.
        "distrib_optim_sharding_type": "fully_reshardable",
    }


def _parameter_shard(parameter: torch.nn.Parameter, sharded) -> ParameterShard:
    shape = parameter.shape if parameter.dim() > 1 else (parameter.shape[0], 1)
    rows = torch.empty(shape[0], dtype=torch.int64)
    columns = torch.zeros(shape[1], dtype=torch.int64)
    name = None
    for tile, local_rows in _tiles(sharded, shape[0]):
        layer = tile.global_offset[: tile.prepend_axis_num]
        name = _global_name(tile.key, layer)
        offset = tile.global_offset[tile.prepend_axis_num:]
        rows[local_rows] = offset[0] + torch.arange(len(local_rows))
        if parameter.dim() > 1:
            columns = offset[1] + torch.arange(shape[1])
    is_tied_copy = getattr(parameter, "shared", False)
    is_replica = (not getattr(parameter, "tensor_model_parallel", False)
                  and parallel.tensor_rank() > 0)
    return ParameterShard(
        name=name,
        parameter=parameter,
        rows=rows.to(parameter.device),
        columns=columns.to(parameter.device),
        owned=not is_replica and not is_tied_copy,
        adds_gradient=not is_replica or getattr(parameter, "sequence_parallel", False),
    )


def _tiles(sharded, num_rows: int):
    """(tile, its local rows): one tile, or several where Megatron cuts a parameter (gated fc1)."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    if not isinstance(sharded, ShardedTensorFactory):
        yield sharded, torch.arange(num_rows)
        return
    # Built on row numbers in place of weights, the tiles say which rows went into each.
    row_numbers = torch.arange(num_rows)
    if sharded.data.dim() > 1:
        row_numbers = row_numbers[:, None].expand(sharded.data.shape)
    tiles = sharded.build_fn(sharded.key, row_numbers, sharded.replica_id, None)
    for tile in tiles:
        yield tile, tile.data if tile.data.dim() == 1 else tile.data[:, 0]


def _global_name(key: str, layer: tuple[int, ...]) -> str:
    return re.sub(r"layers\.", f"layers.{layer[0]}.", key, count=1) if layer else key


def num_parameters(chunks: list[torch.nn.Module]) -> int:
    """Of the whole model; tied and replicated parameters count once."""
    owned = sum(s.parameter.numel() for s in parameter_shards(chunks) if s.owned)
    count = torch.tensor(float(owned), dtype=torch.float64, device=host.device())
    return int(parallel.sum_over_model(count))
