"""The pytest-benchmark suite of every op: for groups, histograms, and comparing with a saved run.

python -m benchmarks.bench [-k info_nce] [--benchmark-group-by=param:n,param:dtype] [other options of pytest]
"""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.beam_search.peers import beam_steps, captioner_loops, gpt2_loops
from benchmarks.distillation.peers import distillation_losses
from benchmarks.divided_attention.peers import attentions
from benchmarks.info_nce.peers import contrastive_losses
from benchmarks.info_nce.report import REPORT as INFO_NCE
from benchmarks.linear_cross_entropy.peers import classification_losses
from benchmarks.linear_cross_entropy.report import inputs as classification_inputs
from benchmarks.retrieval.peers import rankers, searches
from benchmarks.retrieval.report import inputs as retrieval_inputs
from benchmarks.siglip.peers import sigmoid_losses
from benchmarks.siglip.report import REPORT as SIGLIP
from benchmarks.triplet.peers import triplet_losses
from benchmarks.triplet.report import REPORTS as TRIPLET
from mmkernels.testing import features

of_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
of_size = pytest.mark.parametrize("n", [512, 2048, 8192])


def both_passes(benchmark: Any, loss: Callable[..., Tensor], leaves: Any, given: Any = (), rounds: int = 5) -> None:
    """Time a loss and its gradients."""
    benchmark.pedantic(lambda: torch.autograd.grad(loss(*leaves, *given), leaves), rounds=rounds, warmup_rounds=1)


@of_dtype
@of_size
@pytest.mark.parametrize("name", list(contrastive_losses()))
def test_info_nce(benchmark: Any, name: str, n: int, dtype: torch.dtype) -> None:
    both_passes(benchmark, contrastive_losses()[name], INFO_NCE.leaves(n, dtype))


@of_dtype
@of_size
@pytest.mark.parametrize("name", list(distillation_losses()))
def test_distillation(benchmark: Any, name: str, n: int, dtype: torch.dtype) -> None:
    teacher = (features(n, 512, dtype, seed=3), features(n, 512, dtype, seed=4), torch.tensor(50.0))
    both_passes(benchmark, distillation_losses()[name], INFO_NCE.leaves(n, dtype), teacher)


@of_dtype
@of_size
@pytest.mark.parametrize("name", list(sigmoid_losses()))
def test_siglip(benchmark: Any, name: str, n: int, dtype: torch.dtype) -> None:
    both_passes(benchmark, sigmoid_losses()[name], SIGLIP.leaves(n, dtype))


@of_dtype
@of_size
@pytest.mark.parametrize("mining", list(TRIPLET))
@pytest.mark.parametrize("name", ["mmkernels", "eager", "torch.compile"])
def test_triplet(benchmark: Any, name: str, mining: str, n: int, dtype: torch.dtype) -> None:
    both_passes(benchmark, triplet_losses(mining)[name], TRIPLET[mining].leaves(n, dtype))


@of_dtype
@pytest.mark.parametrize(("n", "v"), [(512, 9488), (2048, 50257), (8192, 50257)])
@pytest.mark.parametrize("name", list(classification_losses()))
def test_linear_cross_entropy(benchmark: Any, name: str, n: int, v: int, dtype: torch.dtype) -> None:
    hidden, weight, targets = classification_inputs(dtype, n, v)
    both_passes(benchmark, classification_losses()[name], (hidden, weight), (targets,), rounds=3)


@of_dtype
@pytest.mark.parametrize("n", [2048, 8192])
@pytest.mark.parametrize("name", list(rankers()))
def test_retrieval_ranks(benchmark: Any, name: str, n: int, dtype: torch.dtype) -> None:
    benchmark.pedantic(rankers()[name], args=retrieval_inputs(dtype, n, n), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("n", [2048, 8192])
@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("name", list(searches()))
def test_retrieval_topk(benchmark: Any, name: str, k: int, n: int) -> None:
    queries, keys, _ = retrieval_inputs(torch.float32, n, n)
    benchmark.pedantic(searches()[name], args=(queries, keys, k), rounds=3, warmup_rounds=1)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@of_dtype
@pytest.mark.parametrize("clips", [1, 4])
@pytest.mark.parametrize("axis", ["time", "space"])
@pytest.mark.parametrize("name", list(attentions("time", 8, 12)))
def test_divided_attention(
    benchmark: Any, name: str, axis: Any, clips: int, dtype: torch.dtype, backward: bool
) -> None:
    attention = attentions(axis, 8, 12)[name]
    qkv = torch.randn(clips, 1 + 196 * 8, 3 * 768).to(dtype).requires_grad_(backward)

    def step() -> None:
        out = attention(qkv)
        if backward:
            torch.autograd.grad(out, qkv, torch.ones_like(out))

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


@of_dtype
@pytest.mark.parametrize("v", [9488, 50257])
@pytest.mark.parametrize("name", list(beam_steps(torch.bfloat16)))
def test_beam_search_step(benchmark: Any, name: str, v: int, dtype: torch.dtype) -> None:
    steps = beam_steps(dtype)
    if name not in steps:
        pytest.skip("the same as eager")
    logits, scores = torch.randn(80, v).to(dtype), -torch.rand(16, 5)
    benchmark.pedantic(lambda: steps[name](logits, scores), rounds=20, warmup_rounds=2)


@pytest.mark.parametrize("name", ["mmkernels", "the model alone", "eager"])
def test_beam_search_captioner(benchmark: Any, name: str) -> None:
    benchmark.pedantic(captioner_loops(32, 5, 9488, 16)[name], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize("name", ["mmkernels", "Hugging Face", "CTranslate2"])
def test_beam_search_gpt2(benchmark: Any, name: str) -> None:
    loops = gpt2_loops(8, 5, 20, 64)
    if name not in loops:
        pytest.skip(f"{name} is not installed")
    benchmark.pedantic(loops[name], rounds=5, warmup_rounds=1)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, *sys.argv[1:]]))
