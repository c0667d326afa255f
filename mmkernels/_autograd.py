"""Shared by the autograd Functions of the ops: which products they save, and the refusal of second derivatives."""

from typing import Any

import torch
from torch import Tensor

# A CPU op may hold this much beside inputs and gradients, even where they are smaller: 4,096 x 4,096 float32, as
# kFreeBytes in csrc/common/engine.cpp, which bounds the scratch of the threads.
FREE_BYTES = 64 << 20
# Below this many bytes per row of features it is faster to recompute the products than to store and load them. A row of
# 512 bytes is 8 vectors of 64: at two multiply-adds a cycle its product takes 4 cycles, and one of 256 bytes 2. What
# storing and loading one takes lies between: keeping them was slower at 256 bytes and faster at 512 (docs/info_nce.md).
_LEAST_ROW_BYTES = 512


def wants_backward(*inputs: Tensor | None) -> bool:
    """Whether a backward pass can follow this call."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def keeps_products(count: int, queries: Tensor, *others: Tensor | None) -> bool:
    """Whether a CPU op saves its `count` float32 products of features for the backward pass."""
    wide = queries.shape[1] * queries.itemsize >= _LEAST_ROW_BYTES
    return wide and 4 * count <= FREE_BYTES and wants_backward(queries, *others)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op, ctx.inputs = op, len(tensors)
        return tuple(grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"mmkernels.{ctx.op}: second derivatives are not implemented; impl='reference' has them")


def refuse_second_derivatives(op: str, grads: tuple[Tensor, ...], *sources: Tensor) -> tuple[Tensor, ...]:
    """Tie gradients to the tensors they depend on: differentiating them raises, and never silently gives zero.

    torch's once_differentiable raises only where the incoming gradient itself requires a gradient.
    """
    return _NoSecondDerivative.apply(op, len(grads), *grads, *sources)
