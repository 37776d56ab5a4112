"""A Mamba-2 mixer in plain torch functions, for ``plain_gpt``: x is [positions, width].

The recurrence as it stands (Dao and Gu, arXiv 2405.21060): position by position, head by head.
"""

from __future__ import annotations

import torch


def mixer(plain, weights, prefix, x):
    model = plain.model
    heads, width = model.mamba_num_heads, model.mamba_head_dim
    groups, size = model.mamba_num_groups, model.mamba_state_dim
    inner = heads * width
    z, xbc, dt = plain.linear(weights, prefix + "in_proj.", x).split(
        [inner, inner + 2 * groups * size, heads], -1)
    x, b, c = _convolved(weights, prefix + "conv1d.", xbc).split(
        [inner, groups * size, groups * size], -1)
    dt = torch.log(1 + torch.exp(dt + weights[prefix + "dt_bias"][:, 0]))
    outputs = []
    for head in range(heads):
        own = slice(head * width, (head + 1) * width)
        group = slice(head // (heads // groups) * size, (head // (heads // groups) + 1) * size)
        outputs.append(_head(x[:, own], b[:, group], c[:, group], dt[:, head],
                             weights[prefix + "A_log"][head, 0], weights[prefix + "D"][head, 0]))
    gated = torch.cat(outputs, -1) * z / (1 + torch.exp(-z))
    parts = [part / torch.sqrt((part * part).mean(-1, keepdim=True) + 1e-5)
             for part in gated.chunk(groups, -1)]
    return plain.linear(weights, prefix + "out_proj.",
                        torch.cat(parts, -1) * weights[prefix + "norm.weight"][:, 0])


def _convolved(weights, prefix, x):
    taps, bias = weights[prefix + "weight"], weights[prefix + "bias"][:, 0]
    rows = []
    for position in range(len(x)):
        y = bias
        for tap in range(4):
            source = position - 3 + tap
            if source >= 0:
                y = y + taps[:, tap] * x[source]
        rows.append(y / (1 + torch.exp(-y)))
    return torch.stack(rows)


def _head(x, b, c, dt, a_log, d):
    state = torch.zeros(x.shape[1], b.shape[1], dtype=x.dtype)
    outputs = []
    for position in range(len(x)):
        state = (state * torch.exp(-dt[position] * torch.exp(a_log))
                 + dt[position] * torch.outer(x[position], b[position]))
        outputs.append(state @ c[position] + d * x[position])
    return torch.stack(outputs)
