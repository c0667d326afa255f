"""pytest-benchmark suite: python -m pytest benchmarks/bench_info_nce.py [--benchmark-group-by=param:n,param:dtype]."""

import pytest
import torch

from benchmarks.info_nce.peers import contrastive_losses
from mmkernels.testing import features


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [512, 2048, 8192])
@pytest.mark.parametrize("name", list(contrastive_losses()))
def test_forward_backward(benchmark, name: str, n: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    loss = contrastive_losses()[name]
    leaves = [
        features(n, 512, dtype, seed=1).requires_grad_(),
        features(n, 512, dtype, seed=2).requires_grad_(),
        torch.tensor(20.0, requires_grad=True),
    ]
    benchmark.pedantic(lambda: torch.autograd.grad(loss(*leaves), leaves), rounds=5, warmup_rounds=1)
