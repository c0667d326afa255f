"""Check triplet's Triton kernels on a GPU: against float64, and against what users run today."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import mmkernels
from benchmarks.harness.gpu_runs import DTYPES, compare, gemm_rate, judged, measure
from benchmarks.triplet.peers import triplet_losses
from mmkernels.testing import features

NOTE = (
    "Memory: the most beyond inputs and gradients. Share of the schedule: three products for all negatives, one for "
    "the worst, at the rate of torch's own."
)
PRODUCTS = {"all": 3, "hardest": 1, "semi_hard": 1}

# (N, M, D, symmetric)
PARITY: list[tuple[int, int, int, bool]] = [
    (1, 1, 64, True),
    (127, 127, 64, True),
    (128, 128, 512, True),
    (129, 129, 513, True),
    (1000, 1500, 768, True),
    (1000, 1500, 2048, False),
    (5000, 5000, 256, True),  # several tiles a program, several strips
]


def inputs(n: int, m: int, d: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Small multiples of 1/4: similarities are exact, so that no rounding decides which negative is the worst."""
    generator = torch.Generator().manual_seed(n)
    queries = torch.randint(-2, 3, (n, d), generator=generator) / 4
    keys = torch.randint(-2, 3, (m, d), generator=generator) / 4
    keys[:n] = torch.where(torch.rand(n, d, generator=generator) < d**-0.5, queries, keys[:n])
    return [x.to(device, dtype) for x in (queries, keys)]


def run(loss: Callable[..., Tensor], rows: list[Tensor], reduction: str) -> list[Tensor]:
    """Losses and the gradients to queries and keys."""
    leaves = [x.detach().requires_grad_() for x in rows]
    losses = loss(*leaves, reduction=reduction)
    weights = torch.linspace(0.5, 1.5, losses.numel(), device=losses.device, dtype=losses.dtype).view_as(losses)
    return [losses.detach(), *torch.autograd.grad((losses * weights).sum(), leaves)]


def check_parity(device: torch.device) -> list[dict[str, Any]]:
    """Every case in every dtype against float64; a failure is a line of the report, not the end of it."""
    results: list[dict[str, Any]] = []
    for n, m, d, symmetric in PARITY:
        for mining in PRODUCTS:
            options = {"mining": mining, "symmetric": symmetric}
            reference = functools.partial(mmkernels.triplet, impl="reference", **options)  # type: ignore[arg-type]
            fused = functools.partial(mmkernels.triplet, impl="triton", **options)  # type: ignore[arg-type]
            for dtype in DTYPES:
                row: dict[str, Any] = {"case": f"{n}x{m}x{d} {mining}, symmetric={symmetric}", "dtype": str(dtype)[6:]}
                rows = inputs(n, m, d, dtype, device)
                in_double = [x.double() for x in rows]
                with judged(row, results):
                    for reduction in ("none", "mean"):
                        exact, rough = run(reference, in_double, reduction), run(reference, rows, reduction)
                        actual, again = run(fused, rows, reduction), run(fused, rows, reduction)
                        # A gradient is a difference of two sums over the negatives: their size sets the band.
                        similarities = [in_double[0] @ in_double[1].T, torch.eye(m, device=device).double()]
                        grads = run(reference, similarities, reduction)[1].abs()
                        terms = (
                            0.0,
                            float((grads @ in_double[1].abs()).max()),
                            float((grads.T @ in_double[0].abs()).max()),
                        )
                        compare(row, ("loss", "dq", "dk"), actual, again, rough, exact, terms, of=f", {reduction}")
    return results


def measure_all(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    results = []
    sizes = [(4096, 512), (16384, 512)] if quick else [(2048, 512), (8192, 512), (32768, 512), (8192, 1024)]
    for dtype in (torch.bfloat16,) if quick else DTYPES:
        for n, d in sizes:
            queries = features(n, d, dtype, seed=0)
            keys = features(n, d, dtype, seed=1, like=queries, mean_cosine=0.3)
            rate = gemm_rate(min(n, 16384), d, dtype, device)
            for mining, products in PRODUCTS.items():
                for name, loss in triplet_losses(mining, "triton").items():
                    row: dict[str, Any] = {"N": n, "D": d, "dtype": str(dtype)[6:], "mining": mining, "peer": name}
                    leaves = [x.to(device).requires_grad_() for x in (queries, keys)]

                    def step(loss: Any = loss, leaves: list[Tensor] = leaves) -> Tensor:
                        return loss(*leaves)

                    try:
                        row |= measure(step, leaves, repeats=10 if quick else 20)
                        row["share of the schedule"] = 2.0 * products * n * n * d / (row["ms"] * 1e-3) / rate
                    except torch.cuda.OutOfMemoryError:
                        row["error"] = "out of memory"
                    torch.cuda.empty_cache()
                    results.append(row)
                    cells = (f"{k} {x:.3g}" if isinstance(x, float) else f"{x}" for k, x in row.items())
                    print("  " + ", ".join(cells), flush=True)
    return results
