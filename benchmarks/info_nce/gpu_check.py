"""What the check on a GPU runs for info_nce: the cases of the tests and more, and what users run today."""

import functools

import torch
from torch import Tensor

from benchmarks.harness.gpu_runs import PAIR_SIZES, QUICK_PAIR_SIZES, Contest, PairSize, pair_leaves, share_of_products
from benchmarks.info_nce.peers import contrastive_losses
from tests.info_nce import cases

NOTE = "Memory: the most beyond inputs and gradients. Share of 4 G: four products at the rate of torch's own."

# The edges of a GPU's largest tile, the widest rows, and several tiles a program in several strips.
CASES = [
    *cases.CASES,
    *(cases.Case(n, n, 96, scale=20.0, near=0.5, regime="a GPU's tile") for n in (127, 128, 129)),
    # A last tile of 9 x 9: its rows all come near its largest logit, and one exponential would serve them.
    cases.Case(777, 777, 256, scale=100.0, near=0.95, regime="losses near zero"),
    cases.Case(1000, 1500, 2048, scale=20.0, near=0.5, regime="widest D"),
    cases.Case(5000, 5000, 256, scale=20.0, near=0.5, regime="strips"),
    cases.Case(5000, 5000, 256, scale=20.0, near=0.5, options=cases.grouped(5000, 5000, 301), regime="strips, groups"),
]


def check(case: cases.Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return cases.check_case(case, dtype, "triton", device)


SIZES, QUICK = [*PAIR_SIZES, PairSize(65536, 768)], QUICK_PAIR_SIZES


def contest(size: PairSize, dtype: torch.dtype, device: torch.device) -> Contest:
    """Forward and backward; four products are the least that the loss and its gradients take."""
    leaves = pair_leaves(*size, dtype, device, 20.0)
    peers = {name: functools.partial(loss, *leaves) for name, loss in contrastive_losses("triton").items()}
    return Contest(peers, leaves, share_of_products(4, size.N, size.N, size.D, dtype, device))
