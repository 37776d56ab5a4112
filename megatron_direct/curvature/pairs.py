"""Functions of pairs: a value and its tangent, differentiable once in reverse.

A pair (x, x') is a value and its derivative along a direction of the parameters. A function y(x)
takes it to (y, y') with y' = (dy/dx) x'. The functions here take pairs to pairs as one autograd
function each, with the backward pass written out: given (g, g'), the gradients of a scalar with
respect to (y, y'), it returns those with respect to (x, x'). Together with torch's forward mode for
all other functions, this is reverse over forward differentiation, which gives Hessian-vector
products (Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6, 1994).

Where g' is None nothing depends on the tangents: what is left is the ordinary backward pass. Keep
``with_tangents`` False then, and the tangents are not stored.
"""

from __future__ import annotations

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class LinearPair(Function):
    """y = x W^T, y' = x' W^T + x W'^T.  x, x': [..., i]; W, W': [o, i]; y, y': [..., o].

    y and the gradient with respect to x' are taken from ``slot`` where it holds them.
    """

    @staticmethod
    def forward(ctx, x, dx, weight, dweight, slot, with_tangents):
        ctx.set_materialize_grads(False)
        ctx.input_shape, ctx.slot = x.shape, slot
        x, dx = _rows(x), _rows(dx)
        ctx.save_for_backward(weight, x, *((dx, dweight) if with_tangents else ()))
        y = slot.once("output", lambda: x @ weight.t())
        dy = (dx @ weight.t()).addmm_(x, dweight.t())
        shape = (*ctx.input_shape[:-1], len(weight))
        return y.view(shape), dy.view(shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, dg):
        weight, x, dx, dweight = _padded(ctx.saved_tensors, 4)
        if dg is None:
            g = _rows(g)
            return (g @ weight).view(ctx.input_shape), None, g.t() @ x, None, None, None
        dg = _rows(dg)
        grad_x, grad_weight = dg @ dweight, dg.t() @ dx
        if g is not None:
            g = _rows(g)
            grad_x.addmm_(g, weight)
            grad_weight.addmm_(g.t(), x)
        grad_dx = ctx.slot.once("gradient", lambda: dg @ weight)
        return grad_x.view(ctx.input_shape), grad_dx.view(ctx.input_shape), grad_weight, \
            None, None, None


class ActivationPair(Function):
    """y = f(x), y' = f'(x) x', entry by entry; ``derivatives`` gives f, f' and f'' at x."""

    @staticmethod
    def forward(ctx, x, dx, derivatives, with_tangents):
        ctx.set_materialize_grads(False)
        value, first, second = derivatives(x)
        ctx.save_for_backward(first, *((second.mul_(dx),) if with_tangents else ()))
        return value, first * dx

    @staticmethod
    @once_differentiable
    def backward(ctx, g, dg):
        first, bend = _padded(ctx.saved_tensors, 2)
        if dg is None:
            return first.mul_(g), None, None, None
        grad_x = bend.mul_(dg)
        if g is not None:
            grad_x.addcmul_(first, g)
        return grad_x, first.mul_(dg), None, None


def silu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x s(x) with s the logistic function, and its first two derivatives."""
    s = torch.sigmoid(x)
    slope = s * (1 - s)
    value = x * s
    return value, torch.addcmul(s, x, slope), slope.mul_(2 + x - 2 * value)


def gelu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x Phi(x) with Phi the normal distribution function, and its first two derivatives."""
    distribution = torch.special.ndtr(x)
    density = torch.exp(-0.5 * x * x).mul_((2 * torch.pi) ** -0.5)
    return x * distribution, torch.addcmul(distribution, x, density), density.mul_(2 - x * x)


