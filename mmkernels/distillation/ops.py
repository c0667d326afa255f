"""The registered ops, one pair per backend, their fake kernels, and the autograd.Function around them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._autograd import keeps_products, refuse_second_derivatives
from mmkernels._flops import gradients, product
from mmkernels._library import register
from mmkernels.distillation.options import Options

_INPUTS = "Tensor queries, Tensor keys, Tensor scale, Tensor teacher_queries, Tensor teacher_keys, Tensor teacher_scale"
_STATISTICS = "Tensor row_lse, Tensor col_lse, Tensor teacher_row_lse, Tensor teacher_col_lse"
# distilled [N], the cross-entropies under the teacher, and matched [N], those against the key of the same number (NaN
# where there is none); row_lse [2, N], col_lse [2, M] ([2, 0] if not symmetric), each a rounded value and its rounding
# error; products [2, M, N], keys queries^T of the student and of the teacher if the backward pass is to have them, else
# [0, M, N]; all float32
_FORWARD = (
    f"({_INPUTS}, bool symmetric, bool keep_products)"
    f" -> (Tensor distilled, Tensor matched, {_STATISTICS}, Tensor products)"
)
# One gradient for each true entry of output_mask (queries, keys, scale), an empty tensor for each false one.
_BACKWARD = (
    f"(Tensor grad_distilled, Tensor grad_matched, {_INPUTS}, {_STATISTICS}, Tensor products, bool symmetric,"
    " bool[3] output_mask)"
    " -> (Tensor grad_queries, Tensor grad_keys, Tensor grad_scale)"
)


def _forward_fake(queries: Tensor, keys: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *options, keep_products = rest
    symmetric = Options(*options).symmetric
    num_queries, num_keys = queries.shape[0], keys.shape[0]
    losses = (scale.new_empty(num_queries) for _ in range(2))
    counts = (num_queries, num_keys if symmetric else 0)
    statistics = (scale.new_empty(2, count) for _ in range(2) for count in counts)
    return *losses, *statistics, scale.new_empty(2 if keep_products else 0, num_keys, num_queries)


def _backward_fake(
    grad_distilled: Tensor, grad_matched: Tensor, queries: Tensor, keys: Tensor, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    output_mask = rest[-1]
    return (
        queries.new_empty(queries.shape if output_mask[0] else 0),
        keys.new_empty(keys.shape if output_mask[1] else 0),
        scale.new_empty(() if output_mask[2] else 0),
    )


def _forward_flops(
    queries: Sequence[int],
    keys: Sequence[int],
    _scale: Any,
    teacher_queries: Sequence[int],
    teacher_keys: Sequence[int],
    *_: Any,
) -> int:
    return product(queries, keys) + product(teacher_queries, teacher_keys)


def _backward_flops(_distilled: Any, _matched: Any, queries: Sequence[int], keys: Sequence[int], *rest: Any) -> int:
    return gradients(queries, keys, *rest[-1])


_forward = register("distillation_{}_forward", _FORWARD, _forward_fake, __package__, flops=_forward_flops)
_backward = register("distillation_{}_backward", _BACKWARD, _backward_fake, __package__, flops=_backward_flops)


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        options: Options,
        backend: str,
        keep_products: bool,
    ) -> tuple[Tensor, Tensor]:
        distilled, matched, *kept = _forward[backend](queries, keys, scale, *options, keep_products)
        ctx.save_for_backward(queries, keys, scale, *options[:3], *kept)
        ctx.numbers, ctx.backend = options[3:], backend
        return distilled, matched

    @staticmethod
    def backward(ctx: Any, grad_distilled: Tensor, grad_matched: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        with torch.no_grad():
            grads = _backward[ctx.backend](grad_distilled, grad_matched, *saved, *ctx.numbers, mask)
        if torch.is_grad_enabled():  # create_graph=True
            grads = refuse_second_derivatives("distillation", grads, grad_distilled, grad_matched, *saved[:3])
        return *(grad if needed else None for grad, needed in zip(grads, mask, strict=True)), *(None,) * 3


def distillation(queries: Tensor, keys: Tensor, scale: Tensor, options: Options, backend: str) -> tuple[Tensor, Tensor]:
    """The loss of each query under the teacher and that against its own key, [N] float32 each, on the backend named.

    Differentiable in queries, keys and scale; the teacher gets no gradient.
    """
    keep = backend == "cpu" and keeps_products(2 * queries.shape[0] * keys.shape[0], queries, keys, scale)
    return _Distillation.apply(queries, keys, scale, options, backend, keep)
