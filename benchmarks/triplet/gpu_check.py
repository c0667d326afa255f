"""What the check on a GPU runs for triplet: the cases of the tests and larger ones, and what users run today."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.gpu_runs import PAIR_SIZES, QUICK_PAIR_SIZES, Contest, pair_leaves, share_of_products
from benchmarks.triplet.peers import triplet_losses
from tests.triplet import cases

NOTE = (
    "Memory: the most beyond inputs and gradients. Share of the schedule at the rate of torch's own products: three of "
    "them for all negatives (3 G), one for the worst (1 G)."
)
PRODUCTS = {"all": 3, "hardest": 1, "semi_hard": 1}

# The edges of a GPU's largest tile, the widest rows, and several tiles a program in several strips.
CASES = cases.cases(
    [
        *cases.SIZES,
        *(cases.Case(n, n, 96, regime="a GPU's tile") for n in (127, 128, 129)),
        cases.Case(1000, 1500, 2048, options={"symmetric": False}, regime="widest D, rows alone"),
        cases.Case(4200, 4200, 256, regime="strips"),  # the band of its budget takes a product of 4200 x 4200 x 4200
    ]
)


def check(case: cases.Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """One loss for each query, and their mean, whose gradients come from another pass."""
    return [x for reduction in ("none", "mean") for x in cases.check_case(case, dtype, "triton", reduction, device)]


class Size(NamedTuple):
    N: int
    D: int
    mining: str


SIZES = [Size(*size, mining) for size in PAIR_SIZES for mining in PRODUCTS]
QUICK = [Size(*size, mining) for size in QUICK_PAIR_SIZES for mining in PRODUCTS]


def contest(size: Size, dtype: torch.dtype, device: torch.device) -> Contest:
    """Forward and backward."""
    N, D, mining = size
    leaves = pair_leaves(N, D, dtype, device)
    peers = {name: functools.partial(loss, *leaves) for name, loss in triplet_losses(mining, "triton").items()}
    return Contest(peers, leaves, share_of_products(PRODUCTS[mining], N, N, D, dtype, device))
