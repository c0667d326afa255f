"""What the checks of all ops do on a GPU: hold a case to its oracle, and time ours against its peers.

An op's gpu_check.py gives the cases, the sizes and the peers.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from benchmarks.harness.tables import Row, name_of
from mmkernels.testing import features

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_PRODUCT = 16384  # rows and columns: 1 GiB in float32
REPEATS = 20

T = TypeVar("T")
Mark = Callable[[], None]


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


PAIR_SIZES = [PairSize(N, 512) for N in (256, 512, 1024, 2048, 8192, 32768)] + [PairSize(8192, 1024)]
QUICK_PAIR_SIZES = [PairSize(4096, 512), PairSize(16384, 512)]


def pair_leaves(N: int, D: int, dtype: torch.dtype, device: torch.device, *numbers: float) -> list[Tensor]:
    """Queries, keys near them, and the numbers that the loss takes beside them; all ask for gradients."""
    queries = features(N, D, dtype, seed=0)
    keys = features(N, D, dtype, seed=1, like=queries, mean_cosine=0.3)
    return [x.to(device).requires_grad_() for x in (queries, keys, *map(torch.tensor, numbers))]


def parity(
    case: Any, check: Callable[[Any, torch.dtype, torch.device], Sequence[Tensor]], dtype: torch.dtype,
    device: torch.device,
) -> Row:  # fmt: skip
    """Run `check` on the case twice and compare the bits; a failure is a verdict."""
    row = {"case": str(case), "dtype": name_of(dtype), "verdict": "ok"}
    try:
        first, second = (tuple(check(case, dtype, device)) for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True, msg="two runs differ")
    except Exception as error:
        row["verdict"] = f"FAILED: {_first_line(error)}"
    return row


def contest_rows(
    contest: Callable[[Any, torch.dtype, torch.device], Contest],
    size: Any,
    dtype: torch.dtype,
    device: torch.device,
    kernels: Callable[[Callable[[], Any]], list[Row]],
) -> Iterator[Row]:
    """Time every peer at one size (a NamedTuple: its fields head the columns); a row for each, ours first.

    A row of ours has its kernels, too, as `kernels` gives them of a pass. A peer that fails, and ours, has an error in
    place of times.
    """
    torch.compiler.reset()  # every size is compiled for itself, as in training
    peers, leaves, figures, backward = contest(size, dtype, device)
    for index, (name, forward) in enumerate(peers.items()):
        row: Row = {**size._asdict(), "dtype": name_of(dtype), "peer": name}
        try:
            row |= measure(forward, leaves, backward=backward)
            row |= figures(row["ms"] * 1e-3)
            if index == 0:
                row["kernels"] = kernels(one_pass(forward, leaves, backward))
        except torch.cuda.OutOfMemoryError:
            row["error"] = "out of memory"
        except Exception as error:  # a peer may not take this dtype, or this GPU
            row["error"] = _first_line(error)
        yield row
        if device.type == "cuda":
            torch.cuda.empty_cache()


def healthy(device: torch.device) -> bool:
    """Whether this process can still use the GPU: after an illegal access it cannot."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True


def _first_line(error: Exception) -> str:
    text = next(iter(str(error).strip().splitlines()), "")
    # An AssertionError of ours says what is wrong; of another kind its name is the better half.
    return text if isinstance(error, AssertionError) and text else f"{type(error).__name__}: {text}".rstrip(": ")


def one_pass(forward: Callable[[], Any], leaves: Sequence[Tensor], backward: bool) -> Callable[..., Any]:
    """A call that runs both passes, or the forward pass alone, and calls `mark` where each ends."""
    gradient: list[Tensor] = []

    def step(mark: Mark = lambda: None) -> Any:
        with torch.set_grad_enabled(backward):
            result = forward()
        mark()
        if not backward:
            return result
        if not gradient:
            gradient.append(torch.ones_like(result))
        # A peer may take its temperature for a constant.
        gradients = torch.autograd.grad(result, leaves, gradient[0], allow_unused=True)
        mark()
        return result, gradients

    return step


