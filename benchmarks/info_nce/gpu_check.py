"""Check info_nce's Triton kernels on a GPU: against float64, and against what users run today."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from benchmarks.harness.gpu_runs import DTYPES, gemm_rate, judged, measure
from mmkernels.testing import assert_within_budget, features

NOTE = "Memory: the most beyond inputs and gradients. Share of 4 G: four products at the rate of torch's own."

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]

# (N, M, D, scale, mean cosine of a query and its key, options)
PARITY: list[tuple[int, int, int, float, float, dict[str, Any]]] = [
    (1, 1, 64, 20.0, 0.5, {}),
    (127, 127, 64, 20.0, 0.5, {}),
    (128, 128, 512, 20.0, 0.5, {}),
    (129, 129, 513, 20.0, 0.5, {}),
    (1000, 1500, 768, 20.0, 0.5, {}),
    (1000, 1000, 2048, 20.0, 0.5, {}),
    (777, 777, 100, 100.0, -0.2, {}),
    (777, 777, 256, 100.0, 0.95, {}),
    (500, 500, 3, 20.0, 0.5, {"symmetric": False}),
    (500, 900, 512, 20.0, 0.5, {"label_smoothing": 0.1}),
    (900, 500, 512, 20.0, 0.5, {"targets": "repeated", "label_smoothing": 0.1}),
    (900, 1000, 256, 20.0, 0.5, {"groups": 37}),
    (900, 900, 512, 100.0, 0.95, {"groups": 900}),
    (900, 1000, 256, 20.0, 0.5, {"groups": 7, "symmetric": False, "label_smoothing": 0.1}),
    (5000, 5000, 256, 20.0, 0.5, {}),  # several tiles a program, several strips
    (5000, 5000, 256, 20.0, 0.5, {"groups": 300}),
]


def cross_entropies(logits: Tensor, **options: Any) -> Tensor:
    own = torch.arange(len(logits), device=logits.device)
    targets = options.get("targets", own)
    smoothing = options.get("label_smoothing", 0.0)
    of_rows, of_columns = targets, own
    if "query_groups" in options:
        same = (options["query_groups"][:, None] == options["key_groups"]).to(logits.dtype)
        of_rows, of_columns = same / same.sum(1, keepdim=True), (same / same.sum(0)).T[targets]
    rows = F.cross_entropy(logits, of_rows, label_smoothing=smoothing, reduction="none")
    if not options.get("symmetric", True):
        return rows
    columns = F.cross_entropy(logits.T[targets], of_columns, label_smoothing=smoothing, reduction="none")
    return (rows + columns) / 2


def eager(queries: Tensor, keys: Tensor, scale: Tensor, **options: Any) -> Tensor:
    """The lines that the call replaces, one loss a query."""
    return cross_entropies((scale.to(queries.dtype) * queries @ keys.T).float(), **options)


def eager_mean(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """The shortest form of the symmetric loss: the logits are made once."""
    labels = torch.arange(len(queries), device=queries.device)
    logits = scale.to(queries.dtype) * queries @ keys.T
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def check_parity(device: torch.device) -> list[dict[str, Any]]:
    """Every case in every dtype against float64; a failure is a line of the report, not the end of it."""
    results: list[dict[str, Any]] = []
    for n, m, d, scale, near, given in PARITY:
        for dtype in DTYPES:
            options = dict(given)
            if options.get("targets") == "repeated":
                options["targets"] = torch.arange(n, device=device) * 7 // 3 % m
            if "groups" in options:
                count = options.pop("groups")
                options["query_groups"] = torch.arange(n, device=device) % count
                options["key_groups"] = torch.arange(m, device=device).flip(0) % count
            queries = features(n, d, dtype, seed=n)
            keys = features(m, d, dtype, seed=m + 1, like=queries, mean_cosine=near)
            inputs = (queries.to(device), keys.to(device), torch.tensor(scale, device=device))
            weights = torch.linspace(0.5, 1.5, n, device=device)

            def run(
                loss: Callable[..., Tensor], to: torch.dtype | None, inputs: Any, options: Any, weights: Any
            ) -> Any:
                leaves = [x.detach().to(to or x.dtype).requires_grad_() for x in inputs]
                losses = loss(*leaves, **options)
                return losses.detach(), *torch.autograd.grad((losses * weights).sum(), leaves)

            shared = (inputs, options, weights)
            reference = functools.partial(mmkernels.info_nce, impl="reference", reduction="none")
            fused = functools.partial(mmkernels.info_nce, impl="triton", reduction="none")
            exact = run(reference, torch.float64, *shared)
            rough = run(eager, None, *shared)
            dots = inputs[0].double() @ inputs[1].double().T
            logits = (scale * dots).requires_grad_()
            losses = cross_entropies(logits, **options)
            (grad_logits,) = torch.autograd.grad((losses * weights).sum(), logits)
            terms = (grad_logits * dots).abs().sum()
            row: dict[str, Any] = {"case": f"{n}x{m}x{d} scale {scale} {given or ''}", "dtype": str(dtype)[6:]}
            with judged(row, results):
                actual = run(fused, None, *shared)
                again = run(fused, None, *shared)
                for name, a, b, c, e in zip(("loss", "dq", "dk", "dscale"), actual, rough, exact, again, strict=True):
                    row[name] = float((a.double() - c).abs().max() / c.abs().max().clamp_min(1e-30))
                    # The scale's gradient is a sum of terms of either sign: it is rounded by their size.
                    if name == "dscale":
                        a, b, c, e = (torch.stack([x.double(), terms]) for x in (a, b, c, e))
                    if not torch.equal(a, e):
                        raise AssertionError(f"{name}: two runs differ")
                    assert_within_budget(a, b, c, dtype=torch.float32 if name == "loss" else dtype, name=name)
    return results


def peers() -> dict[str, Loss]:
    found: dict[str, Loss] = {
        "mmkernels": functools.partial(mmkernels.info_nce, impl="triton"),
        "eager": eager_mean,
        "torch.compile": torch.compile(eager_mean),
    }
    try:
        from open_clip.loss import ClipLoss
    except ImportError:
        print("open_clip is not installed: left out (pip install open-clip-torch)")
    else:
        found["open_clip"] = ClipLoss()
    return found


def measure_all(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    results = []
    sizes = (
        [(4096, 512), (16384, 512)] if quick else [(2048, 512), (8192, 512), (32768, 512), (8192, 1024), (65536, 768)]
    )
    contenders = peers()
    for dtype in (torch.bfloat16,) if quick else DTYPES:
        for n, d in sizes:
            if dtype == torch.float32 and n > 32768:
                continue
            queries = features(n, d, dtype, seed=0)
            keys = features(n, d, dtype, seed=1, like=queries, mean_cosine=0.3).to(device)
            queries, scale = queries.to(device), torch.tensor(20.0, device=device)
            rate = gemm_rate(min(n, 16384), d, dtype, device)
            for name, loss in contenders.items():
                row: dict[str, Any] = {"N": n, "D": d, "dtype": str(dtype)[6:], "peer": name}
                leaves = [x.detach().requires_grad_() for x in (queries, keys, scale)]

                def step(loss: Loss = loss, leaves: list[Tensor] = leaves) -> Tensor:
                    return loss(*leaves)

                try:
                    row |= measure(step, leaves, repeats=10 if quick else 20)
                    # Counted as 4 products, the least that the loss and its gradients take.
                    row["share of 4 G"] = 8.0 * n * n * d / (row["ms"] * 1e-3) / rate
                except torch.cuda.OutOfMemoryError:
                    row["error"] = "out of memory"
                torch.cuda.empty_cache()
                results.append(row)
                print(
                    "  " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{v}" for k, v in row.items()),
                    flush=True,
                )
    return results
