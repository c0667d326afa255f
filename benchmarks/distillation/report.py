"""The report of info_nce's soft targets, groups and a teacher: forward and backward against peers, time and memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.distillation.peers import distillation_losses, group_losses
from benchmarks.harness.peak import cpu_peak
from benchmarks.harness.timing import interleaved, median
from mmkernels._autograd import keeps_products
from mmkernels.testing import features, peak_allocated

SIZE = 512  # features of student and teacher
GROUP = 8  # queries, and keys, of a group
# (targets, dtype, N, peers too)
CELLS = [
    *((targets, torch.float32, n, True) for targets in ("groups", "teacher") for n in (1024, 2048, 4096, 8192)),
    *((targets, torch.bfloat16, n, True) for targets in ("groups", "teacher") for n in (2048, 8192)),
    ("teacher", torch.bfloat16, 65536, False),
]
QUICK = [("groups", torch.float32, 1024, True), ("teacher", torch.float32, 1024, True)]


def products(targets: str, queries: Tensor, keys: Tensor) -> int:
    """Of the schedule: those of the forward pass a second time unless they are kept."""
    made = 1 if targets == "groups" else 2
    return made + 2 if keeps_products(made * len(queries) * len(keys), queries, keys) else 2 * made + 2


def measure(targets: str, dtype: torch.dtype, n: int, with_peers: bool, *, seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of every loss at one size: median seconds, and bytes beyond inputs and gradients."""
    leaves = [
        features(n, SIZE, dtype, seed=1).requires_grad_(),
        features(n, SIZE, dtype, seed=2).requires_grad_(),
        torch.tensor(20.0, requires_grad=True),
    ]
    losses: dict[str, Callable[..., Tensor]]
    if targets == "groups":
        given: tuple[Tensor, ...] = (torch.randperm(n, generator=torch.Generator().manual_seed(0)) // GROUP,)
        losses = dict(group_losses("cpu"))
    else:
        given = (features(n, SIZE, dtype, seed=3), features(n, SIZE, dtype, seed=4), torch.tensor(50.0))
        losses = dict(distillation_losses("cpu"))
    if not with_peers:
        losses = {name: loss for name, loss in losses.items() if name.startswith("mmkernels")}
    gradients = sum(leaf.nbytes for leaf in leaves)
    steps = {
        name: lambda loss=loss: torch.autograd.grad(loss(*leaves, *given), leaves) for name, loss in losses.items()
    }
    peaks = [cpu_peak(dtype) or 0.0 for _ in range(3)]
    times = interleaved(steps, seconds=seconds, least=1 if n > 8192 else 3 if n == 8192 else 5)
    peaks += [cpu_peak(dtype) or 0.0 for _ in range(3)]
    return [
        {
            "targets": targets,
            "dtype": str(dtype).removeprefix("torch."),
            "n": n,
            "loss": name,
            "seconds": median(times[name]),
            "best": min(times[name]),
            "calls": len(times[name]),
            "bytes": peak_allocated(step) - gradients,
            "products": products(targets, *leaves[:2]),
            "peak": max(peaks),
        }
        for name, step in steps.items()
    ]


def finish(results: list[dict[str, Any]]) -> None:
    """The share of the limit: the products of our schedule at the best rate that the cores showed in this run."""
    for dtype in {r["dtype"] for r in results}:
        peak = max(r["peak"] for r in results if r["dtype"] == dtype)
        for r in results:
            if r["dtype"] == dtype and peak > 0:
                r["share_of_limit"] = r["products"] * 2 * r["n"] ** 2 * SIZE / r["seconds"] / peak


def table_of(results: list[dict[str, Any]]) -> Table:
    table = Table(title=f"Soft targets, forward + backward, D={SIZE}, CPU, {torch.get_num_threads()} threads")
    heads = (
        "targets",
        "dtype",
        "N",
        "loss",
        "median ms",
        "x mmkernels",
        "MiB beyond inputs and gradients",
        "G",
        "of limit",
    )
    for column in heads:
        table.add_column(column, justify="left" if column in ("targets", "dtype", "loss") else "right")
    own = {(r["targets"], r["dtype"], r["n"]): r["seconds"] for r in results if r["loss"] == "mmkernels"}
    previous = None
    for r in results:
        cell = (r["targets"], r["dtype"], r["n"])
        if previous not in (None, cell):
            table.add_section()
        previous = cell
        share = f"{r['share_of_limit']:.0%}" if "share_of_limit" in r else "-"
        times = (f"{r['seconds'] * 1e3:.1f}", f"{r['seconds'] / own[cell]:.2f}", f"{r['bytes'] / 2**20:.1f}")
        table.add_row(r["targets"], r["dtype"], str(r["n"]), r["loss"], *times, str(r["products"]), share)
    return table


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Time against N, float32, a panel for each kind of target."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, targets in zip(panels, ("groups", "teacher"), strict=True):
        chosen = [r for r in results if r["dtype"] == "float32" and r["targets"] == targets]
        for name in dict.fromkeys(r["loss"] for r in chosen):
            points = sorted((r["n"], r["seconds"]) for r in chosen if r["loss"] == name)
            style: dict[str, Any] = {"linewidth": 2.5, "zorder": 3} if name == "mmkernels" else {"linewidth": 1.2}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name, **style)
        sizes = sorted({r["n"] for r in chosen})
        axes.set(xscale="log", yscale="log", xlabel="N pairs", ylabel="seconds, forward + backward", title=targets)
        axes.set_xticks(sizes, [str(n) for n in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Soft targets, D={SIZE}, float32, CPU with {torch.get_num_threads()} threads")
    figure.savefig(path, dpi=130)
    plt.close(figure)
