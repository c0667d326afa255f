"""The report of info_nce: forward and backward against its peers, time and memory."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.table import Table

from benchmarks.peak import cpu_peak
from benchmarks.peers import contrastive_losses
from benchmarks.timing import interleaved, median
from mmkernels.testing import features, peak_allocated

SIZE = 512  # features
# (dtype, N, peers too): past 8192 a peer takes many seconds and some gigabytes.
CELLS = [
    *((torch.float32, n, True) for n in (512, 1024, 2048, 4096, 8192)),
    *((torch.bfloat16, n, True) for n in (2048, 8192)),
    *((torch.float32, n, False) for n in (16384, 32768)),
    (torch.bfloat16, 65536, False),
]
QUICK = [(torch.float32, 1024, True), (torch.float32, 2048, True), (torch.bfloat16, 2048, True)]


def measure(dtype: torch.dtype, n: int, with_peers: bool, *, seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of every loss at one size: median seconds, and bytes beyond inputs and gradients."""
    losses = contrastive_losses("cpu")
    if not with_peers:
        losses = {"mmkernels": losses["mmkernels"]}
    leaves = [
        features(n, SIZE, dtype, seed=1).requires_grad_(),
        features(n, SIZE, dtype, seed=2).requires_grad_(),
        torch.tensor(20.0, requires_grad=True),
    ]
    gradients = sum(leaf.nbytes for leaf in leaves)
    steps = {name: lambda loss=loss: torch.autograd.grad(loss(*leaves), leaves) for name, loss in losses.items()}
    peaks = [cpu_peak(dtype) or 0.0 for _ in range(3)]
    times = interleaved(steps, seconds=seconds, least=1 if n > 8192 else 5)
    peaks += [cpu_peak(dtype) or 0.0 for _ in range(3)]
    rows = []
    for name, step in steps.items():
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "n": n,
                "loss": name,
                "seconds": median(times[name]),
                "best": min(times[name]),
                "calls": len(times[name]),
                "bytes": peak_allocated(step) - gradients,
                "peak": max(peaks),
            }
        )
    return rows


def finish(results: list[dict[str, Any]]) -> None:
    """The share of the 4 G limit: 8 N^2 D FLOP at the best rate that the cores showed in this run for the dtype."""
    for dtype in {r["dtype"] for r in results}:
        peak = max(r["peak"] for r in results if r["dtype"] == dtype)
        for r in results:
            if r["dtype"] == dtype and peak > 0:
                r["share_of_limit"] = 8 * r["n"] ** 2 * SIZE / r["seconds"] / peak


def table_of(results: list[dict[str, Any]]) -> Table:
    table = Table(title=f"Contrastive loss, forward + backward, D={SIZE}, CPU, {torch.get_num_threads()} threads")
    for column in ("dtype", "N", "loss", "median ms", "x mmkernels", "MiB beyond inputs and gradients", "of 4 G limit"):
        table.add_column(column, justify="left" if column in ("dtype", "loss") else "right")
    own = {(r["dtype"], r["n"]): r["seconds"] for r in results if r["loss"] == "mmkernels"}
    previous = None
    for r in results:
        cell = (r["dtype"], r["n"])
        if previous not in (None, cell):
            table.add_section()
        previous = cell
        share = f"{r['share_of_limit']:.0%}" if "share_of_limit" in r else "-"
        table.add_row(
            r["dtype"],
            str(r["n"]),
            r["loss"],
            f"{r['seconds'] * 1e3:.1f}",
            f"{r['seconds'] / own[cell]:.2f}",
            f"{r['bytes'] / 2**20:.1f}",
            share,
        )
    return table


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against N, float32."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    chosen = [r for r in results if r["dtype"] == "float32"]
    for name in dict.fromkeys(r["loss"] for r in chosen):
        points = sorted((r["n"], r["seconds"], r["bytes"] / 2**20) for r in chosen if r["loss"] == name)
        sizes, seconds, mebibytes = zip(*points, strict=True)
        style: dict[str, Any] = {"linewidth": 2.5, "zorder": 3} if name == "mmkernels" else {"linewidth": 1.2}
        left.plot(sizes, seconds, marker="o", markersize=4, label=name, **style)
        right.plot(sizes, mebibytes, marker="o", markersize=4, label=name, **style)
    inputs = sorted({r["n"] for r in chosen})
    right.plot(inputs, [2 * n * SIZE * 4 / 2**20 for n in inputs], color="grey", linestyle=":", label="the inputs")
    for axes, what in ((left, "seconds, forward + backward"), (right, "MiB beyond inputs and gradients")):
        axes.set(xscale="log", yscale="log", xlabel="N pairs", ylabel=what)
        axes.set_xticks(inputs, [str(n) for n in inputs], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Symmetric InfoNCE, D={SIZE}, float32, CPU with {torch.get_num_threads()} threads")
    figure.savefig(path, dpi=130)
    plt.close(figure)
