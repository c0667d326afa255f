"""The registered ops, one pair per backend, their fake kernels, and the autograd.Function around them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._autograd import keeps_products, refuse_second_derivatives
from mmkernels._flops import gradients, product
from mmkernels._library import register
from mmkernels.info_nce.options import Options

# losses [N]; row_lse [2, N], col_lse [2, M] ([2, 0] if not symmetric), each a rounded value and its
# rounding error; products [M, N], keys queries^T if the backward pass is to have them, else [0, N]; all float32
_FORWARD = (
    "(Tensor queries, Tensor keys, Tensor scale, Tensor? targets, Tensor? query_groups, Tensor? key_groups,"
    " bool symmetric, float label_smoothing, bool keep_products)"
    " -> (Tensor losses, Tensor row_lse, Tensor col_lse, Tensor products)"
)
# One gradient for each true entry of output_mask (queries, the first num_grad_keys keys, scale), an empty tensor for
# each false one.
_BACKWARD = (
    "(Tensor grad_losses, Tensor queries, Tensor keys, Tensor scale, Tensor? targets, Tensor? query_groups,"
    " Tensor? key_groups, Tensor row_lse, Tensor col_lse, Tensor products, bool symmetric, float label_smoothing,"
    " SymInt num_grad_keys, bool[3] output_mask)"
    " -> (Tensor grad_queries, Tensor grad_keys, Tensor grad_scale)"
)
# One block of the logits of several ranks, with the log-sum-exps over all of them. row_weights [N] and col_weights [M]
# are the gradients of the cross-entropies of rows and columns; targets [N] are -1 where they are in another block. What
# label smoothing spreads evenly is left to the caller. col_lse and col_weights are empty unless symmetric. The
# gradients are float32, for they are summed over blocks.
_BLOCK_BACKWARD = (
    "(Tensor queries, Tensor keys, Tensor scale, Tensor targets, Tensor row_lse, Tensor col_lse, Tensor row_weights,"
    " Tensor col_weights, float label_smoothing, bool[3] output_mask)"
    " -> (Tensor grad_queries, Tensor grad_keys, Tensor grad_scale)"
)


def _forward_fake(queries: Tensor, keys: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *options, keep_products = rest
    symmetric = Options(*options).symmetric
    num_queries, num_keys = queries.shape[0], keys.shape[0]
    shapes = ((num_queries,), (2, num_queries), (2, num_keys if symmetric else 0))
    return *map(scale.new_empty, shapes), scale.new_empty(num_keys if keep_products else 0, num_queries)


def _backward_fake(
    grad_losses: Tensor, queries: Tensor, keys: Tensor, scale: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    num_grad_keys, output_mask = rest[-2:]
    return (
        queries.new_empty(queries.shape if output_mask[0] else 0),
        keys.new_empty((num_grad_keys, keys.shape[1]) if output_mask[1] else 0),
        scale.new_empty(() if output_mask[2] else 0),
    )


def _block_backward_fake(queries: Tensor, keys: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs = zip((queries, keys, scale), rest[-1], strict=True)
    return tuple(scale.new_empty(x.shape if wanted else 0) for x, wanted in inputs)


def _forward_flops(queries: Sequence[int], keys: Sequence[int], *_: Any) -> int:
    return product(queries, keys)


def _backward_flops(_grad: Any, queries: Sequence[int], keys: Sequence[int], *rest: Any) -> int:
    return gradients(queries, keys, *rest[-1])


def _block_backward_flops(queries: Sequence[int], keys: Sequence[int], *rest: Any) -> int:
    return gradients(queries, keys, *rest[-1])


_BACKENDS = ("cpu", "triton", "chunked")
forward = register("info_nce_{}_forward", _FORWARD, _forward_fake, __package__, (*_BACKENDS, "cute"), _forward_flops)
_backward = register("info_nce_{}_backward", _BACKWARD, _backward_fake, __package__, _BACKENDS, _backward_flops)
_backward["cute"] = _backward["triton"]  # the log-sum-exps are the same
block_backward = register(
    "info_nce_{}_block_backward", _BLOCK_BACKWARD, _block_backward_fake, __package__, flops=_block_backward_flops
)


class _InfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        queries: Tensor,
        keys: Tensor,
        key_queue: Tensor | None,
        scale: Tensor,
        options: Options,
        backend: str,
        keep_products: bool,
    ) -> Tensor:
        all_keys = keys if key_queue is None else torch.cat([keys, key_queue])
        losses, *kept = forward[backend](queries, all_keys, scale, *options, keep_products)
        ctx.save_for_backward(queries, all_keys, scale, *options[:3], *kept)
        ctx.num_keys = keys.shape[0]
        ctx.numbers, ctx.backend = options[3:], backend
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        of_queries, of_keys, of_queue, of_scale = ctx.needs_input_grad[:4]
        num_grad_keys = saved[1].shape[0] if of_queue else ctx.num_keys
        mask = [of_queries, of_keys or of_queue, of_scale]
        with torch.no_grad():
            grads = _backward[ctx.backend](grad_losses, *saved, *ctx.numbers, num_grad_keys, mask)
        if torch.is_grad_enabled():  # create_graph=True
            grads = refuse_second_derivatives("info_nce", grads, grad_losses, *saved[:3])
        grad_queries, grad_keys, grad_scale = grads
        return (
            grad_queries if of_queries else None,
            grad_keys[: ctx.num_keys] if of_keys else None,
            grad_keys[ctx.num_keys :] if of_queue else None,
            grad_scale if of_scale else None,
            *(None,) * 3,
        )


def info_nce(
    queries: Tensor, keys: Tensor, key_queue: Tensor | None, scale: Tensor, options: Options, backend: str
) -> Tensor:
    """One loss per query, [N] float32, on the backend named; differentiable."""
    num_keys = keys.shape[0] + (0 if key_queue is None else key_queue.shape[0])
    keep = backend == "cpu" and keeps_products(queries.shape[0] * num_keys, queries, keys, key_queue, scale)
    return _InfoNCE.apply(queries, keys, key_queue, scale, options, backend, keep)
