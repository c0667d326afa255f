"""The reports of losses over all pairs of N queries and N keys: forward and backward against peers, time and memory."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import torch
from rich.table import Table
from torch import Tensor

from benchmarks.harness.peak import cpu_peak
from benchmarks.harness.timing import interleaved, median
from mmkernels.testing import features, peak_allocated

SIZE = 512  # features


class PairsReport(NamedTuple):
    title: str
    products: Callable[[Tensor, Tensor], int]  # of 2 N^2 D FLOP each, for these features, in forward and backward
    losses: Callable[[str], dict[str, Callable[..., Tensor]]]  # by implementation: ours first, then its peers
    numbers: tuple[float, ...]  # what the losses take beside the features: the scale and what follows

    def leaves(self, n: int, dtype: torch.dtype) -> list[Tensor]:
        rows = [features(n, SIZE, dtype, seed=seed).requires_grad_() for seed in (1, 2)]
        return rows + [torch.tensor(number, requires_grad=True) for number in self.numbers]

    def measure(self, dtype: torch.dtype, n: int, with_peers: bool, *, seconds: float) -> list[dict[str, Any]]:
        """Forward and backward of every loss at one size: median seconds, and bytes beyond inputs and gradients."""
        losses = self.losses("cpu")
        if not with_peers:
            losses = {"mmkernels": losses["mmkernels"]}
        leaves = self.leaves(n, dtype)
        gradients = sum(leaf.nbytes for leaf in leaves)
        steps = {name: lambda loss=loss: torch.autograd.grad(loss(*leaves), leaves) for name, loss in losses.items()}
        peaks = [cpu_peak(dtype) or 0.0 for _ in range(3)]
        times = interleaved(steps, seconds=seconds, least=1 if n > 8192 else 3 if n == 8192 else 5)
        peaks += [cpu_peak(dtype) or 0.0 for _ in range(3)]
        return [
            {
                "dtype": str(dtype).removeprefix("torch."),
                "n": n,
                "loss": name,
                "seconds": median(times[name]),
                "best": min(times[name]),
                "calls": len(times[name]),
                "bytes": peak_allocated(step) - gradients,
                "products": self.products(*leaves[:2]),
                "peak": max(peaks),
            }
            for name, step in steps.items()
        ]

    def finish(self, results: list[dict[str, Any]]) -> None:
        """The share of the limit: the schedule's products at the best rate that the cores showed in this run."""
        for dtype in {r["dtype"] for r in results}:
            peak = max(r["peak"] for r in results if r["dtype"] == dtype)
            for r in results:
                if r["dtype"] == dtype and peak > 0:
                    r["share_of_limit"] = r["products"] * 2 * r["n"] ** 2 * SIZE / r["seconds"] / peak

    def table_of(self, results: list[dict[str, Any]]) -> Table:
        table = Table(title=f"{self.title}, forward + backward, D={SIZE}, CPU, {torch.get_num_threads()} threads")
        heads = (
            "dtype",
            "N",
            "loss",
            "median ms",
            "x mmkernels",
            "MiB beyond inputs and gradients",
            "G",
            "of the limit",
        )
        for column in heads:
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
                str(r["products"]),
                share,
            )
        return table

    def draw(self, results: list[dict[str, Any]], path: Path) -> None:
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
        memory = [2 * n * SIZE * 4 / 2**20 for n in inputs]
        right.plot(inputs, memory, color="grey", linestyle=":", label="the inputs")
        for axes, what in ((left, "seconds, forward + backward"), (right, "MiB beyond inputs and gradients")):
            axes.set(xscale="log", yscale="log", xlabel="N pairs", ylabel=what)
            axes.set_xticks(inputs, [str(n) for n in inputs], rotation=45)
            axes.minorticks_off()
            axes.grid(alpha=0.3)
        right.legend(frameon=False, fontsize=8)
        figure.suptitle(f"{self.title}, D={SIZE}, float32, CPU with {torch.get_num_threads()} threads")
        figure.savefig(path, dpi=130)
        plt.close(figure)
