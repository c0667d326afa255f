"""How an op describes to bench what pytest-benchmark times."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16)


class BenchCase(NamedTuple):
    """One candidate in one cell."""

    cell: str  # what is compared: pytest-benchmark groups by it
    who: str
    make: Callable[[], Callable[[], Any]]  # makes the inputs and gives the call that is timed
    rounds: int = 5


def both_passes(loss: Callable[..., Tensor], leaves: Sequence[Tensor], *given: Tensor) -> Callable[[], Any]:
    """A loss and its gradients as one call."""
    return lambda: torch.autograd.grad(loss(*leaves, *given), leaves)
