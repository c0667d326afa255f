"""The report of siglip: forward and backward against its peers, time and memory."""

import torch

from benchmarks.harness.pairs import PairsReport
from benchmarks.siglip.peers import sigmoid_losses

REPORT = PairsReport("Sigmoid loss (SigLIP)", lambda *_: 3, sigmoid_losses, (10.0, -10.0))
# (dtype, N, peers too): past 8192 a peer takes many seconds and some gigabytes.
CELLS = [
    *((torch.float32, n, True) for n in (512, 1024, 2048, 4096, 8192)),
    *((torch.bfloat16, n, True) for n in (2048, 8192)),
    (torch.bfloat16, 65536, False),
]
QUICK = [(torch.float32, 1024, True), (torch.float32, 2048, True), (torch.bfloat16, 2048, True)]

measure, finish, table_of, draw = REPORT.measure, REPORT.finish, REPORT.table_of, REPORT.draw
