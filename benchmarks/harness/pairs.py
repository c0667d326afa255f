"""The reports of losses over all pairs of N queries and N keys: forward and backward against peers, time and memory."""

from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import figures
from benchmarks.harness.bench_cases import DTYPES, BenchCase, both_passes
from benchmarks.harness.cpu_runs import add_limits, measured
from benchmarks.harness.tables import Comparison, Table, name_of, size
from mmkernels.testing import features

SIZE = 512  # features
COMPARISON = Comparison(("dtype", "n"), "loss")


def least_rounds(n: int) -> int:
    """Past 8192 pairs a peer takes many seconds."""
    return 1 if n > 8192 else 3 if n == 8192 else 5


def finish(results: list[dict[str, Any]]) -> None:
    """The limit of a row: the products of our schedule."""
    add_limits(results, lambda row: row["products"] * 2 * row["n"] ** 2 * SIZE)


class PairsReport(NamedTuple):
    title: str
    products: Callable[[Tensor, Tensor], int]  # how many of 2 N^2 D FLOP both passes take
    losses: Callable[[str], dict[str, Callable[..., Tensor]]]  # of an implementation: ours first, then its peers
    numbers: tuple[float, ...]  # what the losses take beside the features: the scale and what follows
    peers: Mapping[str, str]  # {peer: head of its column}
    given: Callable[[int, torch.dtype], tuple[Tensor, ...]] = lambda n, dtype: ()  # further arguments, no gradients

    def leaves(self, n: int, dtype: torch.dtype) -> list[Tensor]:
        rows = [features(n, SIZE, dtype, seed=seed).requires_grad_() for seed in (1, 2)]
        return rows + [torch.tensor(number, requires_grad=True) for number in self.numbers]

    def measure(
        self, dtype: torch.dtype, n: int, with_peers: bool, *, seconds: float, skip: Container[str] = ()
    ) -> list[dict[str, Any]]:
        """Forward and backward of every loss at one size: median seconds, and bytes beyond inputs and gradients."""
        losses = self.losses("cpu")
        if not with_peers:
            losses = {name: loss for name, loss in losses.items() if name.startswith("mmkernels")}
        leaves, given = self.leaves(n, dtype), self.given(n, dtype)
        gradients = sum(leaf.nbytes for leaf in leaves)
        steps = {name: both_passes(loss, leaves, *given) for name, loss in losses.items()}
        cell = {"dtype": name_of(dtype), "n": n, "products": self.products(*leaves[:2])}
        rows = measured(steps, "loss", dtype, seconds=seconds, skip=skip, least=least_rounds(n), given=gradients)
        return [cell | row for row in rows]

    def bench_cases(self, sizes: Sequence[int] = (512, 2048, 8192)) -> list[BenchCase]:
        """Both passes of every loss at every size."""
        return [
            BenchCase(
                f"{n} {name_of(dtype)}",
                who,
                lambda loss=loss, n=n, dtype=dtype: both_passes(loss, self.leaves(n, dtype), *self.given(n, dtype)),  # type: ignore[misc]
            )
            for n in sizes
            for dtype in DTYPES
            for who, loss in self.losses("auto").items()
        ]

    def table(self, results: list[dict[str, Any]]) -> Table:
        return COMPARISON.table(results, ("N, dtype", size), self.peers, self.peers)

    def draw(self, results: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
        """How many times ours the peers take, and the memory, against N, float32."""
        chosen = [row for row in results if row["dtype"] == "float32"]
        title = f"{self.title}, D = {SIZE}, float32, forward and backward"
        with figures.drawing(path, title, figures.on(machine), columns=2) as (left, right):
            left.set(title="Time, as a multiple of mmkernels'", xlabel="N pairs")
            figures.multiples(left, COMPARISON, chosen, "n")
            right.set(title="MiB beyond inputs and gradients", xlabel="N pairs")
            figures.memory(right, COMPARISON, chosen, "n")
