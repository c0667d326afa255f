"""What the check on a GPU runs for siglip: the cases of the tests and larger ones, and what users run today."""

import functools

import torch
from torch import Tensor

from benchmarks.harness.gpu_runs import PAIR_SIZES, QUICK_PAIR_SIZES, Contest, PairSize, pair_leaves, share_of_products
from benchmarks.siglip.peers import Loss, sigmoid_losses
from tests.siglip import cases

NOTE = "Memory: the most beyond inputs and gradients. Share of 4 G: four products at the rate of torch's own."

# The edges of a GPU's largest tile, the widest rows, and several tiles a program in several strips.
CASES = [
    *cases.CASES,
    *(cases.Case(n, n, 96, regime="a GPU's tile") for n in (127, 128, 129)),
    cases.Case(1000, 1500, 2048, regime="widest D"),
    cases.Case(5000, 5000, 256, regime="strips"),
]


def check(case: cases.Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return cases.check_case(case, dtype, "triton", device=device)


SIZES, QUICK = [*PAIR_SIZES, PairSize(65536, 768)], QUICK_PAIR_SIZES


def contest(size: PairSize, dtype: torch.dtype, device: torch.device) -> Contest:
    """Forward and backward; four products are the least that the loss and its gradients take."""
    leaves = pair_leaves(*size, dtype, device, 10.0, -10.0)
    losses = sigmoid_losses("triton") | gpu_losses()
    peers = {name: functools.partial(loss, *leaves) for name, loss in losses.items()}
    return Contest(peers, leaves, share_of_products(4, size.N, size.N, size.D, dtype, device))


def gpu_losses() -> dict[str, Loss]:
    """Peers that run on a GPU alone: siglip-kernel, its default of the dtype and its fully fused kernel."""
    try:
        from siglip_kernel import fused_siglip_loss
    except ImportError:
        return {}

    def with_backend(backend: str) -> Loss:
        return lambda queries, keys, scale, bias: fused_siglip_loss(queries, keys, scale.log(), bias, backend=backend)

    return {"siglip-kernel": with_backend("auto"), "siglip-kernel, fused": with_backend("fused")}
