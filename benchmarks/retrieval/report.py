"""The report of retrieval_ranks and retrieval_topk against their peers, time and memory."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.table import Table

from benchmarks.harness.peak import cpu_peak
from benchmarks.harness.timing import interleaved, median
from benchmarks.retrieval.peers import rankers, searches, torchmetrics_recalls
from mmkernels.testing import features, peak_allocated

SIZE = 512  # features
# (dtype, queries, keys, k): the k best, or the ranks where k is 0. torchmetrics' own metric goes query by query in
# Python, and is measured once, where that takes seconds. From 65536 on there is no matrix to compare with.
TORCHMETRICS = 1024
ALONE = 65536
CELLS = [
    (torch.float32, TORCHMETRICS, TORCHMETRICS, 0),
    *((dtype, n, n, k) for k in (0, 10) for dtype in (torch.float32, torch.bfloat16) for n in (2048, 8192)),
    (torch.float32, 2048, 8192, 1000),
    (torch.float32, 1, 131072, 10),
    (torch.float32, ALONE, ALONE, 0),
    (torch.float32, ALONE, ALONE, 10),
]
QUICK = [(torch.float32, 2048, 2048, 0), (torch.float32, 2048, 2048, 10)]


def inputs(dtype: torch.dtype, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit queries near their keys, unit keys, and targets: recall is neither 0 nor 1."""
    keys = features(m, SIZE, dtype)
    return features(n, SIZE, dtype, seed=1, like=keys, mean_cosine=0.15), keys, torch.arange(n)


def measure(dtype: torch.dtype, n: int, m: int, k: int, *, seconds: float) -> list[dict[str, Any]]:
    """Every candidate at one size: median seconds, and bytes beyond inputs."""
    queries, keys, targets = inputs(dtype, n, m)
    calls: dict[str, Any]
    if k:
        calls = {name: lambda search=search: search(queries, keys, k) for name, search in searches("cpu").items()}
    else:
        all_rankers = rankers("cpu") | (torchmetrics_recalls() if n == TORCHMETRICS else {})
        calls = {name: lambda rank=rank: rank(queries, keys, targets) for name, rank in all_rankers.items()}
    if dtype != torch.float32:
        calls.pop("faiss IndexFlatIP", None)
    if n >= ALONE:
        calls = {"mmkernels": calls["mmkernels"]}
    peaks = [cpu_peak(dtype) or 0.0 for _ in range(3)]
    times = interleaved(calls, seconds=seconds, least=2 if n * m > 10**8 else 5)
    peaks += [cpu_peak(dtype) or 0.0 for _ in range(3)]
    return [
        {
            "dtype": str(dtype).removeprefix("torch."),
            "n": n,
            "m": m,
            "k": k,
            "name": name,
            "seconds": median(times[name]),
            "best": min(times[name]),
            "calls": len(times[name]),
            # torch sees only what it allocates itself.
            "bytes": None if name.startswith("faiss") else peak_allocated(call),
            "peak": max(peaks),
        }
        for name, call in calls.items()
    ]


def finish(results: list[dict[str, Any]]) -> None:
    """The share of the limit: 2 N M D at the best rate that the cores showed in this run."""
    for dtype in {r["dtype"] for r in results}:
        peak = max(r["peak"] for r in results if r["dtype"] == dtype)
        for r in results:
            if r["dtype"] == dtype and r["name"] == "mmkernels" and peak > 0:
                r["limit"] = 2 * r["n"] * r["m"] * SIZE / peak
                r["share_of_limit"] = r["limit"] / r["seconds"]


def cell_of(r: dict[str, Any]) -> tuple[Any, ...]:
    return r["dtype"], r["n"], r["m"], r["k"]


def table_of(results: list[dict[str, Any]]) -> Table:
    table = Table(title=f"Retrieval, D={SIZE}, CPU, {torch.get_num_threads()} threads")
    for column in ("what", "dtype", "N x M", "name", "median ms", "x mmkernels", "MiB beyond inputs", "of limit"):
        table.add_column(column, justify="left" if column in ("what", "dtype", "name") else "right")
    own = {cell_of(r): r["seconds"] for r in results if r["name"] == "mmkernels"}
    previous = None
    for r in results:
        cell = cell_of(r)
        if previous not in (None, cell):
            table.add_section()
        previous = cell
        table.add_row(
            f"{r['k']} best" if r["k"] else "ranks",
            r["dtype"],
            f"{r['n']} x {r['m']}",
            r["name"],
            f"{r['seconds'] * 1e3:.1f}",
            f"{r['seconds'] / own[cell]:.2f}",
            "-" if r["bytes"] is None else f"{r['bytes'] / 2**20:.1f}",
            f"{r['share_of_limit']:.0%}" if "share_of_limit" in r else "-",
        )
    return table


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Times as multiples of the limit's, float32 and bfloat16, ranks and the 10 best."""
    chosen = [(k, dtype) for k in (0, 10) for dtype in ("float32", "bfloat16")]
    figure, axes = plt.subplots(1, len(chosen), figsize=(12, 3.6), layout="constrained")
    for ax, (k, dtype) in zip(axes, chosen, strict=True):
        rows = [r for r in results if (r["k"], r["dtype"], r["n"], r["m"]) == (k, dtype, 8192, 8192)]
        colors = ["tab:blue" if r["name"] == "mmkernels" else "tab:gray" for r in rows]
        bars = ax.bar([r["name"].replace(" ", "\n", 1) for r in rows], [r["seconds"] for r in rows], color=colors)
        ax.bar_label(bars, [f"{r['seconds']:.2f}" for r in rows], fontsize=8)
        limit = next((r["limit"] for r in rows if "limit" in r), None)
        if limit is not None:
            ax.axhline(limit, color="black", linestyle=":", linewidth=1)
        ax.set_title(f"{f'the {k} best' if k else 'ranks'}, {dtype}", fontsize=10)
        ax.tick_params(axis="x", labelsize=7)
    axes[0].set_ylabel("seconds; dotted: the products at the cores' best rate", fontsize=8)
    figure.suptitle(f"8192 queries x 8192 keys, D={SIZE}, CPU with {torch.get_num_threads()} threads")
    figure.savefig(path, dpi=130)
    plt.close(figure)
