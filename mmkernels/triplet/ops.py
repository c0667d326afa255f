"""The registered ops, three per backend, their fake kernels, and the autograd.Functions around them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._autograd import refuse_second_derivatives
from mmkernels._flops import gradients, product
from mmkernels._library import register
from mmkernels._reduction import reduced
from mmkernels.triplet.options import Options

# losses [N], float32; worst [2, N], int32: the worst negative of each query and of each matched key where it costs
# something, else -1; [1, N] unless symmetric, no columns for mining="all".
_FORWARD = "(Tensor queries, Tensor keys, float margin, str mining, bool symmetric) -> (Tensor losses, Tensor worst)"
# mining="all" takes one pass: losses [N] and the gradients of their sum, weighted if there are weights [N]; all in
# float32. One gradient for each true entry of output_mask (queries, keys), an empty tensor for each false one.
_HINGE_GRADIENTS = (
    "(Tensor queries, Tensor keys, Tensor? weights, float margin, bool symmetric, bool[2] output_mask)"
    " -> (Tensor losses, Tensor grad_queries, Tensor grad_keys)"
)
# The gradients of the other minings, in the dtype of the features.
_WORST_GRADIENTS = (
    "(Tensor grad_losses, Tensor losses, Tensor queries, Tensor keys, Tensor worst, bool[2] output_mask)"
    " -> (Tensor grad_queries, Tensor grad_keys)"
)


def _forward_fake(queries: Tensor, keys: Tensor, margin: float, mining: str, symmetric: bool) -> tuple[Tensor, Tensor]:
    rows = queries.shape[0]
    columns = 0 if mining == "all" else rows
    losses = queries.new_empty(rows, dtype=torch.float32)
    return losses, queries.new_empty(2 if symmetric else 1, columns, dtype=torch.int32)


def _hinge_gradients_fake(
    queries: Tensor, keys: Tensor, weights: Tensor | None, margin: float, symmetric: bool, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    losses = queries.new_empty(queries.shape[0], dtype=torch.float32)
    of_queries, of_keys = output_mask
    return (
        losses,
        losses.new_empty(queries.shape if of_queries else 0),
        losses.new_empty(keys.shape if of_keys else 0),
    )


def _worst_gradients_fake(
    grad_losses: Tensor, losses: Tensor, queries: Tensor, keys: Tensor, worst: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    of_queries, of_keys = output_mask
    return queries.new_empty(queries.shape if of_queries else 0), keys.new_empty(keys.shape if of_keys else 0)


def _forward_flops(queries: Sequence[int], keys: Sequence[int], *_: Any) -> int:
    return product(queries, keys)


def _hinge_gradients_flops(
    queries: Sequence[int],
    keys: Sequence[int],
    weights: Sequence[int] | None,
    _margin: float,
    _symmetric: bool,
    output_mask: list[bool],
) -> int:
    # With weights it is a backward pass, whose forward pass has counted the similarities.
    return (weights is None) * product(queries, keys) + gradients(queries, keys, *output_mask)


def _worst_gradients_flops(
    _grad: Any, _losses: Any, queries: Sequence[int], keys: Sequence[int], _worst: Any, output_mask: list[bool]
) -> int:
    return gradients(queries, keys, *output_mask)


_forward = register("triplet_{}_forward", _FORWARD, _forward_fake, __package__, flops=_forward_flops)
_hinge_gradients = register(
    "triplet_{}_hinge_gradients", _HINGE_GRADIENTS, _hinge_gradients_fake, __package__, flops=_hinge_gradients_flops
)
_worst_gradients = register(
    "triplet_{}_worst_gradients", _WORST_GRADIENTS, _worst_gradients_fake, __package__, flops=_worst_gradients_flops
)


def _finished(ctx: Any, grads: tuple[Tensor, ...], *sources: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of a backward pass: those that are needed, tied to the tensors they depend on."""
    if torch.is_grad_enabled():  # create_graph=True
        grads = refuse_second_derivatives("triplet", grads, *sources)
    return tuple(grad if needed else None for grad, needed in zip(grads, ctx.needs_input_grad, strict=False))


class _SumOverAll(torch.autograd.Function):
    """The sum of all rows' losses. Their gradients are known up to one number, so one pass computes all.

    The gradients wait in float32: their product with the upstream gradient is rounded once, whatever its size.
    """

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, options: Options, backend: str, mask: list[bool]) -> Tensor:
        margin, _, symmetric = options
        losses, *grads = _hinge_gradients[backend](queries, keys, None, margin, symmetric, mask)
        ctx.save_for_backward(queries, keys, *grads)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, *sums = ctx.saved_tensors
        with torch.no_grad():
            grads = tuple((grad_loss * grad).to(queries.dtype) for grad in sums)
        return *_finished(ctx, grads, grad_loss, queries, keys), None, None, None


class _LossesOverAll(torch.autograd.Function):
    """The losses of all rows, each with an upstream gradient of its own."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, options: Options, backend: str) -> Tensor:
        ctx.save_for_backward(queries, keys)
        ctx.options, ctx.backend = options, backend
        return _forward[backend](queries, keys, *options)[0]

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys = ctx.saved_tensors
        margin, _, symmetric = ctx.options
        mask = list(ctx.needs_input_grad[:2])
        with torch.no_grad():
            _, *sums = _hinge_gradients[ctx.backend](queries, keys, grad_losses, margin, symmetric, mask)
            grads = tuple(grad.to(queries.dtype) for grad in sums)
        return *_finished(ctx, grads, grad_losses, queries, keys), None, None


class _LossesOverWorst(torch.autograd.Function):
    """The losses of all rows, each of one negative per direction."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, options: Options, backend: str) -> Tensor:
        losses, worst = _forward[backend](queries, keys, *options)
        ctx.save_for_backward(queries, keys, losses, worst)
        ctx.backend = backend
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, losses, worst = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:2])
        with torch.no_grad():
            grads = _worst_gradients[ctx.backend](grad_losses, losses, queries, keys, worst, mask)
        return *_finished(ctx, grads, grad_losses, queries, keys), None, None


def triplet(queries: Tensor, keys: Tensor, options: Options, reduction: str, backend: str) -> Tensor:
    """The loss, a scalar or [N], float32, on the backend named; differentiable."""
    if options.mining != "all":
        return reduced(_LossesOverWorst.apply(queries, keys, options, backend), reduction)
    if reduction != "none" and torch.is_grad_enabled() and (queries.requires_grad or keys.requires_grad):
        mask = [queries.requires_grad, keys.requires_grad]
        total = _SumOverAll.apply(queries, keys, options, backend, mask)
        return total / len(queries) if reduction == "mean" else total
    return reduced(_LossesOverAll.apply(queries, keys, options, backend), reduction)
