"""The report of info_nce's soft targets, groups and a teacher: forward and backward against peers, time and memory."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.distillation.peers import distillation_losses, group_losses
from benchmarks.harness import figures, pairs
from benchmarks.harness.bench_cases import DTYPES, BenchCase, both_passes
from benchmarks.harness.cpu_runs import measured
from benchmarks.harness.tables import Comparison, Headline, Table, name_of, size
from mmkernels._autograd import keeps_products
from mmkernels.testing import features

SIZE = 512  # features of student and teacher
GROUP = 8  # queries, and keys, of a group
NAMES = {"teacher": "distillation: a teacher's softmaxes", "groups": "info_nce with groups of 8"}
# (targets, dtype, N, peers too)
CELLS = [
    *((targets, torch.float32, n, True) for targets in ("groups", "teacher") for n in (1024, 2048, 4096, 8192)),
    *((targets, torch.bfloat16, n, True) for targets in ("groups", "teacher") for n in (2048, 8192)),
    ("teacher", torch.bfloat16, 65536, False),
]
COMPARISON = Comparison(("targets", "dtype", "n"), "loss")
WITH_CLIP = Comparison(COMPARISON.cell, "loss", "mmkernels DistillClipLoss")
HEADLINES = [
    Headline(
        "distillation",
        "8192 pairs",
        {"targets": "teacher"},
        {"targets": "teacher", "dtype": "float32", "n": 8192},
        "eager",
        "distillation.md",
    )
]
QUICK = [("groups", torch.float32, 1024, True), ("teacher", torch.float32, 1024, True)]


def products(targets: str, queries: Tensor, keys: Tensor) -> int:
    """How many products our schedule makes: the backward pass repeats the forward's unless they are kept."""
    made = 1 if targets == "groups" else 2
    return made + 2 if keeps_products(made * len(queries) * len(keys), queries, keys) else 2 * made + 2


def student(n: int, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and scale, with gradients."""
    rows = [features(n, SIZE, dtype, seed=seed).requires_grad_() for seed in (1, 2)]
    return [*rows, torch.tensor(20.0, requires_grad=True)]


def teacher_of(n: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return features(n, SIZE, dtype, seed=3), features(n, SIZE, dtype, seed=4), torch.tensor(50.0)


def measure(targets: str, dtype: torch.dtype, n: int, with_peers: bool, *, seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of every loss at one size: median seconds, and bytes beyond inputs and gradients."""
    leaves = student(n, dtype)
    losses: dict[str, Callable[..., Tensor]]
    if targets == "groups":
        given: tuple[Tensor, ...] = (torch.randperm(n, generator=torch.Generator().manual_seed(0)) // GROUP,)
        losses = dict(group_losses("cpu"))
    else:
        given = teacher_of(n, dtype)
        losses = dict(distillation_losses("cpu"))
    if not with_peers:
        losses = {name: loss for name, loss in losses.items() if name.startswith("mmkernels")}
    gradients = sum(leaf.nbytes for leaf in leaves)
    steps = {
        name: lambda loss=loss: torch.autograd.grad(loss(*leaves, *given), leaves) for name, loss in losses.items()
    }
    cell = {"targets": targets, "dtype": name_of(dtype), "n": n, "products": products(targets, *leaves[:2])}
    rows = measured(steps, "loss", dtype, seconds=seconds, least=pairs.least_rounds(n), given=gradients)
    return [cell | row for row in rows]


finish = pairs.finish


def bench_cases() -> list[BenchCase]:
    def make(loss: Callable[..., Tensor], n: int, dtype: torch.dtype) -> Callable[[], Any]:
        return both_passes(loss, student(n, dtype), *teacher_of(n, dtype))

    return [
        BenchCase(f"{n} {name_of(dtype)}", who, functools.partial(make, loss, n, dtype))
        for n in (512, 2048, 8192)
        for dtype in DTYPES
        for who, loss in distillation_losses().items()
    ]


def tables(results: list[dict[str, Any]]) -> dict[str, Table]:
    peers = {"eager": "eager", "torch.compile": "`torch.compile` of it"}
    clip = {"open_clip DistillClipLoss": "open_clip `DistillClipLoss`"}

    def with_targets(targets: str) -> Table:
        chosen = [row for row in results if row["targets"] == targets and "Distill" not in row["loss"]]
        return COMPARISON.table(chosen, ("N, dtype", size), peers, peers)

    of_clip = [row for row in results if "Distill" in row["loss"]]
    return {
        "info_nce with groups": with_targets("groups"),
        "distillation": with_targets("teacher"),
        "DistillClipLoss": WITH_CLIP.table(of_clip, ("N, dtype", size), clip, clip),
    }


def draw(results: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """How many times ours the peers take against N, float32, a panel for each kind of target."""
    title = f"Distillation and groups, D = {SIZE}, float32, time as a multiple of mmkernels'"
    with figures.drawing(path, title, figures.on(machine), columns=2, sharey=True) as panels:
        for axes, targets in zip(panels, ("teacher", "groups"), strict=True):
            chosen = [row for row in results if row["dtype"] == "float32" and row["targets"] == targets]
            axes.set(title=NAMES[targets], xlabel="N pairs")
            figures.multiples(axes, COMPARISON, chosen, "n")
