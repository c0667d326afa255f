"""Check linear_cross_entropy's Triton kernels on a GPU: against float64, and against what users run today."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from benchmarks.harness.gpu_runs import DTYPES, compare, gemm_rate, judged, measure
from benchmarks.linear_cross_entropy.peers import classification_losses
from mmkernels.testing import features

NOTE = "Memory: the most beyond inputs and gradients. Share of 4 G: four products at the rate of torch's own."

# (N, V, D, largest logit, options)
PARITY: list[tuple[int, int, int, float, dict[str, Any]]] = [
    (1, 1, 64, 10.0, {}),
    (127, 127, 64, 10.0, {}),
    (128, 4096, 512, 10.0, {}),
    (129, 1025, 513, 10.0, {}),
    (1000, 5000, 2048, 10.0, {}),
    (777, 300, 100, 100.0, {}),
    (500, 3000, 512, 10.0, {"label_smoothing": 0.1}),
    (500, 3000, 512, 10.0, {"ignore_index": 7, "label_smoothing": 0.1}),
    (5000, 20000, 256, 10.0, {}),  # several tiles a program, several strips
]


def eager(hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, **options: Any) -> Tensor:
    """The lines that the call replaces, one loss a row."""
    return F.cross_entropy(F.linear(hidden, weight, bias.to(hidden.dtype)), targets, reduction="none", **options)


def run(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...], targets: Tensor, **options: Any) -> list[Tensor]:
    """Losses and the gradients to hidden, weight and bias."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    losses = loss(*leaves, targets, **options)
    weights = torch.linspace(0.5, 1.5, len(losses), device=losses.device, dtype=losses.dtype)
    return [losses.detach(), *torch.autograd.grad((losses * weights).sum(), leaves)]


def fused(
    hidden: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, impl: Any = "triton", **options: Any
) -> Tensor:
    return mmkernels.linear_cross_entropy(hidden, weight, targets, bias=bias, reduction="none", impl=impl, **options)


def check_parity(device: torch.device) -> list[dict[str, Any]]:
    """Every case in every dtype against float64; a failure is a line of the report, not the end of it."""
    results: list[dict[str, Any]] = []
    for n, v, d, largest, options in PARITY:
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(n)
            hidden = (features(n, d, dtype, seed=n) * largest).to(device)
            weight = features(v, d, dtype, seed=v + 1).to(device)
            bias = torch.randn(v, generator=generator).to(device)
            targets = torch.randint(v, (n,), generator=generator)
            targets[::3] = options.get("ignore_index", -100)
            targets = targets.to(device)
            inputs = (hidden, weight, bias)
            exact = run(
                functools.partial(fused, impl="reference"), tuple(x.double() for x in inputs), targets, **options
            )
            rough = run(eager, inputs, targets, **options)
            terms = (0.0, float(weight.abs().max()), float(hidden.abs().max()), 1.0)
            row: dict[str, Any] = {"case": f"{n}x{v}x{d} logits to {largest} {options or ''}", "dtype": str(dtype)[6:]}
            with judged(row, results):
                actual, again = run(fused, inputs, targets, **options), run(fused, inputs, targets, **options)
                names = ("loss", "dh", "dw", "dbias")
                compare(row, names, actual, again, rough, exact, terms, dtype=dtype)
    return results


def peers() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    found = classification_losses("triton")
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy
    except ImportError:
        print("Liger is not installed: left out (pip install liger-kernel)")
    else:
        found["Liger"] = liger_fused_linear_cross_entropy
    try:
        from cut_cross_entropy import linear_cross_entropy
    except ImportError:
        print("cut-cross-entropy is not installed: left out (pip install cut-cross-entropy)")
    else:
        found["cut-cross-entropy, unfiltered"] = functools.partial(linear_cross_entropy, filter_eps=None)
    return found


def measure_all(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    results = []
    sizes = [(8192, 50257, 512)] if quick else [(2048, 50257, 512), (8192, 50257, 512), (8192, 128256, 4096)]
    for dtype in (torch.bfloat16,) if quick else DTYPES:
        for n, v, d in sizes:
            hidden = torch.randn(n, d, device=device).to(dtype)
            weight = (torch.randn(v, d, device=device) * d**-0.5).to(dtype)
            targets = torch.randint(v, (n,), device=device)
            rate = gemm_rate(n, d, dtype, device)
            for name, loss in peers().items():
                row: dict[str, Any] = {"N": n, "V": v, "D": d, "dtype": str(dtype)[6:], "peer": name}
                leaves = [x.detach().requires_grad_() for x in (hidden, weight)]

                def step(loss: Any = loss, leaves: list[Tensor] = leaves, targets: Tensor = targets) -> Tensor:
                    return loss(*leaves, targets)

                try:
                    row |= measure(step, leaves, repeats=10 if quick else 20)
                    # Counted as 4 products, the least without the logits in memory.
                    row["share of 4 G"] = 8.0 * n * v * d / (row["ms"] * 1e-3) / rate
                except (
                    RuntimeError,
                    ValueError,
                    AssertionError,
                ) as error:  # out of memory; a peer may not take float32
                    if name == "mmkernels":
                        raise
                    row["error"] = type(error).__name__
                torch.cuda.empty_cache()
                results.append(row)
                cells = (f"{k} {x:.3g}" if isinstance(x, float) else f"{x}" for k, x in row.items())
                print("  " + ", ".join(cells), flush=True)
    return results
