"""What the checks of all ops do on a GPU: hold every case to its oracle, and time ours against its peers.

An op's gpu_check.py gives the cases, the sizes and the peers; the loops over them are here.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness.tables import Row, name_of
from mmkernels.testing import features

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_PRODUCT = 16384  # rows and columns: 1 GiB in float32


class Contest(NamedTuple):
    """What is timed at one size: our call and its peers by name, on the same tensors."""

    peers: Mapping[str, Callable[[], Any]]
    leaves: Sequence[Tensor]  # the backward pass gives their gradients
    figures: Callable[[float], dict[str, float]]  # what a pass of so many seconds amounts to
    backward: bool = True


class PairSize(NamedTuple):
    """The size of a contest of losses over all pairs of N queries and N keys, rows of D features."""

    N: int
    D: int


PAIR_SIZES = [PairSize(2048, 512), PairSize(8192, 512), PairSize(32768, 512), PairSize(8192, 1024)]
QUICK_PAIR_SIZES = [PairSize(4096, 512), PairSize(16384, 512)]


def pair_leaves(N: int, D: int, dtype: torch.dtype, device: torch.device, *numbers: float) -> list[Tensor]:
    """Queries, keys near them, and the numbers that the loss takes beside them; all ask for gradients."""
    queries = features(N, D, dtype, seed=0)
    keys = features(N, D, dtype, seed=1, like=queries, mean_cosine=0.3)
    return [x.to(device).requires_grad_() for x in (queries, keys, *map(torch.tensor, numbers))]


def written(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show(row: Row) -> None:
    print("  " + ", ".join(f"{key} {written(value)}" for key, value in row.items()), flush=True)


def check_parity(
    cases: Iterable[Any],
    check: Callable[[Any, torch.dtype, torch.device], Sequence[Tensor]],
    device: torch.device,
    dtypes: Sequence[torch.dtype] = DTYPES,
) -> list[Row]:
    """Run `check` on every case in every dtype, twice, and compare the bits; a failure is a row of the report."""
    results = []
    for case in cases:
        for dtype in dtypes:
            row = {"case": str(case), "dtype": name_of(dtype), "verdict": "ok"}
            try:
                first, second = (tuple(check(case, dtype, device)) for _ in range(2))
                torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True, msg="two runs differ")
            except (AssertionError, RuntimeError) as error:
                row["verdict"] = f"FAILED: {next(iter(str(error).splitlines()), type(error).__name__)}"
            results.append(row)
            show(row)
    return results


def measure_all(
    sizes: Iterable[Any],
    contest: Callable[[Any, torch.dtype, torch.device], Contest],
    device: torch.device,
    dtypes: Sequence[torch.dtype] = DTYPES,
    repeats: int = 20,
) -> list[Row]:
    """Time every contest: a row for each peer at each size (a NamedTuple: its fields head the columns)."""
    results = []
    for dtype in dtypes:
        for size in sizes:
            torch.compiler.reset()  # every size is compiled for itself, as in training
            peers, leaves, figures, backward = contest(size, dtype, device)
            for name, forward in peers.items():
                row: Row = {**size._asdict(), "dtype": name_of(dtype), "peer": name}
                try:
                    row |= measure(forward, leaves, repeats=repeats, backward=backward)
                    row |= figures(row["ms"] * 1e-3)
                except torch.cuda.OutOfMemoryError:
                    row["error"] = "out of memory"
                except (RuntimeError, ValueError, AssertionError) as error:  # a peer may not take this dtype
                    if name == next(iter(peers)):
                        raise
                    row["error"] = type(error).__name__
                torch.cuda.empty_cache()
                results.append(row)
                show(row)
    return results


def measure(
    forward: Callable[[], Any], leaves: Sequence[Tensor], *, repeats: int, backward: bool = True
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
    gradients = sum(x.nbytes for x in leaves) if backward else 0
    memory = torch.cuda.max_memory_allocated() - before - gradients
    flush = torch.empty(64 << 20, dtype=torch.int32, device=leaves[0].device)
    # Zeros between the runs push the inputs out of the L2 cache.
    times = milliseconds(step, repeats, between=flush.zero_)
    return {"ms": statistics.median(times), "spread ms": max(times) - min(times), "memory MB": memory / 1e6}


def milliseconds(step: Callable[[], Any], repeats: int, between: Callable[[], Any] = lambda: None) -> list[float]:
    """The time of each run of the step by the GPU's own clock."""
    times = []
    for _ in range(repeats):
        between()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def gemm_rate(N: int, M: int, D: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP per second of torch's own product of that shape, or of its largest part that fits: the practical limit."""
    x, y = (torch.randn(min(rows, LARGEST_PRODUCT), D, device=device, dtype=dtype) for rows in (N, M))
    times = milliseconds(lambda: x @ y.T, 13)
    return 2.0 * len(x) * len(y) * D / (statistics.median(times[3:]) * 1e-3)


def share_of_products(
    count: int, N: int, M: int, D: int, dtype: torch.dtype, device: torch.device
) -> Callable[[float], dict[str, float]]:
    """Figures of a contest: the share of a pass that its products [N, D] x [D, M] take at the rate of torch's own."""
    seconds_of_products = count * 2.0 * N * M * D / gemm_rate(N, M, D, dtype, device)
    return lambda seconds: {f"share of {count} G": seconds_of_products / seconds}
