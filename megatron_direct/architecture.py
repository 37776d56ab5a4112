"""What a model is: the flags of its architecture, and what follows from them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_direct import hybrid_pattern
from megatron_direct.errors import UserError
from megatron_direct.settings import Settings, flag, require_defaults, require_divides


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Architecture. The defaults are the embedded model: 1.1 M parameters, minutes on a CPU."""

    num_layers: int = flag(4, "transformer layers", at_least=1)
    hidden_size: int = flag(128, "width of the residual stream", at_least=1)
    ffn_hidden_size: int | None = flag(
        None, "width of the MLP; default: 8/3 of the hidden size with --swiglu, else 4 times",
        type=int, at_least=1)
    num_attention_heads: int = flag(4, "attention heads", at_least=1)
    num_query_groups: int | None = flag(
        None, "key and value heads of grouped-query attention; default: one per head",
        type=int, at_least=1)
    kv_channels: int | None = flag(
        None, "width of a head; default: hidden size / heads", type=int, at_least=1)
    qk_layernorm: bool = flag(
        False, "norms of queries and keys, per head; in latent attention, norms of the latents")
    seq_length: int = flag(256, "tokens of a training sequence; longer samples are cut", at_least=1)
    max_position_embeddings: int | None = flag(
        None, "largest number of positions; default: --seq-length", type=int, at_least=1)
    normalization: str = flag("RMSNorm", "kind of norm", choices=("RMSNorm", "LayerNorm"))
    norm_epsilon: float = flag(1e-5, "added to the mean square in norms", above=0, at_most=1e6)
    swiglu: bool = flag(True, "gated SiLU in the MLP; --no-swiglu: GELU")
    add_bias_linear: bool = flag(False, "biases in linear layers")
    bias_gelu_fusion: bool = flag(
        False, "GELU's tanh form, which Megatron-LM's fused kernel computes; with --no-swiglu "
        "--add-bias-linear")
    add_qkv_bias: bool = flag(False, "biases of queries, keys and values only")
    position_embedding_type: str = flag(
        "rope", "position embedding", choices=("rope", "learned_absolute", "none"))
    rotary_base: int = flag(10000, "base of the rotary embedding", at_least=1)
    rotary_percent: float = flag(1.0, "share of each head that is rotated", above=0, at_most=1)
    use_rope_scaling: bool = flag(False, "slower rotation at long wavelengths, as in Llama 3.1")
    rope_scaling_factor: float = flag(
        8.0, "scaling factor of --use-rope-scaling", above=0, at_most=1e6)
    untie_embeddings_and_output_weights: bool = flag(
        False, "an output layer that shares no weights with the embedding")
    vocab_size: int | None = flag(
        None, "entries of the tokenizer; default: as recorded by the datasets (PREFIX.json)",
        type=int, at_least=1)
    make_vocab_size_divisible_by: int = flag(
        128, "the vocabulary is padded to a multiple of this, whatever the layout", at_least=1)
    init_method_std: float = flag(
        0.02, "standard deviation of initial weights", above=0, at_most=1e6)
    # Defaults from here on are Megatron-LM's, so that the arguments of a dense model's checkpoint,
    # which name them all, are those of a dense model here.
    multi_latent_attention: bool = flag(False, "queries, keys and values from low-rank latents")
    q_lora_rank: int | None = flag(
        None, "width of the queries' latent; default: queries without one", type=int, at_least=1)
    kv_lora_rank: int = flag(32, "width of the keys' and values' latent", at_least=1)
    qk_head_dim: int = flag(
        128, "width of a head's query and key that carries no position", at_least=1)
    qk_pos_emb_head_dim: int = flag(
        64, "width of a head's query and key that is rotated", at_least=1)
    v_head_dim: int = flag(128, "width of a head's value", at_least=1)
    rope_type: str | None = flag(
        None, "rotary embedding of latent attention; default: yarn", choices=("rope", "yarn"))
    rotary_scaling_factor: float = flag(
        1.0, "how far yarn stretches the positions", above=0, at_most=1e6)
    mscale: float = flag(1.0, "yarn's scale of the rotated part", at_least=0, at_most=1e6)
    mscale_all_dim: float = flag(
        0.0, "yarn's scale of the attention scores", at_least=0, at_most=1e6)
    num_experts: int | None = flag(
        None, "experts of a mixture-of-experts layer; default: none", type=int, at_least=1)
    moe_layer_freq: str = flag(
        "1", "which layers have experts: N for every Nth, or a pattern such as [0]*3+[1]*58")
    moe_ffn_hidden_size: int | None = flag(
        None, "width of an expert; default: --ffn-hidden-size", type=int, at_least=1)
    moe_shared_expert_intermediate_size: int | None = flag(
        None, "width of all shared experts together; default: none", type=int, at_least=1)
    moe_shared_expert_gate: bool = flag(False, "a gate on the shared experts' output")
    moe_router_topk: int = flag(2, "experts per token", at_least=1)
    moe_router_score_function: str = flag(
        "softmax", "scores from the router's logits", choices=("softmax", "sigmoid"))
    moe_router_dtype: str | None = flag(
        None, "precision of the router's logits and probabilities; default: the model's",
        choices=("fp32", "fp64"))
    moe_router_pre_softmax: bool = flag(False, "softmax over all experts, not only the chosen ones")
    moe_router_enable_expert_bias: bool = flag(
        False, "a bias, not trained by gradients, on the scores by which experts are chosen")
    moe_router_topk_scaling_factor: float | None = flag(
        None, "factor on the weights of the chosen experts; default: 1", type=float, above=0,
        at_most=1e6)
    moe_router_num_groups: int | None = flag(
        None, "groups into which the experts are divided for routing", type=int, at_least=1)
    moe_router_group_topk: int | None = flag(
        None, "groups that each token may use; default: all", type=int, at_least=1)

    mtp_num_layers: int | None = flag(
        None, "heads for multi-token prediction, which are trained beside the model; 0 leaves "
        "those of a checkpoint out", type=int, at_least=0)
    mtp_loss_scaling_factor: float = flag(
        0.1, "weight of the prediction heads' mean loss beside the model's own", at_least=0,
        at_most=1e6)
    mtp_use_repeated_layer: bool = flag(
        False, "one layer that all prediction heads share (megatron-core 0.17 or later)")
    mtp_detach_heads: bool = flag(
        False, "gradients of the prediction heads' loss end at the heads (megatron-core 0.19)")
    hybrid_layer_pattern: str | None = flag(
        None, "layers of a hybrid model, a letter each: * attention, + latent attention, - MLP, "
        "E experts, M Mamba, and after each / the layers of a prediction head; default: layers of "
        "attention and MLP", type=str)
    mamba_state_dim: int = flag(128, "width of a Mamba layer's state", at_least=1)
    mamba_head_dim: int = flag(64, "width of a Mamba layer's heads", at_least=1)
    mamba_num_groups: int = flag(8, "groups of heads of a Mamba layer", at_least=1)
    mamba_num_heads: int | None = flag(
        None, "heads of a Mamba layer; default: twice the hidden size / --mamba-head-dim",
        type=int, at_least=1)

    def check(self) -> None:
        if self.kv_channels is None and not self.multi_latent_attention:
            require_divides(self, "num_attention_heads", "hidden_size")
        if self.num_query_groups is not None:
            require_divides(self, "num_query_groups", "num_attention_heads")
        if self.bias_gelu_fusion and (self.swiglu or not self.add_bias_linear):
            raise UserError("--bias-gelu-fusion is for a GELU of linear layers with biases. Add "
                            "--no-swiglu --add-bias-linear, or leave it out.")
        self._check_latent_attention()
        self._check_experts()
        hybrid_pattern.check(self)

    def _check_latent_attention(self) -> None:
        if not self.multi_latent_attention:
            require_defaults(self, "multi_latent_attention", (
                "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim",
                "rotary_scaling_factor", "mscale", "mscale_all_dim"))
            return
        if self.num_query_groups not in (None, self.num_attention_heads):
            raise UserError("--multi-latent-attention has one key and value per head. Leave out "
                            f"--num-query-groups {self.num_query_groups}.")

    def _check_experts(self) -> None:
        if self.num_experts is None:
            require_defaults(self, "num_experts", tuple(
                name for name in self.__dataclass_fields__ if name.startswith("moe_")))
            return
        expert_layers(self)
        if self.add_bias_linear:
            raise UserError("--add-bias-linear gives experts biases, which are not supported. "
                            "Use --add-qkv-bias, or leave out --num-experts.")
        if self.moe_router_topk > self.num_experts:
            raise UserError(f"--moe-router-topk {self.moe_router_topk} is more than --num-experts "
                            f"{self.num_experts}. Choose a smaller one.")
        if self.moe_router_enable_expert_bias and self.moe_router_score_function != "sigmoid":
            raise UserError("--moe-router-enable-expert-bias needs --moe-router-score-function "
                            f"sigmoid, not {self.moe_router_score_function}.")
        if self.moe_router_topk == 1 and self.moe_router_score_function == "softmax" \
                and not self.moe_router_pre_softmax:
            raise UserError("--moe-router-topk 1 needs --moe-router-pre-softmax: the softmax of "
                            "a single score is 1, so the router would have no gradient.")
        if self.moe_router_group_topk is not None:
            if self.moe_router_num_groups is None:
                raise UserError("--moe-router-group-topk needs --moe-router-num-groups.")
            require_divides(self, "moe_router_num_groups", "num_experts")
            require_divides(self, "moe_router_group_topk", "moe_router_topk")

    @property
    def padded_vocab_size(self) -> int:
        multiple = self.make_vocab_size_divisible_by
        return -(-self.known_vocab_size // multiple) * multiple

    @property
    def known_vocab_size(self) -> int:
        """Entries of the tokenizer, once flags, datasets or a checkpoint have said how many."""
        assert self.vocab_size is not None
        return self.vocab_size


def ffn_hidden_size(model: ModelConfig) -> int:
    """Width of the MLP: as given, or 4 h; with a gate 8/3 h (equal parameters), in steps of 64."""
    if model.ffn_hidden_size is not None:
        return model.ffn_hidden_size
    if not model.swiglu:
        return 4 * model.hidden_size
    return -(-8 * model.hidden_size // (3 * 64)) * 64


def expert_layers(model: ModelConfig) -> list[bool]:
    """[num_layers] whether a layer has experts, as --moe-layer-freq says."""
    if model.num_experts is None:
        return [False] * model.num_layers
    text = re.sub(r"[\s()]", "", str(model.moe_layer_freq))
    if text.isdigit() and int(text) > 0:
        return [layer % int(text) == 0 for layer in range(model.num_layers)]
    terms = [re.fullmatch(r"\[([01](?:,[01])*)\](?:\*(\d+))?", term) for term in text.split("+")]
    if not all(terms):
        raise UserError(f"--moe-layer-freq {model.moe_layer_freq} is neither a number of layers "
                        "nor a pattern such as [0]*3+[1]*58.")
    pattern = [digit == "1" for term in terms if term
               for digit in term[1].split(",") * int(term[2] or 1)]
    if len(pattern) != model.num_layers:
        raise UserError(f"--moe-layer-freq {model.moe_layer_freq} is a pattern of {len(pattern)} "
                        f"layers, but --num-layers is {model.num_layers}.")
    return pattern