def tanh_gelu(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), and two derivatives."""
    scale, square = (2 / torch.pi) ** 0.5, x * x
    t = torch.tanh(scale * x * (1 + 0.044715 * square))
    du = scale * (1 + 3 * 0.044715 * square)
    rise = 0.5 * (1 + t)
    slope = (1 - t * t).mul_(du)  # of t
    bend = slope * (1 - x * t * du) + 3 * 0.044715 * scale * square * (1 - t * t)
    return x * rise, rise + 0.5 * x * slope, bend


class AttentionPair(Function):
    """o = P v with P = softmax(q k^T) over each position and those before it.

    With the scores S = q k^T: S' = q' k^T + q k'^T, P' = P (S' - <P, S'>) row by row, and
    o' = P' v + P v'.  q, k, v and their tangents, o, o': [n, s, d], n heads of all samples.
    """

    @staticmethod
    def forward(ctx, q, dq, k, dk, v, dv, with_tangents):
        ctx.set_materialize_grads(False)
        future = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).triu_(1)
        p = torch.softmax(torch.bmm(q, k.mT).masked_fill_(future, -torch.inf), -1)
        ds = torch.bmm(dq, k.mT).baddbmm_(q, dk.mT)
        ds -= _dot(p, ds)
        dp = p * ds
        ctx.save_for_backward(q, k, v, p, *((dq, dk, dv, ds) if with_tangents else ()))
        return torch.bmm(p, v), torch.bmm(dp, v).baddbmm_(p, dv)

    @staticmethod
    @once_differentiable
    def backward(ctx, g, dg):
        q, k, v, p, dq, dk, dv, ds = _padded(ctx.saved_tensors, 8)
        if dg is None:
            grad_p = torch.bmm(g, v.mT)
            grad_s = grad_p.sub_(_dot(p, grad_p)).mul_(p)
            return torch.bmm(grad_s, k), None, torch.bmm(grad_s.mT, q), None, \
                torch.bmm(p.mT, g), None, None
        # With respect to P and P'; ds is S' - <P, S'>, so that P' = P ds.
        grad_p, grad_dp = torch.bmm(dg, dv.mT), torch.bmm(dg, v.mT)
        grad_v, grad_dv = torch.bmm((p * ds).mT, dg), torch.bmm(p.mT, dg)
        if g is not None:
            grad_p.baddbmm_(g, v.mT)
            grad_v.baddbmm_(p.mT, g)
        # Through the softmax: with m = <P, dL/dP'>, dL/dS' = P (dL/dP' - m), and with respect to P
        # there is dL/dP itself and (dL/dP' - m) ds, where shifts of a row are lost in P again.
        grad_dp -= _dot(p, grad_dp)
        grad_p.addcmul_(grad_dp, ds)
        grad_s = grad_p.sub_(_dot(p, grad_p)).mul_(p)
        grad_ds = grad_dp.mul_(p)
        grad_q = torch.bmm(grad_s, k).baddbmm_(grad_ds, dk)
        grad_k = torch.bmm(grad_s.mT, q).baddbmm_(grad_ds.mT, dq)
        return grad_q, torch.bmm(grad_ds, k), grad_k, torch.bmm(grad_ds.mT, q), \
            grad_v, grad_dv, None


class NormPair(Function):
    """y = n w + b with n = c r, r = (mean(c^2) + eps)^(-1/2).

    c is x itself (RMSNorm) or x less its mean over the last dimension (LayerNorm, ``centred``).
    The Jacobian of n with respect to c is the symmetric J = r (I - n n^T / h), so n' = J c'.
    x, x': [..., h]; w, w', b, b': [h]; b and b' may be None.
    """

    @staticmethod
    def forward(ctx, x, dx, weight, dweight, bias, dbias, eps, centred, with_tangents):
        ctx.set_materialize_grads(False)
        ctx.centred = centred
        c, dc = (_centre(x), _centre(dx)) if centred else (x, dx)
        r = torch.rsqrt(_mean(c, c) + eps)
        n = c * r
        dn = _jacobian_product(n, r, dc)
        ctx.save_for_backward(n, r, weight, *((dc, dweight) if with_tangents else ()))
        y, dy = n * weight, (dn * weight).addcmul_(n, dweight)
        return (y, dy) if bias is None else (y.add_(bias), dy.add_(dbias))

    @staticmethod
    @once_differentiable
    def backward(ctx, g, dg):
        n, r, weight, dc, dweight = _padded(ctx.saved_tensors, 5)
        grad_n = torch.zeros_like(n) if g is None else g * weight
        grad_weight = 0 if g is None else _column_sums(g * n)
        grad_c, grad_dc = None, None
        if dg is None:
            grad_c = _jacobian_product(n, r, grad_n)
        else:
            u, v = dg * weight, dc
            grad_weight = grad_weight + _column_sums(dg * _jacobian_product(n, r, v))
            grad_c = _jacobian_product(n, r, grad_n + dg * dweight)
            # u^T J(c) v = r (u.v - (n.u)(n.v) / h), differentiated with respect to c.
            along_u, along_v = _mean(n, u), _mean(n, v)
            bend = n * (_mean(u, v) - 3 * along_u * along_v)
            bend.addcmul_(u, along_v).addcmul_(v, along_u)
            grad_c.addcmul_(bend, r.square(), value=-1)
            grad_dc = _jacobian_product(n, r, u)
        if ctx.centred:
            grad_c = _centre(grad_c)
            grad_dc = None if grad_dc is None else _centre(grad_dc)
        grad_bias = _column_sums(g) if ctx.needs_input_grad[4] and g is not None else None
        return grad_c, grad_dc, grad_weight, None, grad_bias, None, None, None, None


class CrossEntropyTangent(Function):
    """l' = <p, z'> - z'_label, the tangent of l = log sum exp z - z_label, with p = softmax(z).

    Logits z, z' are [s, b, v], this rank's v entries of the vocabulary; p, of the same shape, is
    given, ``labels`` [s, b] count from this rank's first entry, and ``held`` [s, b] tells where
    they are this rank's. ``sum_over_ranks`` sums in place over the ranks with the other entries.
    """

    @staticmethod
    def forward(ctx, z, dz, p, labels, held, sum_over_ranks):
        labels = (labels * held)[..., None]
        at_label = dz.gather(-1, labels).squeeze(-1) * held
        mean, at_label = sum_over_ranks(torch.stack([_dot(p, dz).squeeze(-1), at_label]))
        ctx.save_for_backward(dz, p, labels, held, mean)
        return mean - at_label

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        dz, p, labels, held, mean = ctx.saved_tensors
        g = g[..., None]
        grad_z = (dz - mean[..., None]).mul_(p).mul_(g)
        if not ctx.needs_input_grad[1]:
            return grad_z, None, None, None, None, None
        grad_dz = p * g
        grad_dz.scatter_add_(-1, labels, -g * held[..., None])
        return grad_z, grad_dz, None, None, None, None


def _rows(x: torch.Tensor) -> torch.Tensor:
    """[..., i] as a matrix."""
    return x.reshape(-1, x.shape[-1])


def _padded(tensors: tuple, count: int) -> tuple:
    return tensors + (None,) * (count - len(tensors))


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[..., 1] inner products over the last dimension."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def _mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return _dot(a, b) / a.shape[-1]


def _centre(x: torch.Tensor) -> torch.Tensor:
    return x - x.mean(-1, keepdim=True)


def _jacobian_product(n: torch.Tensor, r: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """r (v - n mean(n v))."""
    return (v - n * _mean(n, v)).mul_(r)


def _column_sums(x: torch.Tensor) -> torch.Tensor:
    return _rows(x).sum(0)
