"""The report of distillation: forward and backward against its peers, time and memory."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.distillation.peers import distillation_losses
from benchmarks.harness import pairs
from benchmarks.harness.tables import Comparison, Headline, Table, size
from mmkernels._autograd import keeps_products
from mmkernels.testing import features


def products(queries: Tensor, keys: Tensor) -> int:
    """How many products our schedule makes: 4 where the forward pass keeps both of its own, else 6."""
    return 4 if keeps_products(2 * len(queries) * len(keys), queries, keys) else 6


def teacher(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as wide as the student's, and the scale."""
    return features(n, pairs.SIZE, dtype, seed=3), features(n, pairs.SIZE, dtype, seed=4), torch.tensor(50.0)


PEERS = {"eager": "eager", "torch.compile": "`torch.compile` of it"}
CLIP = {"open_clip DistillClipLoss": "open_clip `DistillClipLoss`"}
REPORT = pairs.PairsReport("Distillation", products, distillation_losses, (20.0,), PEERS, teacher)
# (dtype, N, peers too): past 8192 a peer takes many seconds and some gigabytes.
CELLS = [
    *((torch.float32, n, True) for n in (1024, 2048, 4096, 8192)),
    *((torch.bfloat16, n, True) for n in (2048, 8192)),
    (torch.bfloat16, 65536, False),
]
QUICK = [(torch.float32, 1024, True)]

COMPARISON = pairs.COMPARISON
WITH_CLIP = Comparison(COMPARISON.cell, COMPARISON.who, "mmkernels DistillClipLoss")
SHOWN = {"dtype": "float32", "n": 8192}
HEADLINES = [Headline("distillation", "8192 pairs", {}, SHOWN, "eager", "distillation.md")]

measure, finish, bench_cases = REPORT.measure, pairs.finish, REPORT.bench_cases


def tables(results: list[dict[str, Any]]) -> dict[str, Table]:
    with_clip = [row for row in results if "Distill" in row["loss"]]
    alone = [row for row in results if "Distill" not in row["loss"]]
    return {
        "distillation": REPORT.table(alone),
        "DistillClipLoss": WITH_CLIP.table(with_clip, ("N, dtype", size), CLIP, CLIP),
    }


def draw(results: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """Time and memory; our DistillClipLoss takes those of distillation."""
    REPORT.draw([row for row in results if row["loss"] != WITH_CLIP.ours], machine, path)
