"""The registered ops, one pair per backend, their fake kernels, and the autograd.Functions around them."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mmkernels._autograd import refuse_second_derivatives
from mmkernels._flops import gradients, product
from mmkernels._library import register
from mmkernels._reduction import reduced

_FP16_REACH = 2.0**15  # half of the largest float16 number, 65504

# One loss per query, [N] float32. Key i + match_offset matches query i, if there is one.
_LOSSES = "(Tensor queries, Tensor keys, Tensor scale, Tensor bias, int match_offset) -> Tensor"
# The gradients of sum_i weights[i] losses[i]: one for each true entry of output_mask (queries, keys, scale, bias), an
# empty tensor for each false one; those of the features in float32 if asked for, else in their dtype. The losses come
# with them if asked for: the pass computes the logits anyway.
_GRADIENTS = (
    "(Tensor weights, Tensor queries, Tensor keys, Tensor scale, Tensor bias, bool with_losses, int match_offset,"
    " bool in_float32, bool[4] output_mask)"
    " -> (Tensor losses, Tensor grad_queries, Tensor grad_keys, Tensor grad_scale, Tensor grad_bias)"
)


def _losses_fake(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, match_offset: int) -> Tensor:
    return scale.new_empty(queries.shape[0])


def _gradients_fake(
    weights: Tensor,
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor,
    with_losses: bool,
    match_offset: int,
    in_float32: bool,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    grads = (
        x.new_empty(x.shape if wanted else 0, dtype=torch.float32 if in_float32 else x.dtype)
        for x, wanted in zip((queries, keys, scale, bias), output_mask, strict=True)
    )
    return scale.new_empty(queries.shape[0] if with_losses else 0), *grads


def _losses_flops(queries: Sequence[int], keys: Sequence[int], *_: Any) -> int:
    return product(queries, keys)


def _gradients_flops(
    _weights: Any,
    queries: Sequence[int],
    keys: Sequence[int],
    _scale: Any,
    _bias: Any,
    with_losses: bool,
    _match_offset: int,
    _in_float32: bool,
    output_mask: list[bool],
) -> int:
    return with_losses * product(queries, keys) + gradients(queries, keys, *output_mask[:3])


losses = register("siglip_{}_losses", _LOSSES, _losses_fake, __package__, flops=_losses_flops)
gradients_of = register("siglip_{}_gradients", _GRADIENTS, _gradients_fake, __package__, flops=_gradients_flops)


class _LossOfRows(torch.autograd.Function):
    """One loss per query. The weight of each is known only in the backward pass, which recomputes the logits."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(queries, keys, scale, bias)
        ctx.backend = backend
        return losses[backend](queries, keys, scale, bias, 0)

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        inputs, mask = ctx.saved_tensors, list(ctx.needs_input_grad[:4])
        with torch.no_grad():
            grads = gradients_of[ctx.backend](grad_losses, *inputs, False, 0, False, mask)[1:]
        if torch.is_grad_enabled():  # create_graph=True
            grads = refuse_second_derivatives("siglip", grads, grad_losses, *inputs)
        return *(grad if needed else None for grad, needed in zip(grads, mask, strict=True)), None


class _LossOfAll(torch.autograd.Function):
    """The sum or mean of all losses. Every row weighs the same, so the forward pass computes the gradients, too.

    They are kept in the dtype of the features until the backward pass multiplies them by the upstream gradient.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, mean: bool, backend: str, mask: list[bool]
    ) -> Tensor:
        weights = scale.new_ones(queries.shape[0])
        if mean:
            weights = weights / queries.shape[0]
        unit = _fp16_unit(queries, keys, scale, weights) if queries.dtype == torch.float16 else None
        if unit is not None:
            weights = weights / unit
        of_rows, *grads = gradients_of[backend](weights, queries, keys, scale, bias, True, 0, False, mask)
        ctx.save_for_backward(queries, keys, scale, bias, unit, *grads)
        return of_rows.mean() if mean else of_rows.sum()

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, scale, bias, unit, *kept = ctx.saved_tensors
        mask = ctx.needs_input_grad[:4]
        with torch.no_grad():
            factor = grad_loss if unit is None else grad_loss * unit
            grads = tuple(_times(grad, factor) for grad in kept)
        if torch.is_grad_enabled():  # create_graph=True
            grads = refuse_second_derivatives("siglip", grads, grad_loss, queries, keys, scale, bias)
        return *(grad if needed else None for grad, needed in zip(grads, mask, strict=True)), None, None, None


def _fp16_unit(queries: Tensor, keys: Tensor, scale: Tensor, weights: Tensor) -> Tensor:
    """The power of two in whose units float16 gradients are kept: none overflows, and those that a mean over many rows
    makes small keep their digits."""

    def reach(features: Tensor) -> Tensor:
        low, high = features.aminmax()
        return torch.maximum(high, -low).float() * features.shape[0]

    # |d loss / d q| <= scale weight sum_j |k_j|, and likewise for a key.
    bound = scale.abs() * weights[0] * torch.maximum(reach(queries), reach(keys))
    return torch.where(bound > 0, torch.exp2(torch.ceil(torch.log2(bound))) / _FP16_REACH, 1.0)


def _times(grad: Tensor, factor: Tensor) -> Tensor:
    """A new tensor grad * factor, rounded once."""
    if grad.is_cpu or grad.dtype == torch.float32:
        return grad * factor  # a CPU multiplies half-precision tensors by a float32 scalar in float32
    return (grad.float() * factor).to(grad.dtype)


def siglip(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    bias: Tensor,
    reduction: Literal["none", "mean", "sum"],
    backend: str,
) -> Tensor:
    """The loss, float32: [] or, for "none", [N], on the backend named; differentiable."""
    inputs = (queries, keys, scale, bias)
    mask = [torch.is_grad_enabled() and x.requires_grad for x in inputs]
    if any(mask) and reduction != "none":
        return _LossOfAll.apply(*inputs, reduction == "mean", backend, mask)
    return reduced(_LossOfRows.apply(*inputs, backend), reduction)
