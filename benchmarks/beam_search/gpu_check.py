"""Check the step of beam search on a GPU: the reference's bits on all cases of the tests, and what users run today."""

from typing import Any

import torch
from torch import Tensor

import mmkernels
from benchmarks.harness.gpu_runs import DTYPES, measure
from mmkernels import _backends
from mmkernels.beam_search.specification import BeamCandidates
from tests.beam_search import cases

NOTE = (
    "GB/s: one read of the logits over the time. cuda graph: the same call, captured once and replayed. Eager and "
    "torch.compile: log_softmax, add and topk of 2 K; in the dtype of the logits and in float32."
)


def implementations() -> list[Any]:
    return [name for name in ("cuda", "triton") if _backends.unavailable(name) is None]


def check_parity(device: torch.device) -> list[dict[str, Any]]:
    """Every case of the tests in every dtype, twice, and from a CUDA graph; a failure is a line of the report."""
    results = []
    for case in cases.CASES:
        for dtype in DTYPES:
            logits, scores, options = case.inputs(dtype)
            expected = mmkernels.beam_search_step(logits, scores, **options, impl="reference")
            there = [x.to(device) if isinstance(x, Tensor) else x for x in (logits, scores, *options.values())]
            arguments, moved = there[:2], dict(zip(options, there[2:], strict=True))
            for impl in implementations():
                row: dict[str, Any] = {"case": str(case), "dtype": str(dtype)[6:], "impl": impl}

                def step(arguments: Any = arguments, moved: dict[str, Any] = moved, impl: Any = impl) -> BeamCandidates:
                    return mmkernels.beam_search_step(*arguments, **moved, impl=impl)

                try:
                    for found in (step(), step(), *([captured(step)()] if case.B else [])):
                        cases.assert_same(BeamCandidates(*(x.cpu() for x in found)), expected)
                    row["verdict"] = "ok"
                except (AssertionError, RuntimeError) as error:
                    row["verdict"] = f"FAILED: {str(error).splitlines()[0]}"
                results.append(row)
                print(f"  {row['case']:<50} {row['dtype']:<9} {impl:<7} {row['verdict']}", flush=True)
    return results


def captured(step: Any) -> Any:
    """The call as a CUDA graph; its outputs are NaN before a replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()

    def replay() -> BeamCandidates:
        outputs.scores.fill_(torch.nan)
        outputs.tokens.fill_(-1)
        graph.replay()
        return outputs

    return replay


def eager_step(logits: Tensor, scores: Tensor) -> Tensor:
    B, K = scores.shape
    totals = scores[:, :, None] + torch.log_softmax(logits, -1).view(B, K, -1)
    return totals.view(B, -1).topk(2 * K)[0]


def measure_all(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """One step without masks, 2 K candidates, for a captioner's and language models' vocabularies."""
    sizes = (
        [(16, 5, 50257)] if quick else [(1, 5, 50257), (16, 5, 50257), (32, 5, 9488), (8, 4, 128256), (64, 5, 50257)]
    )
    compiled = torch.compile(eager_step)
    results = []
    for dtype in (torch.bfloat16,) if quick else DTYPES:
        for B, K, V in sizes:
            logits, scores = torch.randn(B * K, V, device=device, dtype=dtype), torch.randn(B, K, device=device)
            peers: dict[str, Any] = {}
            for impl in implementations():

                def step(logits: Tensor = logits, scores: Tensor = scores, impl: Any = impl) -> Tensor:
                    return mmkernels.beam_search_step(logits, scores, impl=impl).scores

                peers[impl] = step
                graph = captured(
                    lambda logits=logits, scores=scores, impl=impl: mmkernels.beam_search_step(
                        logits, scores, impl=impl
                    )
                )
                peers[f"{impl}, cuda graph"] = lambda graph=graph: graph().scores
            peers["eager"] = lambda logits=logits, scores=scores: eager_step(logits, scores)
            peers["torch.compile"] = lambda logits=logits, scores=scores: compiled(logits, scores)
            if dtype != torch.float32:
                peers["eager, float32"] = lambda logits=logits, scores=scores: eager_step(logits.float(), scores)
            for name, peer in peers.items():
                row: dict[str, Any] = {"B": B, "K": K, "V": V, "dtype": str(dtype)[6:], "peer": name}
                row |= measure(peer, [logits], repeats=10 if quick else 50, backward=False)
                row["GB/s"] = logits.numel() * logits.element_size() / row["ms"] / 1e6
                results.append(row)
                cells = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
                print("  " + ", ".join(cells), flush=True)
    return results
