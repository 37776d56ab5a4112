"""A GPT in plain torch functions, on whole weights: the truth that sharded results are held to.

Written from the architecture alone; it shares no code with Megatron or with the package. Weights
come as {name: [rows, columns]} with the names, and the row order, of the whole model: QKV rows go
by query group (the group's queries, its key, its value), the rows of a gated MLP are [gate; up].
Norms are named as parts of the linear layer behind them, where they feed just one.
"""

from __future__ import annotations

import math

import numpy as np
import plain_attention
import plain_experts
import plain_mamba
import torch


class PlainGPT:
    """Losses of documents as functions of one flat vector of all weights.

    ``names`` fixes the order of the weights in the vector.
    """

    def __init__(self, model, shapes: dict[str, tuple[int, int]]):
        self.model = model
        self.shapes = dict(sorted(shapes.items()))

    def flatten(self, matrices: dict[str, np.ndarray]) -> torch.Tensor:
        return torch.cat([torch.from_numpy(matrices[name]).reshape(-1) for name in self.shapes])

    def unflatten(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        sizes = [rows * columns for rows, columns in self.shapes.values()]
        return {name: part.view(shape) for part, (name, shape)
                in zip(vector.split(sizes), self.shapes.items(), strict=True)}

    def all_logits(self, vector: torch.Tensor, documents) -> list[torch.Tensor]:
        """[labels, vocabulary] logits of each document."""
        weights = self.unflatten(vector)
        length = self.model.seq_length
        return [self._logits(weights, torch.as_tensor(d[: length + 1][:-1])) for d in documents]

    def document_losses(self, logits, documents) -> torch.Tensor:
        """[documents] sums of token losses."""
        sums = []
        for values, document in zip(logits, documents, strict=True):
            labels = torch.as_tensor(document[: self.model.seq_length + 1][1:])
            at_label = values[torch.arange(len(labels)), labels]
            sums.append((torch.logsumexp(values, -1) - at_label).sum())
        return torch.stack(sums)

    def loss(self, vector: torch.Tensor, documents) -> torch.Tensor:
        """Mean over all label tokens."""
        logits = self.all_logits(vector, documents)
        return self.document_losses(logits, documents).sum() / sum(map(len, logits))

    def _logits(self, weights, tokens):
        model = self.model
        x = weights["embedding.word_embeddings.weight"][tokens]
        if model.position_embedding_type == "learned_absolute":
            x = x + weights["embedding.position_embeddings.weight"][: len(tokens)]
        for layer in range(model.num_layers):
            part = f"decoder.layers.{layer}."
            for function in self._functions(layer):
                x = x + function(weights, part, x)
        x = self.norm(weights, "decoder.final_norm." if model.hybrid_layer_pattern
                      else "decoder.final_layernorm.", x)
        output = ("output_layer.weight" if model.untie_embeddings_and_output_weights
                  else "embedding.word_embeddings.weight")
        return x @ weights[output].T

    def _functions(self, layer):
        if self.model.hybrid_layer_pattern is None:
            return self._attention, self._feed_forward
        kinds = {"*": self._attention, "+": self._attention, "-": self._feed_forward,
                 "E": self._feed_forward, "M": self._mamba}
        return (kinds[self.model.hybrid_layer_pattern[layer]],)

    def _mamba(self, weights, part, x):
        prefix = part + "mixer."
        x = self.norm(weights, prefix + "in_proj.layer_norm_", x)
        return plain_mamba.mixer(self, weights, prefix, x)

    def norm(self, weights, prefix, x):
        if self.model.normalization == "LayerNorm":
            x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.model.norm_epsilon)
        x = x * weights[prefix + "weight"][:, 0]
        return x + weights[prefix + "bias"][:, 0] if prefix + "bias" in weights else x

    def linear(self, weights, prefix, x):
        y = x @ weights[prefix + "weight"].T
        return y + weights[prefix + "bias"][:, 0] if prefix + "bias" in weights else y

    def _attention(self, weights, part, x):
        prefix = part + "self_attention."
        if self.model.multi_latent_attention:
            x = self.norm(weights, part + "input_layernorm.", x)
            y = plain_attention.latent(self, weights, prefix, x)
        else:
            x = self.norm(weights, prefix + "linear_qkv.layer_norm_", x)
            y = plain_attention.grouped(self, weights, prefix, x)
        return self.linear(weights, prefix + "linear_proj.", y)

    def _feed_forward(self, weights, part, x):
        prefix = part + "mlp."
        if prefix + "router.weight" in weights:
            x = self.norm(weights, part + "pre_mlp_layernorm.", x)
            return plain_experts.mixture(self, weights, prefix, x)
        return self.mlp(weights, prefix,
                        self.norm(weights, prefix + "linear_fc1.layer_norm_", x))

    def _rise(self, x):
        if self.model.bias_gelu_fusion:
            return torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x ** 3))
        return torch.erf(x / math.sqrt(2))

    def mlp(self, weights, prefix, x):
        x = self.linear(weights, prefix + "linear_fc1.", x)
        if self.model.swiglu:
            gate, up = x.chunk(2, -1)
            x = gate / (1 + torch.exp(-gate)) * up
        else:
            x = x * 0.5 * (1 + self._rise(x))
        return self.linear(weights, prefix + "linear_fc2.", x)
