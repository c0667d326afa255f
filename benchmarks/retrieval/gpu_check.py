"""Check retrieval's Triton kernels on a GPU: all cases of the tests, and what users run today."""

from typing import Any

import torch
from torch import Tensor

from benchmarks.harness.gpu_runs import DTYPES, gemm_rate, judged, measure
from benchmarks.retrieval.peers import rankers, searches
from tests.retrieval import cases

NOTE = "Memory: the most beyond inputs. Share of G: one product at the rate of torch's own."


def check_parity(device: torch.device) -> list[dict[str, Any]]:
    """Every case of the tests in every dtype; a failure is a line of the report, not the end of it."""
    results: list[dict[str, Any]] = []
    for case in cases.CASES:
        for dtype in DTYPES:
            row: dict[str, Any] = {"case": str(case), "dtype": str(dtype)[6:]}
            with judged(row, results):
                cases.check_case(case, dtype, "triton", lambda x: x.to(device))
    return results


def measure_all(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    results = []
    sizes = [(8192, 8192, 512)] if quick else [(8192, 8192, 512), (32768, 32768, 512), (16, 1 << 20, 512)]
    for dtype in (torch.bfloat16,) if quick else DTYPES:
        for n, m, d in sizes:
            queries, keys = torch.randn(n, d, device=device).to(dtype), torch.randn(m, d, device=device).to(dtype)
            targets = torch.arange(n, device=device)
            rate = gemm_rate(n, d, dtype, device)
            peers: dict[tuple[str, int], Any] = {(name, 0): call for name, call in rankers("triton").items()}
            peers |= {(name, k): call for k in (1, 10, 64, 1000) for name, call in searches("triton").items()}
            for (name, k), call in peers.items():
                if name.startswith("faiss"):
                    continue
                row: dict[str, Any] = {"N": n, "M": m, "D": d, "dtype": str(dtype)[6:], "k": k, "peer": name}
                given = (queries, keys, k if k else targets)

                def step(call: Any = call, given: Any = given) -> Tensor:
                    found = call(*given)
                    return found if isinstance(found, Tensor) else found[0]

                try:
                    row |= measure(step, [queries, keys], repeats=10 if quick else 20, backward=False)
                    row["share of G"] = 2.0 * n * m * d / (row["ms"] * 1e-3) / rate
                except (RuntimeError, ValueError) as error:  # out of memory
                    if name == "mmkernels":
                        raise
                    row["error"] = type(error).__name__
                torch.cuda.empty_cache()
                results.append(row)
                cells = (f"{k} {x:.3g}" if isinstance(x, float) else f"{k} {x}" for k, x in row.items())
                print("  " + ", ".join(cells), flush=True)
    return results
