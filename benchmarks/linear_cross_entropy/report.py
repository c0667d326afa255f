"""The report of linear_cross_entropy: forward and backward against its peers, time and memory."""

import functools
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import figures
from benchmarks.harness.bench_cases import DTYPES, BenchCase, both_passes
from benchmarks.harness.cpu_runs import add_limits, measured
from benchmarks.harness.tables import Comparison, Headline, Table, name_of
from benchmarks.linear_cross_entropy.peers import classification_losses
from mmkernels.linear_cross_entropy.ops import _keeps_products

SIZE = 512  # features
# (dtype, rows, classes): the vocabularies of COCO captions and of GPT-2.
CELLS = [
    (torch.float32, 512, 9488),
    *((dtype, n, 50257) for dtype in (torch.float32, torch.bfloat16) for n in (512, 2048, 8192)),
]
COMPARISON = Comparison(("dtype", "n", "v"), "loss")
SHOWN = {"dtype": "float32", "n": 8192, "v": 50257}
HEADLINES = [
    Headline("linear_cross_entropy", "8192 rows x 50257 classes", {}, SHOWN, "eager", "linear_cross_entropy.md")
]
QUICK = [(torch.float32, 512, 9488), (torch.bfloat16, 512, 9488)]


def inputs(dtype: torch.dtype, n: int, v: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden rows and weight, with gradients, and targets; logits of a deviation of 1."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, SIZE, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(v, SIZE, generator=generator) * SIZE**-0.5).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(v, (n,), generator=generator)


def measure(dtype: torch.dtype, n: int, v: int, *, seconds: float, skip: Container[str] = ()) -> list[dict[str, Any]]:
    """Forward and backward of every loss at one size: median seconds, and bytes beyond inputs and gradients."""
    hidden, weight, targets = inputs(dtype, n, v)
    gradients = hidden.nbytes + weight.nbytes
    steps = {
        name: lambda loss=loss: torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight))
        for name, loss in classification_losses("cpu").items()
    }
    cell = {"dtype": name_of(dtype), "n": n, "v": v, "products": 3 if _keeps_products(hidden, weight, None) else 4}
    rows = measured(steps, "loss", dtype, seconds=seconds, skip=skip, least=2 if n * v > 10**8 else 5, given=gradients)
    return [cell | row for row in rows]


def finish(results: list[dict[str, Any]]) -> None:
    """The limit of a row: the products of our schedule."""
    add_limits(results, lambda row: row["products"] * 2 * row["n"] * row["v"] * SIZE)


def bench_cases() -> list[BenchCase]:
    def make(loss: Callable[..., torch.Tensor], *cell: Any) -> Callable[[], Any]:
        hidden, weight, targets = inputs(*cell)
        return both_passes(loss, (hidden, weight), targets)

    return [
        BenchCase(f"{n} x {v} {name_of(dtype)}", who, functools.partial(make, loss, dtype, n, v), rounds=3)
        for n, v in ((512, 9488), (2048, 50257), (8192, 50257))
        for dtype in DTYPES
        for who, loss in classification_losses().items()
    ]


def tables(results: list[dict[str, Any]]) -> dict[str, Table]:
    peers = {
        "eager": "eager",
        "torch.compile": "`torch.compile` of it",
        "F.linear_cross_entropy": "`F.linear_cross_entropy`, chunked",
    }
    first = ("N x V, dtype", lambda row: f"{row['n']} x {row['v']} {row['dtype']}")
    return {"linear_cross_entropy": COMPARISON.table(results, first, peers, peers)}


def draw(results: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """How many times ours the peers take, and the memory, against N, float32, the larger vocabulary."""
    classes = max(row["v"] for row in results)
    chosen = [row for row in results if row["dtype"] == "float32" and row["v"] == classes]
    title = f"Linear cross-entropy, V = {classes}, D = {SIZE}, float32, forward and backward"
    with figures.drawing(path, title, figures.on(machine), columns=2) as (left, right):
        left.set(title="Time, as a multiple of mmkernels'", xlabel="N rows")
        figures.multiples(left, COMPARISON, chosen, "n")
        right.set(title="MiB beyond inputs and gradients", xlabel="N rows")
        figures.memory(right, COMPARISON, chosen, "n")
