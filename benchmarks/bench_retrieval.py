"""pytest-benchmark suite: python -m pytest benchmarks/bench_retrieval.py [--benchmark-group-by=param:n]."""

import pytest
import torch

from benchmarks.retrieval.peers import rankers, searches
from benchmarks.retrieval.report import inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n", [2048, 8192])
@pytest.mark.parametrize("name", list(rankers()))
def test_ranks(benchmark, name: str, n: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    benchmark.pedantic(rankers()[name], args=inputs(dtype, n, n), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("n", [2048, 8192])
@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("name", list(searches()))
def test_topk(benchmark, name: str, k: int, n: int) -> None:  # type: ignore[no-untyped-def]
    queries, keys, _ = inputs(torch.float32, n, n)
    benchmark.pedantic(searches()[name], args=(queries, keys, k), rounds=3, warmup_rounds=1)
