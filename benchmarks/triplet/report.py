"""The report of triplet: forward and backward against its peers, time and memory, for each mining."""

import functools
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.console import Group

from benchmarks.harness.pairs import SIZE, PairsReport
from benchmarks.triplet.peers import Loss, triplet_losses

# pytorch-metric-learning lists all triplets by way of an N x N x N tensor.
LARGEST_LIST_OF_TRIPLETS = 512


def losses_for(mining: str, n: int, impl: str) -> dict[str, Loss]:
    losses = triplet_losses(mining, impl)
    if mining == "all" and n > LARGEST_LIST_OF_TRIPLETS:
        losses.pop("pytorch-metric-learning", None)
    return losses


def report_of(mining: str, n: int = 0) -> PairsReport:
    products = 3 if mining == "all" else 1
    return PairsReport(f"Triplet loss, {mining}", lambda *_: products, functools.partial(losses_for, mining, n), ())


REPORTS = {mining: report_of(mining) for mining in ("all", "hardest", "semi_hard")}
# (dtype, N, mining, peers too): past 8192 a peer takes many seconds and some gigabytes.
SIZES = [
    *((torch.float32, n, True) for n in (512, 2048, 8192)),
    *((torch.bfloat16, n, True) for n in (2048, 8192)),
    (torch.float32, 32768, False),
    (torch.bfloat16, 65536, False),
]
CELLS = [(dtype, n, mining, peers) for mining in REPORTS for dtype, n, peers in SIZES]
QUICK = [(dtype, 2048, mining, True) for mining in REPORTS for dtype in (torch.float32, torch.bfloat16)]


def measure(dtype: torch.dtype, n: int, mining: str, with_peers: bool, *, seconds: float) -> list[dict[str, Any]]:
    rows = report_of(mining, n).measure(dtype, n, with_peers, seconds=seconds)
    return [{"mining": mining} | row for row in rows]


def of(mining: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in results if row["mining"] == mining]


def finish(results: list[dict[str, Any]]) -> None:
    for row in results:  # one limit for all: the best rate that the cores showed
        row["peak"] = max(r["peak"] for r in results if r["dtype"] == row["dtype"])
    for mining, report in REPORTS.items():
        report.finish(of(mining, results))


def table_of(results: list[dict[str, Any]]) -> Group:
    return Group(*(report.table_of(of(mining, results)) for mining, report in REPORTS.items()))


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Time against N in float32, one panel for each mining."""
    figure, panels = plt.subplots(1, len(REPORTS), figsize=(12, 4), layout="constrained", sharey=True)
    for axes, mining in zip(panels, REPORTS, strict=True):
        chosen = [r for r in of(mining, results) if r["dtype"] == "float32"]
        for name in dict.fromkeys(r["loss"] for r in chosen):
            points = sorted((r["n"], r["seconds"]) for r in chosen if r["loss"] == name)
            sizes, seconds = zip(*points, strict=True)
            style: dict[str, Any] = {"linewidth": 2.5, "zorder": 3} if name == "mmkernels" else {"linewidth": 1.2}
            axes.plot(sizes, seconds, marker="o", markersize=4, label=name, **style)
        ticks = sorted({r["n"] for r in chosen})
        axes.set(xscale="log", yscale="log", xlabel="N pairs", title=mining)
        axes.set_xticks(ticks, [str(n) for n in ticks], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("seconds, forward + backward")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Triplet loss, D={SIZE}, float32, CPU with {torch.get_num_threads()} threads")
    figure.savefig(path, dpi=130)
    plt.close(figure)
