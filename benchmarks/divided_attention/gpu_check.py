"""Check divided attention's Triton kernels on a GPU: against float64 on all cases of the tests, and its peers."""

from typing import Any

import torch
from torch import Tensor

import mmkernels
from benchmarks.divided_attention.peers import attentions
from benchmarks.harness.gpu_runs import DTYPES, measure
from mmkernels.divided_attention.layout import layout_of
from tests.divided_attention import cases

NOTE = (
    "Memory: the most beyond inputs and gradients. GB/s: the least traffic, 4 outputs forward and 12 with the backward "
    "pass, over the time; TFLOP/s: two products over all pairs forward, seven in all."
)


def check_parity(device: torch.device) -> list[dict[str, Any]]:
    """Every case of the tests in every dtype, twice; a failure is a line of the report, not the end of it.

    The oracle and eager run on the CPU.
    """

    def run(qkv: Tensor, case: Any) -> tuple[Tensor, ...]:
        leaf = qkv.to(device).requires_grad_()
        mask = case.frame_mask()
        out, lse = mmkernels.divided_attention(
            leaf, frame_mask=None if mask is None else mask.to(device), dropout_p=case.dropout_p,
            dropout_seed=cases.SEED, return_lse=True, impl="triton", **case.options,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(out, leaf, cases.weights_of(out).to(device))
        return out.detach().cpu(), lse.cpu(), grad.cpu()

    results = []
    for case in cases.CASES:
        for dtype in DTYPES:
            row: dict[str, Any] = {"case": str(case), "dtype": str(dtype)[6:]}
            qkv = case.inputs(dtype)
            exact, eager = cases.run(qkv.double(), case, "reference"), cases.run_eager(qkv, case)
            try:
                actual, again = run(qkv, case), run(qkv, case)
                for name, a, b, c in zip(("out", "lse", "grad"), actual, again, exact, strict=True):
                    finite = c.isfinite()
                    off = torch.where(finite, a.double() - c, 0.0).abs().max()
                    row[name] = float(off / torch.where(finite, c, 0.0).abs().max().clamp_min(1e-30))
                    if not torch.equal(a, b):
                        raise AssertionError(f"{name}: two runs differ")
                cases.assert_results(actual, eager, exact, qkv, case)
                row["verdict"] = "ok"
            except (AssertionError, RuntimeError) as error:
                row["verdict"] = f"FAILED: {str(error).splitlines()[0]}"
            results.append(row)
            print(f"  {row['case']:<60} {row['dtype']:<9} {row['verdict']}", flush=True)
    return results


def measure_all(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    """TimeSformer's two steps, 12 heads of 64: forward alone, and with the backward pass."""
    heads, head = 12, 64
    sizes = (
        [(8, 8, 196), (1, 96, 196)] if quick else [(1, 8, 196), (8, 8, 196), (32, 8, 196), (2, 96, 196), (2, 16, 784)]
    )
    results = []
    for dtype in (torch.bfloat16,) if quick else DTYPES:
        for batch, frames, positions in sizes:
            tokens = 1 + frames * positions
            qkv = torch.randn(batch, tokens, 3 * heads * head, device=device, dtype=dtype).requires_grad_()
            outputs = batch * tokens * heads * head * qkv.element_size()
            for axis in ("time", "space"):
                pairs = batch * layout_of(tokens, frames, axis, "timesformer", "nt").pairs
                for name, attention in attentions(axis, frames, heads, impl="triton").items():
                    for backward in (False, True):
                        row: dict[str, Any] = {"axis": axis, "B": batch, "T": frames, "N": positions}
                        row |= {"dtype": str(dtype)[6:], "pass": "both" if backward else "forward", "peer": name}

                        def step(attention: Any = attention, qkv: Tensor = qkv) -> Tensor:
                            return attention(qkv)

                        try:
                            row |= measure(step, [qkv], repeats=10 if quick else 20, backward=backward)
                            seconds = row["ms"] * 1e-3
                            row["GB/s"] = (12 if backward else 4) * outputs / seconds / 1e9
                            row["TFLOP/s"] = (7 if backward else 2) * 2 * pairs * heads * head / seconds / 1e12
                        except torch.cuda.OutOfMemoryError:
                            row["error"] = "out of memory"
                        torch.cuda.empty_cache()
                        results.append(row)
                        cells = (f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items())
                        print("  " + ", ".join(cells), flush=True)
    return results
