"""What the check on a GPU runs for distillation: the cases of the tests and larger ones, and what users run today."""

import functools

import torch
from torch import Tensor

from benchmarks.distillation.peers import distillation_losses
from benchmarks.harness.gpu_runs import PAIR_SIZES, QUICK_PAIR_SIZES, Contest, PairSize, pair_leaves, share_of_products
from mmkernels.testing import features
from tests.distillation import cases

NOTE = "Memory: the most beyond inputs and gradients. Share of 6 G: six products at the rate of torch's own."

# The edges of a GPU's largest tile, a wide teacher, and several tiles a program in several strips.
CASES = [
    *cases.CASES,
    *(cases.Case(n, n, 64, 96, regime="a GPU's tile") for n in (127, 128, 129)),
    # A last tile of 9 x 9: its rows all come near its largest logit, and one exponential would serve them.
    cases.Case(
        777, 777, 256, 256, scale=100.0, teacher_scale=100.0, near=0.95, teacher_near=0.95, regime="losses near zero"
    ),
    cases.Case(1000, 1500, 768, 1024, symmetric=False, regime="rows alone, wide teacher"),
    cases.Case(5000, 5000, 256, 256, regime="strips"),
]


def check(case: cases.Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    return cases.check_case(case, dtype, "triton", device)


SIZES, QUICK = PAIR_SIZES, QUICK_PAIR_SIZES


def contest(size: PairSize, dtype: torch.dtype, device: torch.device) -> Contest:
    """Forward and backward; the student takes four products and the teacher two."""
    leaves = pair_leaves(*size, dtype, device, 20.0)
    teacher = [features(*size, dtype, seed=seed).to(device) for seed in (3, 4)]
    teacher.append(torch.tensor(50.0, device=device))
    losses = distillation_losses("triton")
    peers = {name: functools.partial(loss, *leaves, *teacher) for name, loss in losses.items()}
    return Contest(peers, leaves, share_of_products(6, size.N, size.N, size.D, dtype, device))
