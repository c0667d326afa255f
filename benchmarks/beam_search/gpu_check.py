"""What the check on a GPU runs for the step of beam search: the reference's bits on the cases of the tests, its peers.

CUDA's and Triton's kernels are both checked, each called and replayed from a CUDA graph.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import mmkernels
from benchmarks.beam_search.peers import beam_steps
from benchmarks.harness.gpu_runs import Contest, captured
from mmkernels import _backends
from mmkernels.beam_search.specification import BeamCandidates
from tests.beam_search import cases

NOTE = (
    "GB/s: one read of the logits over the time. graph ms: the same call from a CUDA graph. Eager and "
    "torch.compile: log_softmax, add and topk of 2 K; in the dtype of the logits and in float32."
)
CASES = cases.CASES


def implementations() -> list[str]:
    return [name for name in ("cuda", "triton") if _backends.unavailable(name) is None]


def check(case: cases.Case, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    results: list[Tensor] = []
    for impl in implementations():
        results += cases.check_case(case, dtype, impl, device)
        if case.B:
            results += cases.check_case(case, dtype, impl, device, replayed_once)
    return results


def replayed_once(*arguments: Tensor, **options: Any) -> BeamCandidates:
    """The step, from a CUDA graph of its own; its outputs are NaN before the replay."""
    graph, outputs = captured(functools.partial(mmkernels.beam_search_step, *arguments, **options))
    outputs.scores.fill_(torch.nan)
    outputs.tokens.fill_(-1)
    graph.replay()
    return outputs


class Size(NamedTuple):
    B: int
    K: int
    V: int


# A captioner's vocabulary and language models'.
SIZES = [Size(1, 5, 50257), Size(16, 5, 50257), Size(32, 5, 9488), Size(8, 4, 128256), Size(64, 5, 50257)]
QUICK = [Size(16, 5, 50257)]


def contest(size: Size, dtype: torch.dtype, device: torch.device) -> Contest:
    """One step without masks, 2 K candidates."""
    B, K, V = size
    logits, scores = torch.randn(B * K, V, device=device, dtype=dtype), torch.randn(B, K, device=device)
    peers: dict[str, Callable[[], Any]] = {}
    for impl in implementations():
        peers[impl] = functools.partial(mmkernels.beam_search_step, logits, scores, impl=impl)  # type: ignore[arg-type]
    theirs = beam_steps(dtype)
    del theirs["mmkernels"]
    peers |= {name: functools.partial(call, logits, scores) for name, call in theirs.items()}
    return Contest(peers, [logits], lambda seconds: {"GB/s": logits.nbytes / seconds / 1e9}, backward=False)
