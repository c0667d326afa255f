"""pytest-benchmark suite: python -m pytest benchmarks/bench_divided_attention.py [--benchmark-group-by=param:axis]."""

import pytest
import torch

from benchmarks.info_nce.peers import attentions

NAMES = list(attentions("time", 8, 12))


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clips", [1, 4])
@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize("name", NAMES)
def test_timesformer(benchmark, name: str, axis: str, clips: int, dtype: torch.dtype, backward: bool) -> None:  # type: ignore[no-untyped-def]
    attention = attentions(axis, 8, 12)[name]  # type: ignore[arg-type]
    qkv = torch.randn(clips, 1 + 196 * 8, 3 * 768).to(dtype).requires_grad_(backward)

    def step() -> None:
        out = attention(qkv)
        if backward:
            torch.autograd.grad(out, qkv, torch.ones_like(out))

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
