"""pytest-benchmark suite: python -m pytest benchmarks/bench_linear_cross_entropy.py [--benchmark-group-by=param:n]."""

import pytest
import torch

from benchmarks.info_nce.peers import classification_losses
from benchmarks.linear_cross_entropy.report import inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "v"), [(512, 9488), (2048, 50257), (8192, 50257)])
@pytest.mark.parametrize("name", list(classification_losses()))
def test_forward_backward(benchmark, name: str, n: int, v: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    loss = classification_losses()[name]
    hidden, weight, targets = inputs(dtype, n, v)
    step = lambda: torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))  # noqa: E731
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
