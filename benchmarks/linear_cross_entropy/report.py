"""The report of linear_cross_entropy: forward and backward against its peers, time and memory."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.table import Table

from benchmarks.harness.peak import cpu_peak
from benchmarks.harness.timing import interleaved, median
from benchmarks.linear_cross_entropy.peers import classification_losses
from mmkernels.linear_cross_entropy.ops import _keeps_products
from mmkernels.testing import peak_allocated

SIZE = 512  # features
# (dtype, rows, classes): the vocabularies of COCO captions and of GPT-2.
CELLS = [
    (torch.float32, 512, 9488),
    *((dtype, n, 50257) for dtype in (torch.float32, torch.bfloat16) for n in (512, 2048, 8192)),
]
QUICK = [(torch.float32, 512, 9488), (torch.bfloat16, 512, 9488)]


def inputs(dtype: torch.dtype, n: int, v: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden rows and weight, with gradients, and targets; logits of a deviation of 1."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, SIZE, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, SIZE, generator=generator) * SIZE**-0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=generator)


def measure(dtype: torch.dtype, n: int, v: int, *, seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of every loss at one size: median seconds, and bytes beyond inputs and gradients."""
    hidden, weight, targets = inputs(dtype, n, v)
    gradients = hidden.nbytes + weight.nbytes
    steps = {
        name: lambda loss=loss: torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))
        for name, loss in classification_losses("cpu").items()
    }
    peaks = [cpu_peak(dtype) or 0.0 for _ in range(3)]
    times = interleaved(steps, seconds=seconds, least=2 if n * v > 10**8 else 5)
    peaks += [cpu_peak(dtype) or 0.0 for _ in range(3)]
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "n": n,
            "v": v,
            "loss": name,
            "seconds": median(times[name]),
            "best": min(times[name]),
            "calls": len(times[name]),
            "bytes": peak_allocated(step) - gradients,
            "peak": max(peaks),
            "products": 3 if name != "mmkernels" or _keeps_products(hidden, weight, None) else 4,
        }
        for name, step in steps.items()
    ]


def finish(results: list[dict[str, Any]]) -> None:
    """The share of the limit: the products of our schedule at the best rate that the cores showed in this run."""
    for dtype in {r["dtype"] for r in results}:
        peak = max(r["peak"] for r in results if r["dtype"] == dtype)
        for r in results:
            if r["dtype"] == dtype and r["loss"] == "mmkernels" and peak > 0:
                r["limit"] = r["products"] * 2 * r["n"] * r["v"] * SIZE / peak
                r["share_of_limit"] = r["limit"] / r["seconds"]


def table_of(results: list[dict[str, Any]]) -> Table:
    threads = torch.get_num_threads()
    table = Table(title=f"Linear cross-entropy, forward + backward, D={SIZE}, CPU, {threads} threads")
    heads = ("dtype", "N", "V", "loss", "median ms", "x mmkernels", "MiB beyond inputs and gradients", "of limit")
    for column in heads:
        table.add_column(column, justify="left" if column in ("dtype", "loss") else "right")
    own = {(r["dtype"], r["n"], r["v"]): r["seconds"] for r in results if r["loss"] == "mmkernels"}
    previous = None
    for r in results:
        cell = (r["dtype"], r["n"], r["v"])
        if previous not in (None, cell):
            table.add_section()
        previous = cell
        table.add_row(
            r["dtype"],
            str(r["n"]),
            str(r["v"]),
            r["loss"],
            f"{r['seconds'] * 1e3:.1f}",
            f"{r['seconds'] / own[cell]:.2f}",
            f"{r['bytes'] / 2**20:.1f}",
            f"{r['share_of_limit']:.0%}" if "share_of_limit" in r else "-",
        )
    return table


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Time and memory against N, float32, the larger vocabulary."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    classes = max(r["v"] for r in results)
    chosen = [r for r in results if r["dtype"] == "float32" and r["v"] == classes]
    for name in dict.fromkeys(r["loss"] for r in chosen):
        points = sorted((r["n"], r["seconds"], r["bytes"] / 2**20) for r in chosen if r["loss"] == name)
        sizes, seconds, mebibytes = zip(*points, strict=True)
        style: dict[str, Any] = {"linewidth": 2.5, "zorder": 3} if name == "mmkernels" else {"linewidth": 1.2}
        left.plot(sizes, seconds, marker="o", markersize=4, label=name, **style)
        right.plot(sizes, mebibytes, marker="o", markersize=4, label=name, **style)
    rows = sorted({r["n"] for r in chosen})
    right.plot(rows, [n * classes * 4 / 2**20 for n in rows], color="grey", linestyle=":", label="the logits")
    for axes, what in ((left, "seconds, forward + backward"), (right, "MiB beyond inputs and gradients")):
        axes.set(xscale="log", yscale="log", xlabel="N rows", ylabel=what)
        axes.set_xticks(rows, [str(n) for n in rows])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    right.legend(frameon=False, fontsize=8)
    threads = torch.get_num_threads()
    figure.suptitle(f"Linear cross-entropy, V={classes}, D={SIZE}, float32, CPU with {threads} threads")
    figure.savefig(path, dpi=130)
    plt.close(figure)
