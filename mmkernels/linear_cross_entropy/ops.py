"""The registered ops, one pair per backend, their fake kernels, and the autograd.Function around them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels._autograd import FREE_BYTES, refuse_second_derivatives, wants_backward
from mmkernels._flops import gradients, product
from mmkernels._library import register
from mmkernels.linear_cross_entropy.options import Options

# losses [N]; lse [2, N]: a rounded value and its rounding error; products: hidden weight^T [N, V] if the backward pass
# is to have them, else [0, V]. These are float32, and so is the bias.
_FORWARD = (
    "(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, int ignore_index, float label_smoothing,"
    " bool keep_products) -> (Tensor losses, Tensor lse, Tensor products)"
)
# One gradient for each true entry of output_mask (hidden, weight, bias), an empty tensor for each false one.
_BACKWARD = (
    "(Tensor grad_losses, Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor lse, Tensor products,"
    " int ignore_index, float label_smoothing, bool[3] output_mask)"
    " -> (Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias)"
)


def _forward_fake(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    ignore_index: int,
    label_smoothing: float,
    keep_products: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, classes = hidden.shape[0], weight.shape[0]
    losses = hidden.new_empty(rows, dtype=torch.float32)
    return losses, losses.new_empty(2, rows), losses.new_empty(rows if keep_products else 0, classes)


def _backward_fake(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
    products: Tensor,
    ignore_index: int,
    label_smoothing: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if output_mask[0] else 0),
        weight.new_empty(weight.shape if output_mask[1] else 0),
        lse.new_empty(weight.shape[0] if output_mask[2] else 0),
    )


def _forward_flops(hidden: Sequence[int], weight: Sequence[int], *_: Any) -> int:
    return product(hidden, weight)


def _backward_flops(_grad: Any, hidden: Sequence[int], weight: Sequence[int], *rest: Any) -> int:
    return gradients(hidden, weight, *rest[-1][:2])


_forward = register("linear_cross_entropy_{}_forward", _FORWARD, _forward_fake, __package__, flops=_forward_flops)
_backward = register("linear_cross_entropy_{}_backward", _BACKWARD, _backward_fake, __package__, flops=_backward_flops)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        options: Options,
        backend: str,
        keep_products: bool,
    ) -> Tensor:
        losses, *kept = _forward[backend](hidden, weight, bias, targets, *options, keep_products)
        ctx.save_for_backward(hidden, weight, bias, targets, *kept)
        ctx.options, ctx.backend = options, backend
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, *rest = ctx.saved_tensors
        mask = list(ctx.needs_input_grad[:3])
        with torch.no_grad():
            grads = _backward[ctx.backend](grad_losses, hidden, weight, bias, *rest, *ctx.options, mask)
        if torch.is_grad_enabled():  # create_graph=True
            sources = (hidden, weight) if bias is None else (hidden, weight, bias)
            grads = refuse_second_derivatives("linear_cross_entropy", grads, grad_losses, *sources)
        return *(grad if needed else None for grad, needed in zip(grads, mask, strict=True)), *(None,) * 4


def _keeps_products(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether to save products for the backward pass: up to the size of the weight and its gradient, or 64 MiB."""
    small = 4 * hidden.shape[0] * weight.shape[0] <= max(2 * weight.numel() * weight.itemsize, FREE_BYTES)
    return small and wants_backward(hidden, weight, bias)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    options: Options,
    backend: str,
) -> Tensor:
    """One loss per row, [N] float32, on the backend named; differentiable."""
    keep = backend == "cpu" and _keeps_products(hidden, weight, bias)
    return _LinearCrossEntropy.apply(hidden, weight, bias, targets, options, backend, keep)
