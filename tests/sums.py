"""Eager code whose float32 products add as a GPU's units do, for the budgets of GPU kernels."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


def sums_as_in(impl: str) -> contextlib.AbstractContextManager[Any]:
    """Where the eager peer of an implementation runs.

    A GPU has one accumulator for each element of a product and adds D terms in the order of k. A CPU's library adds in
    blocks and is more exact, the more the larger D is: a budget from its error would ask of Triton's kernels what eager
    code on their own device does not keep.
    """
    return _InOrderOfK() if impl in ("triton", "chunked") else contextlib.nullcontext()


class _InOrderOfK(TorchDispatchMode):
    """Products of float32, those of the backward pass included."""

    def __torch_dispatch__(
        self, function: Any, types: Sequence[type], arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        if function in (aten.mm.default, aten.bmm.default) and arguments[0].dtype == torch.float32:
            return product_in_order(*arguments)
        if function is aten.addmm.default and arguments[0].dtype == torch.float32:
            assert not options, "addmm: factors are not written"
            return arguments[0] + product_in_order(*arguments[1:])
        return function(*arguments, **options or {})


def product_in_order(x: Tensor, y: Tensor) -> Tensor:
    """x y, [..., N, D] times [..., D, M]: one addition for each k, from the first to the last."""
    total = x.new_zeros(*x.shape[:-1], y.shape[-1])
    for k in range(x.shape[-1]):
        total.addcmul_(x[..., k, None], y[..., k, None, :])
    return total
