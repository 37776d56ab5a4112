"""Mamba-2 layers (Dao and Gu, ICML 2024, arXiv 2405.21060), in torch alone.

Megatron's own mixer needs the kernels of mamba_ssm, and so a GPU. This one computes the same from
the same parameters, which have Megatron's names, and its shards, in checkpoints. All functions of
it have second derivatives.

Tensors: s positions, b samples, h heads of width p in g groups, n the width of a state; all of this
tensor-parallel rank. A head's state S, of [p, n], and output at position t are

    S_t = exp(d_t A) S_(t-1) + d_t x_t B_t^T        y_t = S_t C_t + D x_t,

where x, B and C come out of a causal convolution, d = softplus(dt + dt_bias) and A = -exp(A_log).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import silu, softplus

from megatron_direct.mcore.specs import local
from megatron_direct.mcore.specs.kinds import KindsOfClasses, LayerKind

_WIDTH = 4  # positions of the convolution, in every model of Megatron's
_EPSILON = 1e-5  # of the norm inside the mixer, whatever that of the other norms is
# Positions between which a rank writes down all products of B and C; Megatron's own number.
_CHUNK = 128


@dataclass(frozen=True)
class MixerSizes:
    """Of this rank's part of a mixer."""

    heads: int
    head_width: int
    groups: int
    state: int

    @property
    def inner(self) -> int:
        return self.heads * self.head_width

    @property
    def convolved(self) -> dict[str, int]:
        return {"x": self.inner, "B": self.groups * self.state, "C": self.groups * self.state}

    @property
    def projected(self) -> dict[str, int]:
        return {"z": self.inner, **self.convolved, "dt": self.heads}


@dataclass(frozen=True)
class MixerParameters:
    """Those of a mixer between its two linear layers; each may have a dimension [b] in front."""

    conv_weight: torch.Tensor  # [channels, 1, 4], the last of the four the position's own
    conv_bias: torch.Tensor  # [channels]
    dt_bias: torch.Tensor  # [h]
    A_log: torch.Tensor  # [h]
    D: torch.Tensor  # [h]
    norm_weight: torch.Tensor  # [h * p]


