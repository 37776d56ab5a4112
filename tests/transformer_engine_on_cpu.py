"""A stand-in for Transformer Engine, which needs CUDA: the same arithmetic, by torch, on a CPU.

``install()`` comes before anything of megatron is imported, in a process of its own. Of Transformer
Engine (2.6) it has the classes that Megatron's layers derive from, with the arguments, attributes
and attributes of parameters that its source gives them; its kernels, and FP8, it does not have. So
it shows that our hooks, names and sums fit Megatron's classes; not that Transformer Engine's
kernels do what they should. Whatever else is imported of it is missing.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types

import torch
from torch.nn.functional import layer_norm, linear, rms_norm

VERSION = "2.6.0"


def _mark_parallel(weight: torch.nn.Parameter, dim: int) -> None:
    weight.tensor_model_parallel, weight.partition_dim, weight.partition_stride = True, dim, 1


class _Base(torch.nn.Module):
    """fp8_meta, and an extra state that is empty, as without FP8."""

    def __init__(self):
        super().__init__()
        self.fp8, self.fp8_calibration, self.fp8_meta = False, False, {"fp8_checkpoint": False}

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def get_extra_state(self):
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state) -> None:
        assert state is None or state.numel() == 0


def _new(shape, dtype, init_method=None) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(torch.empty(shape, dtype=dtype))
    if init_method is not None:
        with torch.no_grad():
            init_method(weight)
    return weight


class Linear(_Base):
    def __init__(self, in_features, out_features, *, sequence_parallel, fuse_wgrad_accumulation,
                 tp_group, tp_size, get_rng_state_tracker, init_method, bias, return_bias,
                 parallel_mode, params_dtype=torch.float32, device=None, **_options):
        super().__init__()
        assert not fuse_wgrad_accumulation
        self.parallel_mode, self.tp_size, self.tp_group = parallel_mode, tp_size, tp_group
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.sequence_parallel = tp_size > 1 and sequence_parallel
        self.use_bias, self.return_bias = bias, return_bias
        self._norm(params_dtype)
        self.weight = _new((self.out_features, self.in_features), params_dtype, init_method)
        _mark_parallel(self.weight, 1 if parallel_mode == "row" else 0)
        self.bias = torch.empty(0)  # in the place of none
        if bias:
            self.bias = _new(self.out_features, params_dtype, torch.nn.init.zeros_)
            if parallel_mode == "row":
                self.bias.sequence_parallel = self.sequence_parallel
            elif parallel_mode == "column":
                _mark_parallel(self.bias, 0)

    def _norm(self, params_dtype) -> None:
        pass

    def _input(self, x):
        return x

    def forward(self, x, is_first_microbatch=None):
        from megatron.core.tensor_parallel import mappings

        x = self._input(x)
        if self.parallel_mode == "column" and self.tp_size > 1:
            x = mappings.gather_from_sequence_parallel_region(x) if self.sequence_parallel \
                else mappings.copy_to_tensor_model_parallel_region(x)
        y = linear(x, self.weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            y = mappings.reduce_scatter_to_sequence_parallel_region(y) if self.sequence_parallel \
                else mappings.reduce_from_tensor_model_parallel_region(y)
        if self.use_bias and self.return_bias:
            return y, self.bias
        return y + self.bias if self.use_bias else y


class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, *, eps, normalization, zero_centered_gamma,
                 return_layernorm_output, **options):
        assert not zero_centered_gamma and not return_layernorm_output
        object.__setattr__(self, "_of_norm", (in_features, eps, normalization))
        super().__init__(in_features, out_features, **options)

    def _norm(self, params_dtype) -> None:
        width, self.eps, self.normalization = self._of_norm
        self.zero_centered_gamma = False
        self.layer_norm_weight = _new(width, params_dtype, torch.nn.init.ones_)
        self.layer_norm_weight.sequence_parallel = self.sequence_parallel
        if self.normalization == "LayerNorm":
            self.layer_norm_bias = _new(width, params_dtype, torch.nn.init.zeros_)
            self.layer_norm_bias.sequence_parallel = self.sequence_parallel

    def _input(self, x):
        if self.normalization == "LayerNorm":
            return layer_norm(x, x.shape[-1:], self.layer_norm_weight, self.layer_norm_bias,
                              self.eps)
        return rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)


class _NormLayer(_Base):
    has_bias = False

    def __init__(self, normalized_shape=None, eps=1e-5, sequence_parallel=None,
                 params_dtype=torch.float32, zero_centered_gamma=False, hidden_size=None,
                 **_options):
        super().__init__()
        assert not zero_centered_gamma
        self.eps, self.zero_centered_gamma = eps, False
        width = normalized_shape or hidden_size  # its name until 2.0
        self.weight = _new(width, params_dtype, torch.nn.init.ones_)
        self.weight.sequence_parallel = sequence_parallel
        if self.has_bias:
            self.bias = _new(width, params_dtype, torch.nn.init.zeros_)
            self.bias.sequence_parallel = sequence_parallel


class LayerNorm(_NormLayer):
    has_bias = True

    def forward(self, x):
        return layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


class RMSNorm(_NormLayer):
    def forward(self, x):
        return rms_norm(x, x.shape[-1:], self.weight, self.eps)


class DotProductAttention(_Base):
    def __init__(self, num_attention_heads, kv_channels, *, attention_dropout, attn_mask_type,
                 num_gqa_groups, tp_size, softmax_scale=None, **_options):
        super().__init__()
        assert attention_dropout == 0 and attn_mask_type == "causal"
        self.repeats = num_attention_heads // (num_gqa_groups or num_attention_heads)
        self.scale = softmax_scale

    def forward(self, query, key, value, attention_mask, *, attn_mask_type):
        """[s, b, heads * width] of [s, b, heads or groups, width]."""
        assert attention_mask is None and attn_mask_type == "causal"
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        key, value = (x.repeat_interleave(self.repeats, 1) for x in (key, value))
        scale = self.scale or query.shape[-1] ** -0.5
        scores = query @ key.mT * scale
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return (scores.masked_fill(future, -torch.inf).softmax(-1) @ value).permute(
            2, 0, 1, 3).flatten(2)


class GroupedLinear(_Base):
    def __init__(self, num_gemms, in_features, out_features, *, fuse_wgrad_accumulation, tp_size,
                 init_method, bias, return_bias, parallel_mode, params_dtype=torch.float32,
                 **_options):
        super().__init__()
        assert not fuse_wgrad_accumulation and not bias
        self.num_gemms, self.use_bias = num_gemms, bias
        for number in range(num_gemms):
            weight = _new((out_features // (tp_size if parallel_mode == "column" else 1),
                           in_features // (tp_size if parallel_mode == "row" else 1)),
                          params_dtype, init_method)
            _mark_parallel(weight, 1 if parallel_mode == "row" else 0)
            self.register_parameter(f"weight{number}", weight)

    def forward(self, x, m_splits, is_first_microbatch=None):
        return torch.cat([linear(part, getattr(self, f"weight{number}"))
                          for number, part in enumerate(x.split(m_splits))])


class _Anything(type):
    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _CudaRNGStatesTracker:
    pass


def _module(name: str, **contents) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__path__, module.__version__ = [], VERSION
    vars(module).update(contents)
    sys.modules[name] = module
    return module


def install() -> None:
    assert not any(name.startswith("megatron.") for name in sys.modules)
    layers = (Linear, LayerNormLinear, LayerNorm, RMSNorm, DotProductAttention, GroupedLinear)
    quantization = _module("transformer_engine.pytorch.fp8", **{
        name: _Anything(name, (), {})
        for name in ("FP8GlobalStateManager", "fp8_autocast", "fp8_model_init")})
    _module("transformer_engine.pytorch.tensor",
            QuantizedTensor=type("QuantizedTensor", (), {}))
    of_torch = _module(
        "transformer_engine.pytorch", **{layer.__name__: layer for layer in layers},
        fp8=quantization, ops=_Anything("ops", (), {}),
        distributed=_module("transformer_engine.pytorch.distributed",
                            CudaRNGStatesTracker=_CudaRNGStatesTracker,
                            activation_recompute_forward=None))
    recipe = _module("transformer_engine.common.recipe",
                     DelayedScaling=type("DelayedScaling", (), {}))
    _module("transformer_engine", pytorch=of_torch,
            common=_module("transformer_engine.common", recipe=recipe))
    found = importlib.metadata.version
    importlib.metadata.version = lambda name: (
        VERSION if name.replace("_", "-") == "transformer-engine" else found(name))