def measure(forward: Callable[[], Any], leaves: Sequence[Tensor], *, backward: bool = True) -> dict[str, Any]:
    """Milliseconds of a pass (medians), replayed from a CUDA graph, too; the most memory beyond inputs and gradients;
    the clock and the power right after, where they can be read."""
    step = one_pass(forward, leaves, backward)
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
    runs = milliseconds(step, REPEATS, between=flush.zero_)
    times = [sum(parts) for parts in runs]
    row: dict[str, Any] = {"ms": statistics.median(times), "spread ms": max(times) - min(times)}
    if backward:
        row |= {
            f"{name} ms": statistics.median(parts)
            for name, parts in zip(("forward", "backward"), zip(*runs, strict=True), strict=True)
        }
    row |= clock_and_power()
    try:
        graph, _ = captured(step)
        row["graph ms"] = seconds_of(graph.replay, REPEATS, between=flush.zero_) * 1e3
    except torch.cuda.OutOfMemoryError:
        row["graph ms"] = "out of memory"
    except RuntimeError:
        row["graph ms"] = "not capturable"
    return row | {"memory MB": memory / 1e6}


def captured(step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """The step as a CUDA graph, after a run of it on a stream of its own, and what the capture returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs


def clock_and_power() -> dict[str, float]:
    """The multiprocessors' clock and the power that the GPU draws now; nothing where pynvml is not installed."""
    try:
        return {"SM MHz": torch.cuda.clock_rate(), "watt": torch.cuda.power_draw() / 1e3}
    except Exception:  # pynvml's own, where the driver does not tell
        return {}


def kernel_times(step: Callable[[], Any]) -> list[Row]:
    """A row for each kernel of a step that has run before: launches, and microseconds in all by the profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        step()
        torch.cuda.synchronize()
    events = [event for event in recorded.key_averages() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: -event.self_device_time_total)
    return [{"kernel": e.key, "launches": e.count, "us": e.self_device_time_total} for e in events]


def milliseconds(
    step: Callable[[Mark], Any], repeats: int, between: Callable[[], Any] = lambda: None
) -> list[list[float]]:
    """The times of the parts of each run by the GPU's own clock: `step` calls its argument where a part ends."""
    runs = []
    for _ in range(repeats):
        between()
        marks = [_recorded()]
        step(lambda marks=marks: marks.append(_recorded()))  # type: ignore[misc]
        torch.cuda.synchronize()
        runs.append([begin.elapsed_time(end) for begin, end in itertools.pairwise(marks)])
    return runs


def _recorded() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_of(call: Callable[[], Any], repeats: int = 13, between: Callable[[], Any] = lambda: None) -> float:
    """The median time of a call, without the first runs."""

    def step(mark: Mark) -> None:
        call()
        mark()

    times = [sum(parts) for parts in milliseconds(step, repeats, between)]
    return statistics.median(times[repeats // 4 :]) * 1e-3


def gemm_rate(N: int, M: int, D: int, dtype: torch.dtype, device: torch.device) -> float:
    """FLOP per second of torch's own product of that shape, or of its largest part that fits: the practical limit."""
    x, y = (torch.randn(min(rows, LARGEST_PRODUCT), D, device=device, dtype=dtype) for rows in (N, M))
    return 2.0 * len(x) * len(y) * D / seconds_of(lambda: x @ y.T)


def share_of_products(
    count: int, N: int, M: int, D: int, dtype: torch.dtype, device: torch.device
) -> Callable[[float], dict[str, float]]:
    """Figures of a contest: the share of a pass that its products [N, D] x [D, M] take at the rate of torch's own."""
    seconds_of_products = count * 2.0 * N * M * D / gemm_rate(N, M, D, dtype, device)
    return lambda seconds: {f"share of {count} G": seconds_of_products / seconds}
