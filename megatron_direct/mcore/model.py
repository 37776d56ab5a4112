"""Megatron-Core's GPTModel from our flags, and what its parameters are called in the whole model.

A rank holds one or more *model chunks* (one, unless the pipeline is interleaved), each a GPTModel
with some of the layers. :func:`parameter_shards` gives, for each parameter that a rank holds, the
name, rows and columns it has in the whole model. They are read off Megatron's own sharded state
dict, so that they are right for whatever it shards: gated MLPs, grouped QKV, padded vocabularies.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from megatron_direct import config
from megatron_direct.config import ModelConfig, ParallelConfig
from megatron_direct.mcore import grid
from megatron_direct.mcore.specs import local as layer_specs
from megatron_direct.runtime import host


def build(model: ModelConfig, layout: ParallelConfig, *, seed: int = 1234,
          dtype: torch.dtype = torch.float32) -> list[torch.nn.Module]:
    """This rank's model chunks, with weights drawn anew. Needs grid.model_parallel()."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * parallel_state.get_pipeline_model_parallel_rank()
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed, force_reset_rng=True)
    transformer_config = _transformer_config(model, layout, dtype)
    num_chunks = layout.num_model_chunks(model)
    chunks = []
    for number in range(num_chunks):
        vp_stage = number if num_chunks > 1 else None
        with layer_specs.buildable():
            chunk = GPTModel(
                config=transformer_config,
                transformer_layer_spec=layer_specs.block_spec(transformer_config, vp_stage),
                vocab_size=model.padded_vocab_size,
                max_sequence_length=model.max_position_embeddings or model.seq_length,
                pre_process=parallel_state.is_pipeline_first_stage(False, vp_stage),
                post_process=parallel_state.is_pipeline_last_stage(False, vp_stage),
                share_embeddings_and_output_weights=not model.untie_embeddings_and_output_weights,
                position_embedding_type=model.position_embedding_type,
                rotary_base=model.rotary_base,
                rotary_percent=model.rotary_percent,
                rope_scaling=model.use_rope_scaling,
                rope_scaling_factor=model.rope_scaling_factor,
                vp_stage=vp_stage,
            )
        layer_specs.add_up_position_gradients(chunk)
        chunks.append(chunk.to(device=host.device(), dtype=dtype))
    return chunks


def _transformer_config(model: ModelConfig, layout: ParallelConfig, dtype: torch.dtype):
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    num_chunks = layout.num_model_chunks(model)
    kind = MLATransformerConfig if model.multi_latent_attention else TransformerConfig
    return kind(
        **_of_latent_attention(model),
        **_of_experts(model),
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size(model),
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        kv_channels=model.kv_channels,
        qk_layernorm=model.qk_layernorm,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=model.swiglu,
        activation_func=torch.nn.functional.silu if model.swiglu else torch.nn.functional.gelu,
        add_bias_linear=model.add_bias_linear,
        add_qkv_bias=model.add_qkv_bias,
        init_method_std=model.init_method_std,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tensor_model_parallel_size,
        pipeline_model_parallel_size=layout.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=num_chunks if num_chunks > 1 else None,
        sequence_parallel=layout.sequence_parallel,
        expert_model_parallel_size=layout.expert_model_parallel_size,
        expert_tensor_parallel_size=layout.tensor_model_parallel_size,
        moe_token_dispatcher_type=layout.moe_token_dispatcher_type,
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


def _of_latent_attention(model: ModelConfig) -> dict:
    if not model.multi_latent_attention:
        return {}
    names = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
             "rotary_base", "rotary_percent", "rotary_scaling_factor", "mscale", "mscale_all_dim")
    return {"rope_type": model.rope_type or "yarn", **{n: getattr(model, n) for n in names}}


def _of_experts(model: ModelConfig) -> dict:
    if model.num_experts is None:
        return {}
    names = ("moe_ffn_hidden_size", "moe_shared_expert_intermediate_size",
             "moe_shared_expert_gate", "moe_router_topk", "moe_router_score_function",
             "moe_router_pre_softmax", "moe_router_enable_expert_bias",
             "moe_router_topk_scaling_factor", "moe_router_num_groups", "moe_router_group_topk")
    frequency = str(model.moe_layer_freq)
    return {
        "num_moe_experts": model.num_experts,
        "moe_layer_freq": int(frequency) if frequency.isdigit() else [
            int(has_experts) for has_experts in config.expert_layers(model)],
        # A balancing loss is one of the whole batch: no sample has a gradient of its own then.
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
        **{name: getattr(model, name) for name in names},
    }


@dataclass(frozen=True)
class ParameterShard:
    """A parameter as this rank holds it, and where it lies in the whole model.

    name: of the whole parameter, with the global layer number: the same in every layout.
    rows: [local rows] row numbers in the whole matrix (a vector's entries are its rows).
    columns: [local columns] column numbers; [0] for a vector.
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
    """

    name: str
    parameter: torch.nn.Parameter
    rows: torch.Tensor
    columns: torch.Tensor
    owned: bool
    adds_gradient: bool
    is_partial: bool = False
    of_local_experts: bool = False

    def as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the parameter's shape as [local rows, local columns]."""
        return tensor.reshape(len(self.rows), len(self.columns))


def parameter_shards(chunks: list[torch.nn.Module]) -> list[ParameterShard]:
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


def checkpoint_metadata() -> dict:
    from megatron.core import parallel_state

    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        # The optimizer's state in the shape of the model's: it can be loaded in any layout.
        "distrib_optim_sharding_type": "fully_reshardable",
    }


def _parameter_shard(parameter: torch.nn.Parameter, sharded, of_heads: bool) -> ParameterShard:
    shape = parameter.shape if parameter.dim() > 1 else (parameter.shape[0], 1)
    rows = torch.empty(shape[0], dtype=torch.int64)
    columns = torch.zeros(shape[1], dtype=torch.int64)
    name = None
    for tile, local_rows in _tiles(sharded, shape[0]):
        name = _global_name(tile.key, tile.global_offset[: tile.prepend_axis_num])
        offset = tile.global_offset[tile.prepend_axis_num:]
        rows[local_rows] = offset[0] + torch.arange(len(local_rows))
        if parameter.dim() > 1:
            columns = offset[1] + torch.arange(shape[1])
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
        owned=(not is_replica and not is_tied_copy
               and (of_local_experts or grid.expert_rank() == 0)),
        adds_gradient=not is_replica or is_partial,
        is_partial=is_partial,
        of_local_experts=of_local_experts,
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


def _global_name(key: str, numbers: tuple[int, ...]) -> str:
    """The key with the numbers of layer and expert in their places, where it does not have them.

    Megatron stacks what all layers have, and all experts, along axes in front.
    """
    numbers = list(numbers)
    if numbers and re.search(r"layers\.\D", key):
        key = re.sub(r"layers\.", f"layers.{numbers.pop(0)}.", key, count=1)
    if numbers:
        key = re.sub(r"experts\.experts\.", f"experts.experts.{numbers.pop(0)}.", key, count=1)
    return key


def num_parameters(chunks: list[torch.nn.Module]) -> int:
    """Of the whole model; tied and replicated parameters count once."""
    owned = sum(s.parameter.numel() for s in parameter_shards(chunks) if s.owned)
    count = torch.tensor(float(owned), dtype=torch.float64, device=host.device())
    return int(grid.sum_over_model(count))
