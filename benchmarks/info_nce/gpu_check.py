"""What the check on a GPU runs for info_nce: the cases of the tests and more, and what users run today."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

import mmkernels
from benchmarks.harness.gpu_runs import PAIR_SIZES, QUICK_PAIR_SIZES, Contest, pair_leaves, share_of_products
from benchmarks.info_nce.peers import Loss, contrastive_losses
from mmkernels import _backends
from tests.info_nce import cases

NOTE = (
    "Memory: the most beyond inputs and gradients. Share of 4 G: four products at the rate of torch's own. memeff "
    "takes the temperature for a constant; inf-cl is called once in each direction."
)

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
    for impl in _named(case.d, dtype, device):
        if impl == "chunked" or not {"symmetric", "query_groups", "query_queue"} & set(case.options):
            cases.check_case(case, dtype, impl, device)
    return cases.check_case(case, dtype, "triton", device)


def _named(num_features: int, dtype: torch.dtype, device: torch.device) -> list[str]:
    """What "auto" never takes and can run here."""
    taken = [impl for impl in ("chunked", "cute") if _backends.refuses("info_nce", impl, device.type, dtype) is None]
    return [impl for impl in taken if impl == "chunked" or num_features <= 512]


class Size(NamedTuple):
    N: int
    D: int
    scale: float


# At scale 100 the logits of a tile lie further apart than one exponential can serve.
SIZES = [
    *(Size(*size, 20.0) for size in PAIR_SIZES), Size(65536, 768, 20.0),
    *(Size(N, 512, 100.0) for N in (2048, 8192, 32768)),
]  # fmt: skip
QUICK = [Size(*size, 20.0) for size in QUICK_PAIR_SIZES]


def contest(size: Size, dtype: torch.dtype, device: torch.device) -> Contest:
    """Forward and backward; four products are the least that the loss and its gradients take."""
    N, D, scale = size
    leaves = pair_leaves(N, D, dtype, device, scale)
    losses = contrastive_losses("triton") | gpu_losses(scale)
    losses |= {f"mmkernels {impl}": functools.partial(_by, impl) for impl in _named(D, dtype, device)}
    peers = {name: functools.partial(loss, *leaves) for name, loss in losses.items()}
    return Contest(peers, leaves, share_of_products(4, N, N, D, dtype, device))


def _by(impl: str, queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    return mmkernels.info_nce(queries, keys, scale, impl=impl)  # type: ignore[arg-type]


def gpu_losses(scale: float) -> dict[str, Loss]:
    """Peers that run on a GPU alone: those that are installed."""
    found: dict[str, Loss] = {}
    try:
        from memeff import MemoryEfficientCLIPLoss
    except ImportError:
        pass
    else:
        theirs = MemoryEfficientCLIPLoss(temperature=1 / scale, normalized_inputs=True, stable=False)
        found["memeff"] = lambda queries, keys, scale: theirs(queries, keys)
    try:
        from inf_cl import cal_flash_loss
    except ImportError:
        pass
    else:

        def both_ways(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
            one, other = cal_flash_loss(queries, keys, scale=scale), cal_flash_loss(keys, queries, scale=scale)
            return (one.mean() + other.mean()) / 2

        found["inf-cl"] = both_ways
    return found
