"""What the check on a GPU runs for retrieval: the cases of the tests, and what users run today."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.gpu_runs import Contest, share_of_products
from benchmarks.retrieval.peers import rankers, searches
from tests.retrieval import cases

NOTE = (
    "k: the k best keys, or the ranks where it is 0. Memory: the most beyond inputs. Share of 1 G: one product at the "
    "rate of torch's own."
)

CASES = cases.CASES


def check(case: cases.Case, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return cases.check_case(case, dtype, "triton", lambda x: x.to(device))


class Size(NamedTuple):
    N: int
    M: int
    D: int
    k: int


SIZES = [
    Size(*size, k)
    for size in ((8192, 8192, 512), (32768, 32768, 512), (16, 1 << 20, 512))
    for k in (0, 1, 10, 64, 1000)
]
QUICK = [size for size in SIZES if size.N == 8192]


def contest(size: Size, dtype: torch.dtype, device: torch.device) -> Contest:
    N, M, D, k = size
    queries, keys = torch.randn(N, D, device=device).to(dtype), torch.randn(M, D, device=device).to(dtype)
    calls: dict[str, Callable[..., Any]] = dict(searches("triton") if k else rankers("triton"))
    calls.pop("faiss IndexFlatIP", None)  # it runs on CPUs
    wanted = k or torch.arange(N, device=device)
    peers = {name: functools.partial(call, queries, keys, wanted) for name, call in calls.items()}
    return Contest(peers, [queries, keys], share_of_products(1, N, M, D, dtype, device), backward=False)
