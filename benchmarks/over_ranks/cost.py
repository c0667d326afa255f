"""The cost of info_nce over ranks: time of forward and backward, and memory, from the schedule that the package runs.

n rows on each of W = outer x inner ranks, D features of e bytes. A product of all queries of a rank with a block of m
keys makes 2 n m D FLOP; forward takes one, backward three (the logits anew, and the gradients of both sides).
"""

from collections.abc import Callable
from typing import NamedTuple


class Cluster(NamedTuple):
    """Rates of one GPU and of what connects them; nothing of this was measured."""

    flops: float  # FLOP/s that the kernels make
    node: int  # GPUs that NVLink connects
    nvlink: float  # bytes/s of a GPU, one way
    nic: float  # bytes/s of a GPU's own network card, one way
    visit: float  # s that each block takes beside its products: launches, and the start of what travels
    collective: float  # s that a gather or an exchange takes beside its bytes, for each node that it spans


# H100 SXM: NVLink 4 and a card of 400 Gbit/s for each GPU, by their datasheets. The issue model predicts 415 to 583
# TFLOP/s for the kernels of info_nce on blocks of 32,768 rows (docs/gpu_predictions.md); 400 is for smaller ones.
# 60 us is some 24 launches of 2.5 us; it and the 20 us are assumptions.
H100 = Cluster(flops=400e12, node=8, nvlink=450e9, nic=50e9, visit=60e-6, collective=20e-6)


class Pass(NamedTuple):
    """What forward or backward multiplies and moves."""

    products: int
    block: Callable[[int, int], float]  # bytes of a key that travels, by D and e
    parts: Callable[[int], float]  # bytes of what others made of it, on its way home


# Forward: keys; the log-sum-exp of their columns in float64. Backward: keys, two parts of a log-sum-exp and a weight;
# their gradients in float32.
PASSES = (Pass(1, lambda d, e: d * e, lambda d: 8), Pass(3, lambda d, e: d * e + 12, lambda d: 4 * d))


class Time(NamedTuple):
    """Seconds of forward and backward on each rank: their sum, and the products alone."""

    total: float
    products: float
    exposed: float  # of what travels, and is not hidden behind products


def time_of(n: int, d: int, outer: int, inner: int, cluster: Cluster = H100, e: int = 2) -> Time:
    """The schedule of mmkernels/distributed/tour.py.

    Of the outer ring a block and the parts of an earlier one are on their way while a product is made; the inner circle
    joins its blocks before it, and brings the parts home behind it, with nothing beside.
    """
    nodes = max(1, inner // cluster.node)
    # A ring of gathers crosses each link of two nodes once for all GPUs of a node, and uses all their cards.
    gather_rate = cluster.nvlink if nodes == 1 else min(cluster.nvlink, cluster.node * cluster.nic)
    outer_rate = cluster.nvlink if outer * inner <= cluster.node else cluster.nic
    total = products = 0.0
    for of_pass in PASSES:
        product = of_pass.products * 2 * n * n * inner * d / cluster.flops
        block, parts = n * of_pass.block(d, e), n * of_pass.parts(d)
        outside = (block + parts) / outer_rate if outer > 1 else 0.0
        inside = 0.0
        if inner > 1:
            near = (min(inner, cluster.node) - 1) * parts / cluster.nvlink
            far = max(0, inner - cluster.node) * parts / cluster.nic  # to each its own: through one's own card
            inside = (inner - 1) * block / gather_rate + max(near, far) + 2 * nodes * cluster.collective
        total += outer * (max(product, outside) + inside + cluster.visit)
        products += outer * product
    return Time(total, products, total - products - 2 * outer * cluster.visit)


def hiding_rows(rate: float, cluster: Cluster = H100, e: int = 2) -> float:
    """The rows of a rank from which on a flat ring's transfers are hidden, in both passes: D cancels but for 12 bytes.

    From 2 products n^2 D / flops = bytes n D / rate.
    """
    per_element = [(of_pass.block(512, e) + of_pass.parts(512)) / 512 for of_pass in PASSES]
    found = (
        of_element * cluster.flops / (2 * of_pass.products * rate)
        for of_pass, of_element in zip(PASSES, per_element, strict=True)
    )
    return max(found)


MATRICES = {"CLIP": 3.9, "open_clip": 4.2}  # n x N in float32 that are held at once


def memory_of(n: int, d: int, outer: int, inner: int, e: int = 2) -> float:
    """Bytes of a rank beyond features and their gradients at the worst moment, which backward has.

    Matrices [n, d], as many as measured in float32 (docs/distributed_cost.md); which of them have the dtype of the
    features is read in the code. The kernel's own workspace, which does not grow with the rows, is not in it.
    """
    in_float32, in_dtype = 2.0, 0.0  # the gradient of the queries, and what a block adds to it
    if outer > 1:
        # One's own part of the first step, a part that comes and one that goes, their sum; the next block.
        in_float32, in_dtype = in_float32 + (4 if outer == 2 else 7), 1.0 if outer == 2 else 2.0
    if inner > 1:
        # The circle's keys while they are joined; the parts of them all, as they were made and as they arrive.
        in_float32, in_dtype = in_float32 + 3.0 * inner, in_dtype + 1.5 * inner
    return n * d * (4 * in_float32 + e * in_dtype)


def matrices_of(who: str, n: int, world: int) -> float:
    """Bytes of a loss that keeps matrices of logits: n x N of open_clip (local loss), N x N of CLIP."""
    rows = n * world if who == "CLIP" else n
    return MATRICES[who] * 4.0 * rows * n * world
