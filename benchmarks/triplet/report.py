"""The report of triplet: forward and backward against its peers, time and memory, for each mining."""

import functools
from collections.abc import Container
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import figures, pairs
from benchmarks.harness.bench_cases import BenchCase
from benchmarks.harness.pairs import SIZE, PairsReport
from benchmarks.harness.tables import Comparison, Headline, Table, size
from benchmarks.triplet.peers import Loss, triplet_losses

PEERS = {
    "pytorch-metric-learning": "pytorch-metric-learning",
    "eager": "eager",
    "torch.compile": "`torch.compile` of it",
}
COMPARISON = Comparison(("mining", "dtype", "n"), "loss")
HEADLINES = [
    Headline(
        "triplet",
        "hardest of 8192 pairs",
        {"mining": "hardest"},
        {"mining": "hardest", "dtype": "float32", "n": 8192},
        "pytorch-metric-learning",
        "triplet.md",
    )
]
# pytorch-metric-learning lists all triplets by way of an N x N x N tensor.
LARGEST_LIST_OF_TRIPLETS = 512


def losses_for(mining: str, n: int, impl: str) -> dict[str, Loss]:
    losses = triplet_losses(mining, impl)
    if mining == "all" and n > LARGEST_LIST_OF_TRIPLETS:
        losses.pop("pytorch-metric-learning", None)
    return losses


def report_of(mining: str, n: int = 0) -> PairsReport:
    products = 3 if mining == "all" else 1
    losses = functools.partial(losses_for, mining, n)
    return PairsReport(f"Triplet loss, {mining}", lambda *_: products, losses, (), PEERS)


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


def measure(
    dtype: torch.dtype, n: int, mining: str, with_peers: bool, *, seconds: float, skip: Container[str] = ()
) -> list[dict[str, Any]]:
    rows = report_of(mining, n).measure(dtype, n, with_peers, seconds=seconds, skip=skip)
    return [{"mining": mining} | row for row in rows]


finish = pairs.finish


def bench_cases() -> list[BenchCase]:
    return [
        case._replace(cell=f"{mining} {case.cell}")
        for mining in REPORTS
        for n in (512, 2048, 8192)
        for case in report_of(mining, n).bench_cases((n,))
    ]


def of(mining: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in results if row["mining"] == mining]


def tables(results: list[dict[str, Any]]) -> dict[str, Table]:
    first = ("mining, N, dtype", lambda row: f"{row['mining']}, {size(row)}")
    return {"triplet": COMPARISON.table(results, first, PEERS, PEERS)}


def draw(results: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """How many times ours the peers take against N in float32, one panel for each mining."""
    title = f"Triplet loss, D = {SIZE}, float32, time as a multiple of mmkernels'"
    with figures.drawing(path, title, figures.on(machine), columns=3, sharey=True) as panels:
        for axes, mining in zip(panels, REPORTS, strict=True):
            chosen = [row for row in of(mining, results) if row["dtype"] == "float32"]
            axes.set(title=mining, xlabel="N pairs")
            figures.multiples(axes, COMPARISON, chosen, "n", log=True)
