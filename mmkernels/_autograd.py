"""What the autograd Functions of the ops share."""

from typing import Any

import torch
from torch import Tensor

# What a CPU op may hold beside inputs and gradients even where that is more than they take.
FREE_BYTES = 64 << 20


def wants_backward(*inputs: Tensor | None) -> bool:
    """Whether a backward pass can come."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


class _NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, op: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.op, ctx.inputs = op, len(tensors)
        return tuple(grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[None, ...]:
        raise RuntimeError(f"mmkernels.{ctx.op}: second derivatives are not implemented; impl='reference' has them")


def refuse_second_derivatives(op: str, grads: tuple[Tensor, ...], *sources: Tensor) -> tuple[Tensor, ...]:
    """Tie gradients to what they were made from, so that differentiating them raises and is never silently zero.

    torch's once_differentiable does so only where the incoming gradient itself requires one.
    """
    return _NoSecondDerivative.apply(op, len(grads), *grads, *sources)
