"""What the check on a GPU runs for linear_cross_entropy: the cases of the tests and larger ones, and its peers."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.gpu_runs import Contest, share_of_products
from benchmarks.linear_cross_entropy.peers import Loss, classification_losses
from tests.linear_cross_entropy import cases

NOTE = "Memory: the most beyond inputs and gradients. Share of 4 G: four products at the rate of torch's own."

# The edges of a GPU's largest tile, the widest rows, and several tiles a program in several strips.
CASES = [
    *cases.CASES,
    *(cases.Case(n, 1025, 96, regime="a GPU's tile") for n in (127, 128, 129)),
    cases.Case(1000, 5000, 2048, regime="widest D"),
    cases.Case(5000, 20000, 256, regime="strips"),
]


def check(case: cases.Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return cases.check_case(case, dtype, "triton", device)


class Size(NamedTuple):
    N: int
    V: int
    D: int


SIZES = [Size(2048, 50257, 512), Size(8192, 50257, 512), Size(8192, 128256, 4096)]
QUICK = [Size(8192, 50257, 512)]


def contest(size: Size, dtype: torch.dtype, device: torch.device) -> Contest:
    """Forward and backward; four products are the least without the logits in memory."""
    N, V, D = size
    hidden = torch.randn(N, D, device=device).to(dtype).requires_grad_()
    weight = (torch.randn(V, D, device=device) * D**-0.5).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    losses = classification_losses("triton") | gpu_losses()
    peers = {name: functools.partial(loss, hidden, weight, targets) for name, loss in losses.items()}
    return Contest(peers, [hidden, weight], share_of_products(4, N, V, D, dtype, device))


def gpu_losses() -> dict[str, Loss]:
    """Peers that run on a GPU alone: those that are installed."""
    found: dict[str, Loss] = {}
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        pass
    else:
        found["Liger"] = liger_fused_linear_cross_entropy
    try:
        from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction
    except ImportError:
        pass
    else:
        # Its CuTe kernel on an H100, where that can be built.
        per_row = LigerFusedLinearScaledCrossEntropyFunction.apply
        found["Liger, scaled"] = lambda hidden, weight, targets: per_row(hidden, weight, targets).mean()
    try:
        from quack.linear_cross_entropy import chunked_linear_cross_entropy
    except ImportError:
        pass
    else:
        found["quack, chunked"] = chunked_linear_cross_entropy
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        pass
    else:
        found["cut-cross-entropy, unfiltered"] = functools.partial(linear_cross_entropy, filter_eps=None)
    return found
