"""The report of info_nce, with matches on the diagonal and with groups: forward and backward against its peers."""

from collections.abc import Container
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import pairs
from benchmarks.harness.bench_cases import BenchCase
from benchmarks.harness.tables import Comparison, Headline, Table
from benchmarks.info_nce.peers import contrastive_losses, group_losses
from mmkernels._autograd import keeps_products

GROUP = 8  # queries, and keys, of a group


def products(queries: Tensor, keys: Tensor) -> int:
    """How many products our schedule makes: 3 where the forward pass keeps its own, else 4."""
    return 3 if keeps_products(len(queries) * len(keys), queries, keys) else 4


def groups(n: int, _: torch.dtype) -> tuple[Tensor]:
    return (torch.randperm(n, generator=torch.Generator().manual_seed(0)) // GROUP,)


EAGER = {"eager": "eager", "torch.compile": "`torch.compile` of it"}
PEERS = {
    "open_clip ClipLoss": "open_clip `ClipLoss`",
    **EAGER,
    "F.linear_cross_entropy x 2": "`F.linear_cross_entropy` x 2",
}
REPORTS = {
    "diagonal": pairs.PairsReport("Symmetric InfoNCE", products, contrastive_losses, (20.0,), PEERS),
    "groups": pairs.PairsReport("InfoNCE with groups", products, group_losses, (20.0,), EAGER, groups),
}
# (targets, dtype, N, peers too): past 8192 a peer takes many seconds and some gigabytes.
CELLS = [
    *(("diagonal", torch.float32, n, True) for n in (512, 1024, 2048, 4096, 8192)),
    *(("diagonal", torch.bfloat16, n, True) for n in (2048, 8192)),
    *(("diagonal", torch.float32, n, False) for n in (16384, 32768)),
    ("diagonal", torch.bfloat16, 65536, False),
    *(("groups", torch.float32, n, True) for n in (1024, 2048, 4096, 8192)),
    *(("groups", torch.bfloat16, n, True) for n in (2048, 8192)),
]
QUICK = [
    ("diagonal", torch.float32, 1024, True),
    ("diagonal", torch.float32, 2048, True),
    ("diagonal", torch.bfloat16, 2048, True),
    ("groups", torch.float32, 1024, True),
]

COMPARISON = Comparison(("targets", "dtype", "n"), "loss")
DIAGONAL = {"targets": "diagonal"}
SHOWN = {**DIAGONAL, "dtype": "float32", "n": 8192}
HEADLINES = [Headline("info_nce", "8192 pairs", DIAGONAL, SHOWN, "open_clip ClipLoss", "info_nce.md")]


def measure(
    targets: str, dtype: torch.dtype, n: int, with_peers: bool, *, seconds: float, skip: Container[str] = ()
) -> list[dict[str, Any]]:
    rows = REPORTS[targets].measure(dtype, n, with_peers, seconds=seconds, skip=skip)
    return [{"targets": targets} | row for row in rows]


finish = pairs.finish


def bench_cases() -> list[BenchCase]:
    return [
        case._replace(cell=f"{targets} {case.cell}")
        for targets, report in REPORTS.items()
        for case in report.bench_cases()
    ]


def of(targets: str, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in results if row["targets"] == targets]


def tables(results: list[dict[str, Any]]) -> dict[str, Table]:
    names = {"diagonal": "info_nce", "groups": "info_nce with groups"}
    return {name: REPORTS[targets].table(of(targets, results)) for targets, name in names.items()}


def draw(results: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """Time and memory with matches on the diagonal."""
    REPORTS["diagonal"].draw(of("diagonal", results), machine, path)
