"""pytest-benchmark suite: python -m pytest benchmarks/bench_siglip.py [--benchmark-group-by=param:n,param:dtype]."""

import pytest
import torch

from benchmarks.info_nce.peers import sigmoid_losses
from benchmarks.siglip.report import REPORT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [512, 2048, 8192])
@pytest.mark.parametrize("name", list(sigmoid_losses()))
def test_forward_backward(benchmark, name: str, n: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    loss = sigmoid_losses()[name]
    leaves = REPORT.leaves(n, dtype)
    benchmark.pedantic(lambda: torch.autograd.grad(loss(*leaves), leaves), rounds=5, warmup_rounds=1)
