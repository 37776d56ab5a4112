"""A mixture of experts in plain torch functions, for ``plain_gpt``: x is [positions, width].

Every expert sees every token, and counts with its weight, which is 0 where it was not chosen.
"""

from __future__ import annotations

import torch
from tiny_models import expert_bias


def mixture(plain, weights, prefix, x):
    shares = _shares(plain.model, x @ weights[prefix + "router.weight"].T)
    y = sum(shares[:, expert, None] * plain.mlp(weights, f"{prefix}experts.experts.{expert}.", x)
            for expert in range(plain.model.num_experts))
    shared = prefix + "shared_experts."
    if shared + "linear_fc1.weight" in weights:
        z = plain.mlp(weights, shared, x)
        if shared + "gate_weight" in weights:
            z = z * torch.sigmoid(x @ weights[shared + "gate_weight"].T)
        y = y + z
    return y


def _shares(model, logits):
    """[positions, experts] weight of each expert for each token."""
    if model.moe_router_score_function == "sigmoid":
        scores = torch.sigmoid(logits)
    else:
        scores = torch.softmax(logits, -1)
    preference = scores.detach()
    if model.moe_router_enable_expert_bias:
        preference = preference + expert_bias(model.num_experts)
    chosen = _chosen(model, preference)
    if model.moe_router_pre_softmax:
        shares = scores * chosen
    else:  # what a softmax over the chosen logits is, too
        shares = scores * chosen / (scores * chosen).sum(-1, keepdim=True)
    return shares * (model.moe_router_topk_scaling_factor or 1.0)


def _chosen(model, preference):
    """[positions, experts] 1 for the experts a token goes to."""
    chosen = torch.zeros_like(preference)
    for token, likes in enumerate(preference):
        if model.moe_router_group_topk is not None:
            groups = likes.view(model.moe_router_num_groups, -1)
            of_each = model.moe_router_topk // model.moe_router_group_topk
            worth = groups.sort(-1, descending=True).values[:, :of_each].sum(-1)
            open_groups = torch.zeros_like(groups)
            open_groups[worth.argsort(descending=True)[: model.moe_router_group_topk]] = 1
            likes = likes.masked_fill(open_groups.flatten() == 0, -torch.inf)
        chosen[token, likes.argsort(descending=True)[: model.moe_router_topk]] = 1
    return chosen
