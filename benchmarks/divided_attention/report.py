"""The report of divided_attention: TimeSformer's two steps, forward alone and with backward, against their peers."""

import functools
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch

from benchmarks.divided_attention.peers import Attention, attentions
from benchmarks.harness import figures
from benchmarks.harness.bench_cases import BenchCase
from benchmarks.harness.cpu_runs import best_peaks, measured
from benchmarks.harness.tables import Comparison, Headline, Table, duration, memory_text, name_of, titled
from benchmarks.harness.timing import bandwidth
from mmkernels.divided_attention.layout import layout_of

HEADS, HEAD = 12, 64
# (axis, dtype, clips, frames, positions): TimeSformer at 224 px, its long clips, and 448 px.
CELLS = [
    (axis, dtype, *size)
    for axis in ("time", "space")
    for dtype in (torch.float32, torch.bfloat16)
    for size in ((1, 8, 196), (4, 8, 196), (1, 96, 196), (1, 16, 784))
]
COMPARISON = Comparison(("axis", "dtype", "clips", "frames", "positions", "pass"), "attention")
BOTH = "forward + backward"
HEADLINES = [
    Headline(
        "divided_attention",
        f"{axis}, 4 clips of 8 x 196",
        {"axis": axis, "pass": BOTH},
        {"axis": axis, "pass": BOTH, "dtype": "float32", "clips": 4, "frames": 8},
        "eager",
        "divided_attention.md",
    )
    for axis in ("time", "space")
]
QUICK = [cell for cell in CELLS if cell[2:] == (1, 8, 196)]


def inputs(dtype: torch.dtype, clips: int, frames: int, positions: int) -> torch.Tensor:
    """qkv as a projection gives it, with a gradient."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(clips, 1 + positions * frames, 3 * HEADS * HEAD, generator=generator)
    return qkv.to(dtype).requires_grad_()


def forward(attention: Attention, qkv: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return attention(qkv)


def measure(
    axis: str, dtype: torch.dtype, clips: int, frames: int, positions: int, *, seconds: float, skip: Container[str] = ()
) -> list[dict[str, Any]]:
    """Every implementation at one size: median seconds, bytes beyond inputs and outputs, and the floor.

    The floor is the longer of two times: the FLOPs of the pairs that attend at the cores' peak for the dtype, and the
    least bytes (forward reads qkv and writes the output; backward reads both and their gradient, and writes that of
    qkv) at the bandwidth of a large copy.
    """
    tokens, width = 1 + positions * frames, HEADS * HEAD
    qkv = inputs(dtype, clips, frames, positions)
    calls = attentions(axis, frames, HEADS, "cpu")  # type: ignore[arg-type]
    grads = {name: torch.randn_like(call(qkv)).detach() for name, call in calls.items()}

    steps: dict[str, dict[str, Any]] = {
        "forward": {name: functools.partial(forward, call, qkv) for name, call in calls.items()},
        BOTH: {
            name: lambda call=call, name=name: torch.autograd.grad(call(qkv), qkv, grads[name])
            for name, call in calls.items()
        },
    }
    rows: list[dict[str, Any]] = []
    pairs = clips * layout_of(tokens, frames, axis, "timesformer", "nt").pairs
    part = clips * tokens * width * dtype.itemsize
    for what, functions in steps.items():
        products, parts, given = (2, 4, part) if what == "forward" else (7, 12, 3 * part)
        before = bandwidth()
        of_pass = measured(functions, "attention", dtype, seconds=seconds, skip=skip, least=3, given=given)
        cell = {
            "axis": axis,
            "dtype": name_of(dtype),
            "clips": clips,
            "frames": frames,
            "positions": positions,
            "pass": what,
            "flops": products * 2 * pairs * width,
            "least_bytes": parts * part,
            "bandwidth": max(before, bandwidth()),
        }
        rows += [cell | row for row in of_pass]
    return rows


def finish(results: list[dict[str, Any]]) -> None:
    """The share of the floor, at the best rates that the cores and the memory showed in this run."""
    bandwidth_seen, peaks = max(row["bandwidth"] for row in results), best_peaks(results)
    for row in results:
        if peaks[row["dtype"]] > 0:
            compute, memory = row["flops"] / peaks[row["dtype"]], row["least_bytes"] / bandwidth_seen
            row["bound_by"] = "FLOPs" if compute >= memory else "bytes"
            row["share_of_floor"] = max(compute, memory) / row["seconds"]


def bench_cases() -> list[BenchCase]:
    def make(attention: Attention, what: str, *size: Any) -> Callable[[], Any]:
        qkv = inputs(*size)
        if what == "forward":
            return functools.partial(forward, attention, qkv)
        grad = torch.ones_like(forward(attention, qkv))
        return lambda: torch.autograd.grad(attention(qkv), qkv, grad)

    return [
        BenchCase(
            f"{axis} {clips} x {frames} x {positions} {name_of(dtype)} {what}",
            who,
            functools.partial(make, attention, what, dtype, clips, frames, positions),
        )
        for axis, dtype, clips, frames, positions in CELLS
        if (frames, positions) == (8, 196)
        for what in ("forward", BOTH)
        for who, attention in attentions(axis, frames, HEADS).items()  # type: ignore[arg-type]
    ]


def size_of(row: dict[str, Any]) -> str:
    return f"{row['clips']} x {row['frames']} x {row['positions']}"


def tables(results: list[dict[str, Any]]) -> dict[str, Table]:
    def table(what: str) -> Table:
        heads = ("axis, dtype", "B x T x N", "mmkernels", "of the floor", "fastest peer", "eager")
        rows = []
        for cell in COMPARISON.cells([row for row in results if row["pass"] == what]):
            ours = cell["mmkernels"]
            best = COMPARISON.peers(cell)[0]
            rows.append(
                (
                    f"{ours['axis']}, {ours['dtype']}",
                    size_of(ours),
                    f"**{duration(ours['seconds'])}**",
                    f"{ours['share_of_floor']:.0%} {ours['bound_by']}" if "share_of_floor" in ours else "-",
                    f"{titled(best)} {duration(cell[best]['seconds'])} ({COMPARISON.multiple(cell, best)})",
                    COMPARISON.multiple(cell, "eager"),
                    *(memory_text(cell[who]["bytes"]) for who in ("mmkernels", best, "eager")),
                )
            )
        return Table((*heads, "memory: mmkernels", "that peer", "eager"), rows)

    return {"divided_attention forward": table("forward"), "divided_attention with backward": table(BOTH)}


def draw(results: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """How many times ours every peer takes, in float32; the tables have bfloat16 too."""
    title = "Divided attention in float32 (clips x frames x positions), time as a multiple of mmkernels'"
    with figures.drawing(path, title, figures.on(machine), columns=2, height=4.4, sharey=True) as panels:
        for axes, what in zip(panels, ("forward", BOTH), strict=True):
            chosen = [row for row in results if row["pass"] == what and row["dtype"] == "float32"]
            cells = COMPARISON.cells(chosen)
            labels = [f"{cell['mmkernels']['axis']} {size_of(cell['mmkernels'])}" for cell in cells]
            axes.set(title=f"{what}; dark: the fastest peer")
            figures.spread(axes, COMPARISON, list(zip(labels, cells, strict=True)))
