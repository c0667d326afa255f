"""pytest-benchmark suite: python -m pytest benchmarks/bench_triplet.py [--benchmark-group-by=param:mining,param:n]."""

import pytest
import torch

from benchmarks.triplet.peers import triplet_losses
from benchmarks.triplet.report import REPORTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [512, 2048, 8192])
@pytest.mark.parametrize("mining", list(REPORTS))
@pytest.mark.parametrize("name", ["mmkernels", "eager", "torch.compile"])
def test_forward_backward(benchmark, name: str, mining: str, n: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    loss = triplet_losses(mining)[name]
    leaves = REPORTS[mining].leaves(n, dtype)
    benchmark.pedantic(lambda: torch.autograd.grad(loss(*leaves), leaves), rounds=5, warmup_rounds=1)
