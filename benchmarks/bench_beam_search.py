"""pytest-benchmark suite: python -m pytest benchmarks/bench_beam_search.py [--benchmark-group-by=param:v]."""

import pytest
import torch

from benchmarks.beam_search.peers import beam_steps, captioner_loops, gpt2_loops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v", [9488, 50257])
@pytest.mark.parametrize("name", list(beam_steps(torch.bfloat16)))
def test_step(benchmark, name: str, v: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    steps = beam_steps(dtype)
    if name not in steps:
        pytest.skip("the same as eager")
    logits, scores = torch.randn(80, v).to(dtype), -torch.rand(16, 5)
    benchmark.pedantic(lambda: steps[name](logits, scores), rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("name", ["mmkernels", "the model alone", "eager"])
def test_captioner(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    benchmark.pedantic(captioner_loops(32, 5, 9488, 16)[name], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", ["mmkernels", "Hugging Face", "CTranslate2"])
def test_gpt2(benchmark, name: str) -> None:  # type: ignore[no-untyped-def]
    loops = gpt2_loops(8, 5, 20, 64)
    if name not in loops:
        pytest.skip(f"{name} is not installed")
    benchmark.pedantic(loops[name], rounds=5, warmup_rounds=1)
