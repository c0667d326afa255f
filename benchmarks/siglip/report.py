"""The report of siglip: forward and backward against its peers, time and memory."""

from typing import Any

import torch

from benchmarks.harness import pairs
from benchmarks.harness.tables import Headline, Table
from benchmarks.siglip.peers import sigmoid_losses

PEERS = {
    "open_clip SigLipLoss": "open_clip `SigLipLoss`",
    "eager": "eager",
    "torch.compile": "`torch.compile` of it",
}
REPORT = pairs.PairsReport("Sigmoid loss (SigLIP)", lambda *_: 3, sigmoid_losses, (10.0, -10.0), PEERS)
# (dtype, N, peers too): past 8192 a peer takes many seconds and some gigabytes.
CELLS = [
    *((torch.float32, n, True) for n in (512, 1024, 2048, 4096, 8192)),
    *((torch.bfloat16, n, True) for n in (2048, 8192)),
    (torch.bfloat16, 65536, False),
]
QUICK = [(torch.float32, 1024, True), (torch.float32, 2048, True), (torch.bfloat16, 2048, True)]

COMPARISON = pairs.COMPARISON
SHOWN = {"dtype": "float32", "n": 8192}
HEADLINES = [Headline("siglip", "8192 pairs", {}, SHOWN, "open_clip SigLipLoss", "siglip.md")]

measure, finish, draw, bench_cases = REPORT.measure, pairs.finish, REPORT.draw, REPORT.bench_cases


def tables(results: list[dict[str, Any]]) -> dict[str, Table]:
    return {"siglip": REPORT.table(results)}
