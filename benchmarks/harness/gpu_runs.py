"""What the checks of all ops do on a GPU: hold results to the error budget, time a pass, and print the rows."""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mmkernels.testing import assert_within_budget

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def measure(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], *, repeats: int = 20, backward: bool = True
) -> dict[str, float]:
    """Milliseconds of a pass (median), and the most memory beyond inputs and gradients."""
    gradient: list[Tensor] = []

    def step() -> None:
        with torch.set_grad_enabled(backward):
            result = forward()
        if backward:
            if not gradient:
                gradient.append(torch.ones_like(result))
            torch.autograd.grad(result, leaves, gradient[0])

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    gradients = sum(x.numel() * x.element_size() for x in leaves) if backward else 0
    memory = torch.cuda.max_memory_allocated() - before - gradients
    flush = torch.empty(64 << 20, dtype=torch.int32, device=leaves[0].device)
    times = []
    for _ in range(repeats):
        flush.zero_()  # the L2 cache begins without the inputs
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return {"ms": statistics.median(times), "spread ms": max(times) - min(times), "memory MB": memory / 1e6}


@contextlib.contextmanager
def judged(row: dict[str, Any], results: list[dict[str, Any]]) -> Iterator[None]:
    """Adds a case to the results with a verdict on what is checked inside, and prints it: a failure is a line of the
    report, not the end of it."""
    try:
        yield
        row["verdict"] = "ok"
    except (AssertionError, RuntimeError) as error:
        row["verdict"] = f"FAILED: {str(error).splitlines()[0]}"
    results.append(row)
    print(f"  {row['case']:<50} {row['dtype']:<9} {row['verdict']}", flush=True)


def compare(
    row: dict[str, Any],
    names: Sequence[str],
    actual: Sequence[Tensor],
    again: Sequence[Tensor],
    rough: Sequence[Tensor],
    exact: Sequence[Tensor],
    terms: Sequence[float],
    *,
    dtype: torch.dtype | None = None,
    of: str = "",
) -> None:
    """Hold results to the error budget and to the bits of a second run; their relative errors go into the row."""
    for name, a, e, b, c, term in zip(names, actual, again, rough, exact, terms, strict=True):
        row[name] = float((a.double() - c).abs().max() / c.abs().max().clamp_min(1e-30))
        if not torch.equal(a, e):
            raise AssertionError(f"{name}: two runs differ")
        assert_within_budget(a, b, c, dtype=dtype, terms=term, name=name + of)


def gemm_rate(n: int, d: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of torch's own product of the same shape: the practical limit."""
    x = torch.randn(n, d, device=device, dtype=dtype)
    times = []
    for _ in range(13):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        product = x @ x.T
        end.record()
        torch.cuda.synchronize()
        del product
        times.append(begin.elapsed_time(end))
    return 2.0 * n * n * d / (statistics.median(times[3:]) * 1e-3)
