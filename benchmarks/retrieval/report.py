"""The report of retrieval_ranks and retrieval_topk against their peers, time and memory."""

import functools
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import figures
from benchmarks.harness.bench_cases import DTYPES, BenchCase
from benchmarks.harness.cpu_runs import add_limits, measured
from benchmarks.harness.tables import Comparison, Headline, Table, multiple, name_of
from benchmarks.retrieval.peers import rankers, searches, torchmetrics_recalls
from mmkernels.testing import features

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
COMPARISON = Comparison(("dtype", "n", "m", "k"), "name")
SHOWN = {"dtype": "float32", "n": 8192, "m": 8192}
HEADLINES = [
    Headline(
        "retrieval_ranks",
        "8192 x 8192",
        {"k": 0},
        {**SHOWN, "k": 0},
        "argsort",
        "retrieval.md",
        release="open_clip 3.3.0",
    ),
    Headline("retrieval_topk", "10 of 8192 x 8192", {"k": 10}, {**SHOWN, "k": 10}, "torch.topk", "retrieval.md"),
]
QUICK = [(torch.float32, 2048, 2048, 0), (torch.float32, 2048, 2048, 10)]


def inputs(dtype: torch.dtype, n: int, m: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit queries near their keys, unit keys, and targets: recall is neither 0 nor 1."""
    keys = features(m, SIZE, dtype)
    return features(n, SIZE, dtype, seed=1, like=keys, mean_cosine=0.15), keys, torch.arange(n)


def measure(
    dtype: torch.dtype, n: int, m: int, k: int, *, seconds: float, skip: Container[str] = ()
) -> list[dict[str, Any]]:
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
    cell: dict[str, Any] = {"dtype": name_of(dtype), "n": n, "m": m, "k": k}
    rows = [
        cell | row
        for row in measured(calls, "name", dtype, seconds=seconds, skip=skip, least=2 if n * m > 10**8 else 5)
    ]
    for row in rows:
        if row["name"].startswith("faiss"):
            row["bytes"] = None  # torch sees only what it allocates itself
    return rows


def finish(results: list[dict[str, Any]]) -> None:
    """The limit of a row: 2 N M D FLOP."""
    add_limits(results, lambda row: 2 * row["n"] * row["m"] * SIZE)


def bench_cases() -> list[BenchCase]:
    def ranks(rank: Callable[..., Any], dtype: torch.dtype, n: int) -> Callable[[], Any]:
        return functools.partial(rank, *inputs(dtype, n, n))

    def best(search: Callable[..., Any], n: int, k: int) -> Callable[[], Any]:
        return functools.partial(search, *inputs(torch.float32, n, n)[:2], k)

    found = []
    for n in (2048, 8192):
        for dtype in DTYPES:
            for who, rank in rankers().items():
                make = functools.partial(ranks, rank, dtype, n)
                found.append(BenchCase(f"ranks of {n} {name_of(dtype)}", who, make, rounds=3))
        for k in (1, 10, 100):
            for who, search in searches().items():
                make = functools.partial(best, search, n, k)
                found.append(BenchCase(f"{k} of {n} float32", who, make, rounds=3))
    return found


def tables(results: list[dict[str, Any]]) -> dict[str, Table]:
    ranks = [row for row in results if row["k"] == 0]
    best = [row for row in results if row["k"] > 0]

    def size_of(row: dict[str, Any]) -> str:
        best_of = f", k = {row['k']}" if row["k"] else ""
        return f"{row['n']} x {row['m']}{best_of} {row['dtype']}"

    of_ranks = {
        "argsort": "argsort",
        "(scores > positive).sum": "`(scores > positive).sum`",
        "torch.compile of the sum": "`torch.compile` of the sum",
    }
    of_best = {
        "torch.topk": "`torch.topk`",
        "torch.compile of it": "`torch.compile` of it",
        "faiss IndexFlatIP": "faiss `IndexFlatIP`",
    }
    with_recalls = [row for row in ranks if row["n"] == TORCHMETRICS]
    names = [row["name"] for row in with_recalls if row["name"].startswith("torchmetrics")]
    recalls = {name: f"`{name.removeprefix('torchmetrics ')}`" for name in names}
    return {
        "retrieval_ranks": COMPARISON.table(ranks, ("N x M", size_of), of_ranks, of_ranks),
        "torchmetrics": COMPARISON.table(with_recalls, ("N x M", size_of), recalls, recalls),
        "retrieval_topk": COMPARISON.table(best, ("N x M", size_of), of_best, {"torch.topk": "`torch.topk`"}),
    }


def draw(results: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """How many times ours the peers take at 8192 x 8192, ranks and the 10 best, float32 and bfloat16; the limit."""
    title = f"Retrieval, 8192 x 8192, D = {SIZE}, time as a multiple of mmkernels'"
    note = f"Dotted: the product alone, at the cores' best rate. {figures.on(machine)}"
    shown = [(k, dtype) for k in (0, 10) for dtype in ("float32", "bfloat16")]
    with figures.drawing(path, title, note, rows=2, columns=2, height=4.6) as panels:
        for axes, (k, dtype) in zip(panels, shown, strict=True):
            rows = [r for r in results if (r["k"], r["dtype"], r["n"], r["m"]) == (k, dtype, 8192, 8192)]
            (cell,) = COMPARISON.cells(rows)
            axes.set(title=f"{f'retrieval_topk, k = {k}' if k else 'retrieval_ranks'}, {dtype}")
            figures.bars(axes, {who: COMPARISON.ratio(cell, who) for who in cell}, multiple)
            if (limit := rows[0].get("limit")) is not None:
                axes.axvline(limit / cell[COMPARISON.ours]["seconds"], color=figures.INK, linestyle=":", linewidth=1.2)
