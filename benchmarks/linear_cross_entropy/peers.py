"""What users run today for linear cross-entropy: calls (hidden, weight, targets) -> loss."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels

# The packages whose versions a report writes beside its numbers; torch is always there.
PACKAGES = ("liger-kernel", "cut-cross-entropy")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def chunked_linear_cross_entropy() -> Callable[..., Tensor] | None:
    """torch's linear cross-entropy in chunks, where torch has it: without options the call is the eager code."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def eager_classification(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The logits as a tensor."""
    return F.cross_entropy(F.linear(hidden, weight), targets)


def classification_losses(impl: str = "auto") -> dict[str, Loss]:
    """The fused loss first, then its peers. Liger and cut-cross-entropy are Triton kernels: no CPU runs them."""
    losses: dict[str, Loss] = {
        "mmkernels": lambda hidden, weight, targets: mmkernels.linear_cross_entropy(hidden, weight, targets, impl=impl),  # type: ignore[arg-type]
        "eager": eager_classification,
        "torch.compile": torch.compile(eager_classification, dynamic=False),
    }
    if (chunked := chunked_linear_cross_entropy()) is not None:
        losses["F.linear_cross_entropy"] = chunked
    return losses