def mixed(projected: torch.Tensor, parameters: MixerParameters, sizes: MixerSizes,
          ) -> torch.Tensor:
    """[s, b, h * p] from what the first linear layer makes, [s, b, sum of sizes.projected].

    Computed in float32 at least.
    """
    dtype = projected.dtype
    values = projected.to(torch.promote_types(dtype, torch.float32))
    inner, heads, groups = sizes.inner, sizes.heads, sizes.groups
    z, xbc, dt = values.split([inner, sum(sizes.convolved.values()), heads], -1)
    x, b, c = _convolved(xbc, parameters).split(list(sizes.convolved.values()), -1)
    x = x.unflatten(-1, (groups, heads // groups, sizes.head_width))
    step = softplus(dt + parameters.dt_bias)
    decay = step * -torch.exp(parameters.A_log)
    y = _scanned(x, *(part.unflatten(-1, (groups, -1)) for part in (b, c, step, decay)))
    y = y + x * parameters.D.unflatten(-1, (groups, -1, 1))
    gated = (y.flatten(2) * silu(z)).unflatten(-1, (groups, -1))
    normed = gated * torch.rsqrt(gated.square().mean(-1, keepdim=True) + _EPSILON)
    return (normed.flatten(2) * parameters.norm_weight).to(dtype)


def _convolved(xbc: torch.Tensor, parameters: MixerParameters) -> torch.Tensor:
    """[s, b, channels], position t from those from t - 3 to t."""
    length = len(xbc)
    padded = torch.cat([xbc.new_zeros(_WIDTH - 1, *xbc.shape[1:]), xbc])
    taps = parameters.conv_weight.squeeze(-2)
    total = sum((padded[tap:tap + length] * taps[..., tap] for tap in range(_WIDTH)),
                start=parameters.conv_bias)
    return silu(total)


def _scanned(x, b, c, step, decay) -> torch.Tensor:
    """[s, b, g, h / g, p] of x, of b and c [s, b, g, n], of step and decay [s, b, g, h / g].

    Chunk by chunk: within a chunk position t sees u by exp(decay after u, up to t), and what came
    before the chunk by its state.
    """
    outputs, state = [], None
    for first in range(0, len(x), _CHUNK):
        part = slice(first, first + _CHUNK)
        log_decay = decay[part].cumsum(0)  # since the chunk began, [t, b, g, r]
        between = log_decay[:, None] - log_decay[None]  # [t, u, b, g, r]
        future = torch.ones(between.shape[:2], dtype=torch.bool, device=x.device).triu(1)
        seen = between.masked_fill(future[..., None, None, None], -torch.inf).exp()
        scores = torch.einsum("tbgn,ubgn->tubg", c[part], b[part])[..., None] * seen
        steps = x[part] * step[part][..., None]
        y = torch.einsum("tubgr,ubgrp->tbgrp", scores, steps)
        to_end = (log_decay[-1] - log_decay).exp()
        added = torch.einsum("ubgr,ubgrp,ubgn->bgrpn", to_end, steps, b[part])
        if state is not None:
            y = y + torch.einsum("tbgr,tbgn,bgrpn->tbgrp", log_decay.exp(), c[part], state)
            added = added + log_decay[-1].exp()[..., None, None] * state
        state = added
        outputs.append(y)
    return torch.cat(outputs)


class Between(torch.nn.Module):
    """What a mixer does between its linear layers, as a layer that hooks can watch."""

    def __init__(self, sizes: MixerSizes):
        super().__init__()
        self.sizes = sizes

    def forward(self, projected: torch.Tensor, parameters: MixerParameters) -> torch.Tensor:
        return mixed(projected, parameters, self.sizes)


def one_layer(transformer_config):
    """Megatron's spec of a Mamba layer."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec

    return ModuleSpec(module=MambaLayer, submodules=MambaLayerSubmodules(
        norm=local.norm_class(transformer_config),
        mixer=ModuleSpec(module=Mixer),
        mamba_bda=get_bias_dropout_add,
        sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"}))


class Mixer(torch.nn.Module):
    """Linear, then :func:`mixed`, then linear; heads and groups are divided over the ranks."""

    def __init__(self, config, d_model: int, **_unused):
        from megatron.core.tensor_parallel.layers import (
            ColumnParallelLinear,
            RowParallelLinear,
            set_tensor_model_parallel_attributes,
        )

        super().__init__()
        heads = config.mamba_num_heads or 2 * d_model // config.mamba_head_dim
        ranks = config.tensor_model_parallel_size
        self.sizes = MixerSizes(heads // ranks, config.mamba_head_dim,
                                config.mamba_num_groups // ranks, config.mamba_state_dim)
        sizes, dtype = self.sizes, config.params_dtype
        channels = sum(sizes.convolved.values())
        self.in_proj = ColumnParallelLinear(
            d_model, ranks * sum(sizes.projected.values()), config=config,
            init_method=config.init_method, gather_output=False, bias=False,
            skip_bias_add=False)
        self.conv1d = _Held(weight=torch.empty(channels, 1, _WIDTH, dtype=dtype),
                            bias=torch.empty(channels, dtype=dtype))
        bound = 1 / math.sqrt(_WIDTH)
        for parameter in self.conv1d.parameters():
            torch.nn.init.uniform_(parameter, -bound, bound)
        # Megatron's initial values: steps between 0.001 and 0.1, A between -16 and -1, D at 1.
        step = torch.exp(torch.empty(sizes.heads).uniform_(math.log(0.001), math.log(0.1)))
        self.dt_bias = torch.nn.Parameter((step + torch.log(-torch.expm1(-step))).to(dtype))
        self.A_log = torch.nn.Parameter(torch.empty(sizes.heads).uniform_(1, 16).log())
        self.D = torch.nn.Parameter(torch.ones(sizes.heads))
        self.norm = _Held(weight=torch.ones(sizes.inner, dtype=dtype))
        for parameter in self._divided().values():
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=0, stride=1)
        self.between = Between(sizes)
        self.out_proj = RowParallelLinear(
            ranks * sizes.inner, d_model, config=config,
            init_method=config.output_layer_init_method, bias=False, input_is_parallel=True,
            skip_bias_add=True)

    def forward(self, hidden_states, **_unused):
        projected, _ = self.in_proj(hidden_states)
        conv: Any = self.conv1d
        norm: Any = self.norm
        return self.out_proj(self.between(projected, MixerParameters(
            conv.weight, conv.bias, self.dt_bias, self.A_log, self.D, norm.weight)))

    def _divided(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters()
                if not name.startswith(("in_proj.", "out_proj."))}

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        from megatron.core.transformer.utils import sharded_state_dict_default

        state = {}
        for name in ("in_proj", "out_proj"):
            state.update(sharded_state_dict_default(
                getattr(self, name), f"{prefix}{name}.", sharded_offsets, metadata))
        for name, parameter in self._divided().items():
            state[prefix + name] = _sharded(parameter, prefix + name, sharded_offsets)
        for name, parts in (("in_proj.weight", self.sizes.projected),
                            ("conv1d.weight", self.sizes.convolved),
                            ("conv1d.bias", self.sizes.convolved)):
            state[prefix + name] = _in_parts(state[prefix + name], parts, sharded_offsets)
        return state

def _sharded(tensor, key: str, sharded_offsets, **options):
    from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint

    return make_tp_sharded_tensor_for_checkpoint(
        tensor, key, tp_axis=0, prepend_offsets=sharded_offsets, **options)

def _in_parts(whole, parts: dict[str, int], sharded_offsets):
    """A tensor of a checkpoint as one tensor for each part of its rows, as Megatron has it."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    def build(key, tensor, replica_id, _flattened_range):
        return [_sharded(part, f"{key}.{name}", sharded_offsets, replica_id=replica_id)
                for name, part in zip(parts, tensor.split(list(parts.values())), strict=True)]

    return ShardedTensorFactory(whole.key, whole.data, build, torch.cat, whole.replica_id)


class _Held(torch.nn.Module):
    """Parameters under the names that they have in Megatron's layers, which are not used."""

    def __init__(self, **tensors: torch.Tensor):
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, torch.nn.Parameter(tensor))


KINDS: KindsOfClasses = ((Mixer, LayerKind.MAMBA_MIXER),)
