"""The report of divided_attention: TimeSformer's two steps, forward alone and with backward, against their peers."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.table import Table

from benchmarks.divided_attention.peers import attentions
from benchmarks.harness.peak import cpu_peak
from benchmarks.harness.timing import bandwidth, interleaved, median
from mmkernels.divided_attention.layout import layout_of
from mmkernels.testing import peak_allocated

HEADS, HEAD = 12, 64
# (axis, dtype, clips, frames, positions): TimeSformer at 224 px, its long clips, and 448 px.
CELLS = [
    (axis, dtype, *size)
    for axis in ("time", "space")
    for dtype in (torch.float32, torch.bfloat16)
    for size in ((1, 8, 196), (4, 8, 196), (1, 96, 196), (1, 16, 784))
]
QUICK = [cell for cell in CELLS if cell[2:] == (1, 8, 196)]


def measure(
    axis: str, dtype: torch.dtype, clips: int, frames: int, positions: int, *, seconds: float
) -> list[dict[str, Any]]:
    """Every implementation at one size: median seconds, bytes beyond inputs and outputs, and the floor.

    The floor is the longer of two times: the FLOPs of the pairs that attend at the cores' peak for the dtype, and the
    least bytes (forward reads qkv and writes the output; backward reads both and their gradient, and writes that of
    qkv) at the bandwidth of a large copy.
    """
    tokens, width = 1 + positions * frames, HEADS * HEAD
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(clips, tokens, 3 * width, generator=generator).to(dtype).requires_grad_()
    calls = attentions(axis, frames, HEADS, "cpu")  # type: ignore[arg-type]
    grads = {name: torch.randn_like(call(qkv)).detach() for name, call in calls.items()}

    def forward(call: Any) -> torch.Tensor:
        with torch.no_grad():
            return call(qkv)

    steps: dict[str, dict[str, Any]] = {
        "forward": {name: lambda call=call: forward(call) for name, call in calls.items()},
        "forward + backward": {
            name: lambda call=call, name=name: torch.autograd.grad(call(qkv), qkv, grads[name])
            for name, call in calls.items()
        },
    }
    rows = []
    pairs = clips * layout_of(tokens, frames, axis, "timesformer", "nt").pairs
    part = clips * tokens * width * dtype.itemsize
    for what, functions in steps.items():
        peaks = [cpu_peak(dtype) or 0.0 for _ in range(2)]
        bandwidths = [bandwidth()]
        times = interleaved(functions, seconds=seconds, least=3)
        peaks += [cpu_peak(dtype) or 0.0 for _ in range(2)]
        bandwidths += [bandwidth()]
        products, parts = (2, 4) if what == "forward" else (7, 12)
        for name, function in functions.items():
            rows.append(
                {
                    "axis": axis,
                    "dtype": str(dtype).removeprefix("torch."),
                    "clips": clips,
                    "frames": frames,
                    "positions": positions,
                    "pass": what,
                    "attention": name,
                    "seconds": median(times[name]),
                    "best": min(times[name]),
                    "calls": len(times[name]),
                    "bytes": peak_allocated(function) - (part if what == "forward" else 3 * part),
                    "flops": products * 2 * pairs * width,
                    "least_bytes": parts * part,
                    "peak": max(peaks),
                    "bandwidth": max(bandwidths),
                }
            )
    return rows


def finish(results: list[dict[str, Any]]) -> None:
    """The share of the floor, at the best rates that the cores and the memory showed in this run."""
    bandwidth_seen = max(r["bandwidth"] for r in results)
    for dtype in {r["dtype"] for r in results}:
        peak = max(r["peak"] for r in results if r["dtype"] == dtype)
        for r in results:
            if r["dtype"] == dtype and peak > 0:
                floor = max(r["flops"] / peak, r["least_bytes"] / bandwidth_seen)
                r["bound_by"] = "FLOPs" if floor == r["flops"] / peak else "bytes"
                r["share_of_floor"] = floor / r["seconds"]


def _cell(r: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(r[key] for key in ("axis", "dtype", "clips", "frames", "positions", "pass"))


def table_of(results: list[dict[str, Any]]) -> Table:
    title = f"Divided attention, {HEADS} heads of {HEAD}, CPU, {torch.get_num_threads()} threads"
    table = Table(title=title)
    for column in (
        "axis, dtype",
        "B x T x N",
        "pass",
        "attention",
        "median ms",
        "x mmkernels",
        "MiB beyond",
        "of floor",
    ):
        left = column in ("axis, dtype", "pass", "attention")
        table.add_column(column, justify="left" if left else "right")
    own = {_cell(r): r["seconds"] for r in results if r["attention"] == "mmkernels"}
    previous = None
    for r in results:
        if previous not in (None, _cell(r)):
            table.add_section()
        previous = _cell(r)
        share = f"{r['share_of_floor']:.0%} {r['bound_by']}" if "share_of_floor" in r else "-"
        table.add_row(
            f"{r['axis']}, {r['dtype']}",
            f"{r['clips']} x {r['frames']} x {r['positions']}",
            r["pass"],
            r["attention"],
            f"{r['seconds'] * 1e3:.2f}",
            f"{r['seconds'] / own[_cell(r)]:.2f}",
            f"{r['bytes'] / 2**20:.1f}",
            share,
        )
    return table


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """How much longer each peer takes than the fused call, for every cell."""
    names = [n for n in dict.fromkeys(r["attention"] for r in results) if n != "mmkernels"]
    own = {_cell(r): r["seconds"] for r in results if r["attention"] == "mmkernels"}
    passes = list(dict.fromkeys(r["pass"] for r in results))
    figure, axes = plt.subplots(1, len(passes), figsize=(12, 5), layout="constrained", sharey=True)
    for panel, what in zip(axes, passes, strict=True):
        cells = [cell for cell in own if cell[-1] == what]
        labels = [f"{c[0]} {c[1]}\n{c[2]} x {c[3]} x {c[4]}" for c in cells]
        for k, name in enumerate(names):
            ratios = {_cell(r): r["seconds"] / own[_cell(r)] for r in results if r["attention"] == name}
            places = [i + (k - (len(names) - 1) / 2) * 0.2 for i in range(len(cells))]
            panel.barh(places, [ratios[c] for c in cells], height=0.2, label=name)
        panel.axvline(1, color="black", linewidth=1)
        panel.set_yticks(range(len(cells)), labels, fontsize=7)
        panel.set(xlabel="time, as a multiple of mmkernels", title=what, xscale="log")
        panel.grid(alpha=0.3, axis="x")
    axes[0].invert_yaxis()
    axes[-1].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Divided attention (clips x frames x positions), CPU with {torch.get_num_threads()} threads")
    figure.savefig(path, dpi=130)
    plt.close(figure)
