"""The rows of all ranks on each: what the eager references are made of."""

from typing import Any

import torch
from torch import Tensor

from mmkernels.distributed.ranks import Ranks


class GatheredRows(torch.autograd.Function):
    """The rows of all ranks, in their order; their gradient is summed over ranks."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], ranks: Ranks) -> Tensor:
        ctx.rows, ctx.ranks = rows, ranks
        return ranks.gather(x, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        first = sum(ctx.rows[: ctx.ranks.rank])
        return ctx.ranks.total(grad)[first : first + ctx.rows[ctx.ranks.rank]].to(grad.dtype), None, None
