"""The report of info_nce: forward and backward against its peers, time and memory."""

from typing import Any

import torch

from benchmarks.harness import pairs
from benchmarks.harness.tables import Headline, Table
from benchmarks.info_nce.peers import contrastive_losses
from mmkernels._autograd import keeps_products


def products(queries: torch.Tensor, keys: torch.Tensor) -> int:
    """How many products our schedule makes: 3 where the forward pass keeps its own, else 4."""
    return 3 if keeps_products(len(queries) * len(keys), queries, keys) else 4


PEERS = {
    "open_clip ClipLoss": "open_clip `ClipLoss`",
    "eager": "eager",
    "torch.compile": "`torch.compile` of it",
    "F.linear_cross_entropy x 2": "`F.linear_cross_entropy` x 2",
}
REPORT = pairs.PairsReport("Symmetric InfoNCE", products, contrastive_losses, (20.0,), PEERS)
# (dtype, N, peers too): past 8192 a peer takes many seconds and some gigabytes.
CELLS = [
    *((torch.float32, n, True) for n in (512, 1024, 2048, 4096, 8192)),
    *((torch.bfloat16, n, True) for n in (2048, 8192)),
    *((torch.float32, n, False) for n in (16384, 32768)),
    (torch.bfloat16, 65536, False),
]
QUICK = [(torch.float32, 1024, True), (torch.float32, 2048, True), (torch.bfloat16, 2048, True)]

COMPARISON = pairs.COMPARISON
SHOWN = {"dtype": "float32", "n": 8192}
HEADLINES = [Headline("info_nce", "8192 pairs", {}, SHOWN, "open_clip ClipLoss", "info_nce.md")]

measure, finish, draw, bench_cases = REPORT.measure, pairs.finish, REPORT.draw, REPORT.bench_cases


def tables(results: list[dict[str, Any]]) -> dict[str, Table]:
    return {"info_nce": REPORT.table(results)}
