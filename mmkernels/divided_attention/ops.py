"""The registered ops, one pair per backend, their fake kernels and FLOPs, and the autograd.Function around them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._autograd import refuse_second_derivatives
from mmkernels._library import register
from mmkernels.divided_attention.layout import Layout

# `layout`: the numbers of a Layout, in their order.
_OPTIONS = "SymInt[] layout, int num_heads, float scale, float dropout_p"
# out [B, L, C] in the dtype of qkv; lse [B, H, rows] float32: the class token's rows, then the patches in token order
_FORWARD = f"(Tensor qkv, Tensor? frame_mask, Tensor? seed, {_OPTIONS}) -> (Tensor out, Tensor lse)"
_BACKWARD = (
    "(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor? frame_mask, Tensor? seed,"
    f" {_OPTIONS}) -> Tensor grad_qkv"
)


def _forward_fake(
    qkv: Tensor, _mask: Tensor | None, _seed: Tensor | None, layout: Sequence[int], num_heads: int, *_: float
) -> tuple[Tensor, Tensor]:
    B, L, width = qkv.shape
    return qkv.new_empty(B, L, width // 3), qkv.new_empty(B, num_heads, Layout(*layout).num_rows, dtype=torch.float32)


def _backward_fake(grad_out: Tensor, qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(qkv.shape)


def _pair_flops(qkv: Sequence[int], layout: Sequence[int]) -> int:
    """FLOPs of one product over all query-key pairs: a multiplication and an addition for each feature."""
    return 2 * qkv[0] * (qkv[2] // 3) * Layout(*layout).pairs


def _forward_flops(qkv: Sequence[int], _mask: Any, _seed: Any, layout: Sequence[int], *_: Any) -> int:
    return 2 * _pair_flops(qkv, layout)  # scores, and values


def _backward_flops(
    _grad: Any, qkv: Sequence[int], _out: Any, _lse: Any, _mask: Any, _seed: Any, layout: Sequence[int], *_: Any
) -> int:
    return 5 * _pair_flops(qkv, layout)  # scores again, and the gradients of p, v, q, k


_forward = register("divided_attention_{}_forward", _FORWARD, _forward_fake, __package__, flops=_forward_flops)
_backward = register("divided_attention_{}_backward", _BACKWARD, _backward_fake, __package__, flops=_backward_flops)


class _DividedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, frame_mask: Tensor | None, seed: Tensor | None, backend: str, *options: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = _forward[backend](qkv, frame_mask, seed, *options)
        ctx.save_for_backward(qkv, out, lse, frame_mask, seed)
        ctx.backend, ctx.options = backend, options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        qkv, out, lse, frame_mask, seed = ctx.saved_tensors
        with torch.no_grad():
            grad_qkv = _backward[ctx.backend](grad_out, qkv, out, lse, frame_mask, seed, *ctx.options)
        if torch.is_grad_enabled():  # create_graph=True
            (grad_qkv,) = refuse_second_derivatives("divided_attention", (grad_qkv,), grad_out, qkv)
        return grad_qkv, *[None] * 7


def divided_attention(
    qkv: Tensor,
    frame_mask: Tensor | None,
    seed: Tensor | None,
    layout: Layout,
    num_heads: int,
    scale: float,
    dropout_p: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Output [B, L, C] and log-sum-exps [B, H, rows] on the backend named; the output is differentiable."""
    # torch takes 0.6 us less to read a plain tuple, in each pass.
    return _DividedAttention.apply(qkv, frame_mask, seed, backend, tuple(layout), num_heads, scale, dropout_p)
