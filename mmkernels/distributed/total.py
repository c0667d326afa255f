"""Sums over ranks, and the reductions of a loss over them."""

from typing import Any

import torch
from torch import Tensor

from mmkernels._library import register_everywhere
from mmkernels._reduction import reduced
from mmkernels.distributed.ranks import Group, ranks_by_name


def _total(x: Tensor, outer: str, inner: str) -> Tensor:
    return ranks_by_name(outer, inner).total(x).to(x.dtype)


_total_op = register_everywhere(
    "total_over_ranks", "(Tensor x, str outer, str inner) -> Tensor", _total, lambda x, *_: torch.empty_like(x)
)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, outer: str, inner: str) -> Tensor:
        ctx.names = outer, inner
        return _total_op(x, outer, inner)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _total_op(grad, *ctx.names), None, None


def total(x: Tensor, group: Group) -> Tensor:
    """The sum over all ranks; its gradient is the sum of theirs."""
    return _Total.apply(x, group.outer, group.inner)


def reduced_over_ranks(
    losses: Tensor,  # [n]
    reduction: str,
    weights: Tensor | None,  # [n]
    group: Group,
    rows: Tensor,  # [ranks], how many losses each has
) -> Tensor:
    """The own losses, their sum, or their share of the mean: the mean over ranks of these shares is the joint mean."""
    if reduction != "mean":
        return reduced(losses, reduction, weights)
    count = rows.sum() if weights is None else total(weights.to(losses.dtype).sum(), group)
    return reduced(losses, "sum", weights) * (group.size / count)
