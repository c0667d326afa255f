"""What a GPU's call of each loss costs the host: launches, and microseconds in a CUDA driver that does nothing.

    python -m benchmarks.gpu_host [--calls 300]

No GPU is used, and none is timed. CPU tensors stand in for a GPU's; Triton's own dispatch runs whole, and its launches
go to a stub. The eager lines run on small tensors, so that their time is torch's dispatch. A GPU's dispatch in torch
takes longer than a CPU's, so the ratio is at most what a GPU's host would see.
"""

import argparse
import collections
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.compiler.compiler import CompiledKernel

import mmkernels
from benchmarks.stub_cuda.driver import in_stub, is_stub, pretend

PAIRS, FEATURES, CLASSES = 256, 512, 4096
SMALL = 16  # pairs and features of the eager lines


def leaves(*shapes: tuple[int, int]) -> list[Tensor]:
    return [torch.zeros(shape, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


def calls() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    """Forward and backward of each loss: by the op, and by the eager lines."""
    scale, bias = torch.tensor(20.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True)

    def of(loss: Callable[..., Tensor], inputs: list[Tensor], *numbers: Tensor, **options: Any) -> Callable[[], Any]:
        return lambda: torch.autograd.grad(loss(*inputs, *numbers, **options), [*inputs, *numbers])

    pairs, small = leaves(*[(PAIRS, FEATURES)] * 2), leaves(*[(SMALL, SMALL)] * 2)
    labels = torch.arange(SMALL)
    signs = 2 * torch.eye(SMALL) - 1

    def info_nce(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        logits = (scale * (queries @ keys.T)).float()
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2

    def siglip(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return -F.logsigmoid(signs * (scale * (queries @ keys.T) + bias).float()).sum() / SMALL

    def triplet(queries: Tensor, keys: Tensor) -> Tensor:
        scores = (queries @ keys.T).float()
        positives = scores.diagonal()
        hinges = (scores - positives[:, None] + 0.2).clamp(min=0) + (scores - positives + 0.2).clamp(min=0)
        return hinges.fill_diagonal_(0).sum() / (2 * SMALL)

    def linear_cross_entropy(hidden: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy((hidden @ weight.T).float(), labels)

    triton = {"impl": "triton"}
    layer, targets = leaves((PAIRS, FEATURES), (CLASSES, FEATURES)), torch.zeros(PAIRS, dtype=torch.int64)
    return {
        "info_nce": (of(mmkernels.info_nce, pairs, scale, **triton), of(info_nce, small, scale)),
        "siglip": (of(mmkernels.siglip, pairs, scale, bias, **triton), of(siglip, small, scale, bias)),
        "triplet": (of(mmkernels.triplet, pairs, mining="all", **triton), of(triplet, small)),
        "linear_cross_entropy": (
            of(mmkernels.linear_cross_entropy, layer, targets=targets, **triton),
            of(linear_cross_entropy, small),
        ),
    }


def microseconds(call: Callable[[], Any], count: int) -> tuple[float, float]:
    """The tenth percentile and the median of a call's time."""
    taken = []
    for _ in range(count):
        start = time.thread_time_ns()
        call()
        taken.append((time.thread_time_ns() - start) / 1e3)
    taken.sort()
    return taken[count // 10], taken[count // 2]


def launches(call: Callable[[], Any]) -> dict[str, int]:
    """How often a call launches each Triton kernel."""
    counts: collections.Counter[str] = collections.Counter()

    def count(kernel: Any, *_: Any) -> None:
        counts[kernel.name.removesuffix("_kernel")] += 1

    plain = CompiledKernel.launch_metadata
    CompiledKernel.launch_metadata = count
    try:
        call()
    finally:
        CompiledKernel.launch_metadata = plain
    return dict(counts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--calls", type=int, default=300, help="timed, by turns (%(default)s)")
    count = parser.parse_args().calls
    if not is_stub():
        raise SystemExit(in_stub("benchmarks.gpu_host", sys.argv[1:]))
    pretend()
    of_ops = calls()
    for ours, eager in of_ops.values():  # compiles
        for _ in range(3):
            ours(), eager()
    print(f"Host time of forward and backward in us, tenth percentile / median; {PAIRS} pairs; no GPU")
    for name, (ours, eager) in of_ops.items():
        (low, median), (eager_low, eager_median) = microseconds(ours, count), microseconds(eager, count)
        print(
            f"{name:22s} {low:6.0f} / {median:6.0f}   eager {eager_low:6.0f} / {eager_median:6.0f}"
            f"   {median / eager_median:.2f}x   {sum(launches(ours).values())} launches"
        )


if __name__ == "__main__":
    main()
