"""Check info_nce under a teacher on a GPU, its Triton kernels: against float64, and against what users run today."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

import mmkernels
from benchmarks.distillation.peers import distillation_losses
from benchmarks.harness.gpu_runs import DTYPES, compare, gemm_rate, judged, measure
from mmkernels.testing import features

NOTE = "Memory: the most beyond inputs and gradients. Share of 6 G: six products at the rate of torch's own."

# (N, M, D, the teacher's D, scale, the teacher's scale, mean cosine of a query and its key)
PARITY: list[tuple[int, int, int, int, float, float, float]] = [
    (1, 1, 64, 64, 10.0, 20.0, 0.3),
    (127, 127, 64, 96, 10.0, 20.0, 0.3),
    (128, 128, 512, 512, 10.0, 20.0, 0.3),
    (129, 129, 513, 100, 10.0, 20.0, 0.3),
    (1000, 1500, 768, 1024, 10.0, 20.0, 0.3),  # rows alone
    (777, 777, 256, 256, 100.0, 100.0, 0.95),
    (777, 777, 100, 64, 100.0, 100.0, -0.2),
    (5000, 5000, 256, 256, 10.0, 20.0, 0.3),  # several tiles a program, several strips
]


def eager(
    queries: Tensor, keys: Tensor, scale: Tensor, teacher_queries: Tensor, teacher_keys: Tensor, teacher_scale: Tensor
) -> Tensor:
    """The lines that the call replaces, one loss a query."""
    logits = (scale.to(queries.dtype) * queries @ keys.T).float()
    teacher = (teacher_scale.to(queries.dtype) * teacher_queries @ teacher_keys.T).float()

    def losses(logits: Tensor, teacher: Tensor) -> Tensor:
        return -(teacher.softmax(1) * logits.log_softmax(1)).sum(1)

    rows = losses(logits, teacher)
    return (rows + losses(logits.T, teacher.T)) / 2 if len(queries) == len(keys) else rows


def fused(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    teacher_scale: Tensor,
    impl: Literal["triton", "reference"],
) -> Tensor:
    return mmkernels.distillation(
        queries,
        keys,
        scale,
        teacher_queries,
        teacher_keys,
        teacher_scale,
        symmetric=len(queries) == len(keys),
        reduction="none",
        impl=impl,
    )


def run(loss: Callable[..., Tensor], student: list[Tensor], teacher: list[Tensor]) -> list[Tensor]:
    """The losses and the gradients to queries, keys and scale, under weights that differ from row to row."""
    leaves = [x.detach().requires_grad_() for x in student]
    losses = loss(*leaves, *teacher)
    weights = torch.linspace(0.5, 1.5, len(losses), device=losses.device).to(losses)
    return [losses.detach(), *torch.autograd.grad((losses * weights).sum(), leaves)]


def check_parity(device: torch.device) -> list[dict[str, Any]]:
    """Every case in every dtype against float64; a failure is a line of the report, not the end of it."""
    results: list[dict[str, Any]] = []
    for n, m, d, teacher_d, scale, teacher_scale, near in PARITY:
        for dtype in DTYPES:
            pairs = []
            for size in (d, teacher_d):
                queries = features(n, size, dtype, seed=n + size)
                pairs += [queries, features(m, size, dtype, seed=m + size + 1, like=queries, mean_cosine=near)]
            pairs = [x.to(device) for x in pairs]
            numbers = [torch.tensor(x, device=device) for x in (scale, teacher_scale)]
            student, teacher = [*pairs[:2], numbers[0]], [*pairs[2:], numbers[1]]
            # The weights of a row's softmaxes, the student's and the teacher's, add up to 2 at most: a gradient is a
            # difference of terms of this size.
            largest = [float(x.abs().max()) for x in pairs[:2]]
            terms = (0.0, 2 * scale * largest[1], 2 * scale * largest[0], 2 * n**0.5 * largest[0] * largest[1])
            row: dict[str, Any] = {"case": f"{n}x{m}x{d}, teacher {teacher_d}, scales {scale}, {teacher_scale}"}
            row["dtype"] = str(dtype)[6:]
            with judged(row, results):
                exact = run(
                    functools.partial(fused, impl="reference"),
                    [x.double() for x in student],
                    [x.double() for x in teacher],
                )
                rough = run(eager, student, teacher)
                actual, again = (run(functools.partial(fused, impl="triton"), student, teacher) for _ in range(2))
                names = ("loss", "dq", "dk", "dscale")
                compare(row, names, actual, again, rough, exact, terms, dtype=dtype)
    return results


def measure_all(device: torch.device, quick: bool) -> list[dict[str, Any]]:
    results = []
    sizes = [(4096, 512), (16384, 512)] if quick else [(2048, 512), (8192, 512), (32768, 512), (8192, 1024)]
    contenders = distillation_losses("triton")
    for dtype in (torch.bfloat16,) if quick else DTYPES:
        for n, d in sizes:
            student = [features(n, d, dtype, seed=seed).to(device).requires_grad_() for seed in (1, 2)]
            student.append(torch.tensor(20.0, device=device, requires_grad=True))
            teacher = [features(n, d, dtype, seed=seed).to(device) for seed in (3, 4)]
            teacher.append(torch.tensor(50.0, device=device))
            rate = gemm_rate(min(n, 16384), d, dtype, device)
            for name, loss in contenders.items():
                row: dict[str, Any] = {"N": n, "D": d, "dtype": str(dtype)[6:], "peer": name}
                try:
                    row |= measure(functools.partial(loss, *student, *teacher), student, repeats=10 if quick else 20)
                    row["share of 6 G"] = 12.0 * n * n * d / (row["ms"] * 1e-3) / rate
                except torch.cuda.OutOfMemoryError:
                    row["error"] = "out of memory"
                torch.cuda.empty_cache()
                results.append(row)
                cells = (f"{k} {x:.3g}" if isinstance(x, float) else f"{x}" for k, x in row.items())
                print("  " + ", ".join(cells), flush=True)
    return results
