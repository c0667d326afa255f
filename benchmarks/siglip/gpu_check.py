"""Check siglip's Triton kernels on a GPU: against float64, and against what users run today."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from benchmarks.harness.gpu_runs import DTYPES, compare, gemm_rate, judged, measure
from benchmarks.siglip.peers import sigmoid_losses
from mmkernels.testing import features

NOTE = "Memory: the most beyond inputs and gradients. Share of 4 G: four products at the rate of torch's own."

# (N, M, D, scale, bias, mean cosine of a query and its key)
PARITY: list[tuple[int, int, int, float, float, float]] = [
    (1, 1, 64, 10.0, -10.0, 0.5),
    (127, 127, 64, 10.0, -10.0, 0.5),
    (128, 128, 512, 10.0, -10.0, 0.5),
    (129, 129, 513, 10.0, -10.0, 0.5),
    (1000, 1500, 768, 10.0, -10.0, 0.5),
    (1000, 1000, 2048, 10.0, 0.0, 0.5),
    (777, 777, 100, 100.0, -10.0, -0.2),
    (777, 777, 256, 110.0, -16.5, 0.95),
    (5000, 5000, 256, 10.0, -10.0, 0.5),  # several tiles a program, several strips
]


def eager(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, reduction: str) -> Tensor:
    """The lines that the call replaces."""
    dtype = queries.dtype
    logits = (scale.to(dtype) * queries @ keys.T + bias.to(dtype)).float()
    labels = 2 * torch.eye(*logits.shape, device=logits.device) - 1
    losses = -F.logsigmoid(labels * logits).sum(1)
    return losses if reduction == "none" else losses.mean()


def run(loss: Callable[..., Tensor], inputs: tuple[Tensor, ...], reduction: str) -> list[Tensor]:
    """The loss and the gradients to queries, keys, scale and bias."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = loss(*leaves, reduction=reduction)
    weights = torch.linspace(0.5, 1.5, len(inputs[0]), device=value.device) if value.ndim else torch.tensor(0.75)
    return [value.detach(), *torch.autograd.grad((value * weights.to(value)).sum(), leaves)]


def check_parity(device: torch.device) -> list[dict[str, Any]]:
    """Every case in every dtype against float64; a failure is a line of the report, not the end of it."""
    results: list[dict[str, Any]] = []
    fused = functools.partial(mmkernels.siglip, impl="triton")
    reference = functools.partial(mmkernels.siglip, impl="reference")
    for n, m, d, scale, bias, near in PARITY:
        for dtype in DTYPES:
            queries = features(n, d, dtype, seed=n)
            keys = features(m, d, dtype, seed=m + 1, like=queries, mean_cosine=near)
            numbers = (torch.tensor(scale, device=device), torch.tensor(bias, device=device))
            inputs = (queries.to(device), keys.to(device), *numbers)
            row: dict[str, Any] = {"case": f"{n}x{m}x{d} scale {scale} bias {bias}", "dtype": str(dtype)[6:]}
            dots = inputs[0].double() @ inputs[1].double().T
            probabilities = torch.sigmoid(scale * dots + bias)
            grads = (probabilities - torch.eye(n, m, device=device)).abs()
            one = float(grads.max()) * abs(scale)
            terms = (
                0.0, one * float(keys.abs().max()), one * float(queries.abs().max()),
                float((grads * dots.abs()).sum()), float(grads.sum()),
            )  # fmt: skip
            with judged(row, results):
                for reduction in ("none", "mean"):
                    exact = run(reference, tuple(x.double() for x in inputs), reduction)
                    rough = run(eager, inputs, reduction)
                    actual, again = run(fused, inputs, reduction), run(fused, inputs, reduction)
                    names = ("loss", "dq", "dk", "dscale", "dbias")
                    sizes = [term / n if reduction == "mean" else term for term in terms]
                    compare(row, names, actual, again, rough, exact, sizes, dtype=dtype, of=f", {reduction}")
    return results


def measure_all(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    results = []
    sizes = [(4096, 512), (16384, 512)] if quick else [(2048, 512), (8192, 512), (32768, 512), (8192, 1024)]
    contenders = sigmoid_losses("triton")
    for dtype in (torch.bfloat16,) if quick else DTYPES:
        for n, d in sizes:
            queries = features(n, d, dtype, seed=0)
            keys = features(n, d, dtype, seed=1, like=queries, mean_cosine=0.3)
            numbers = (torch.tensor(10.0), torch.tensor(-10.0))
            rate = gemm_rate(min(n, 16384), d, dtype, device)
            for name, loss in contenders.items():
                row: dict[str, Any] = {"N": n, "D": d, "dtype": str(dtype)[6:], "peer": name}
                leaves = [x.to(device).requires_grad_() for x in (queries, keys, *numbers)]

                def step(loss: Any = loss, leaves: list[Tensor] = leaves) -> Tensor:
                    return loss(*leaves)

                try:
                    row |= measure(step, leaves, repeats=10 if quick else 20)
                    row["share of 4 G"] = 8.0 * n * n * d / (row["ms"] * 1e-3) / rate
                except torch.cuda.OutOfMemoryError:
                    row["error"] = "out of memory"
                torch.cuda.empty_cache()
                results.append(row)
                cells = (f"{k} {x:.3g}" if isinstance(x, float) else f"{x}" for k, x in row.items())
                print("  " + ", ".join(cells), flush=True)
    return results
