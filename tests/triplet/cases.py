"""The cases that every implementation of triplet is held to, and the oracles beside it.

Features are small multiples of 1/4, so that similarities are exact in every precision: no rounding decides which
negative is the worst or whether it counts, ties are many, and what is compared is the implementation alone.
"""

import itertools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import mmkernels
from mmkernels.testing import assert_within_budget
from tests.devices import Device, on_device
from tests.sizes import edges

MININGS = ("all", "hardest", "semi_hard")


@dataclass
class Case:
    n: int
    m: int
    d: int
    options: dict[str, Any] = field(default_factory=dict)
    near: float = 1.0  # how far the positives lie above the mean negative, in standard deviations
    regime: str = "plain"

    def __str__(self) -> str:
        options = "-".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.regime}-{self.n}x{self.m}x{self.d}-{options}"

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.n)
        queries = torch.randint(-2, 3, (self.n, self.d), generator=generator) / 4
        keys = torch.randint(-2, 3, (self.m, self.d), generator=generator) / 4
        copied = torch.rand(self.n, self.d, generator=generator) < self.near / self.d**0.5
        keys[: self.n] = torch.where(copied, queries, keys[: self.n])
        return queries.to(dtype), keys.to(dtype)


SIZES = [
    Case(1, 1, 1, regime="no negatives"),
    Case(1, 3, 5, regime="negatives of the query alone"),
    *edges(Case),
    Case(200, 230, 32, near=3.0, regime="few above the positive"),
    Case(200, 230, 32, near=0.0, options={"margin": 2.0}, regime="most above the positive"),
    Case(200, 230, 32, options={"margin": 0.0}, regime="margin 0"),
    Case(200, 230, 32, options={"margin": 0.25}, regime="hinges of exactly 0"),
    Case(257, 260, 77, options={"symmetric": False}, regime="rows alone"),
]


def cases(sizes: list[Case] = SIZES) -> list[Case]:
    """Each size with each mining."""
    return [
        Case(c.n, c.m, c.d, {"mining": mining, **c.options}, c.near, c.regime)
        for c, mining in itertools.product(sizes, MININGS)
    ]


CASES = cases()
# The pass that adds up the losses of these also gives the gradients of their mean or sum.
IN_ONE_PASS = [case for case in CASES if case.options["mining"] == "all"][::3]


def run(
    queries: Tensor, keys: Tensor, impl: str, reduction: str = "none", device: Device = "cpu", **options: Any
) -> tuple[Tensor, ...]:
    """Losses and the gradients to queries and keys, under weights from 0.5 to 1.5: a scalar's is 0.5."""
    queries, keys = queries.detach().requires_grad_(), keys.detach().requires_grad_()
    losses = on_device(mmkernels.triplet, device)(queries, keys, reduction=reduction, impl=impl, **options)
    weights = torch.linspace(0.5, 1.5, losses.numel(), dtype=losses.dtype).view_as(losses)
    grads = torch.autograd.grad((losses * weights).sum(), (queries, keys))
    return losses.detach(), *grads


def check_case(
    case: Case, dtype: torch.dtype, impl: str, reduction: str = "none", device: Device = "cpu"
) -> tuple[Tensor, ...]:
    """Hold the results on that device to their budgets, and return them."""
    queries, keys = case.inputs(dtype)
    exact = run(queries.double(), keys.double(), "reference", reduction, **case.options)
    eager = run(queries, keys, "reference", reduction, **case.options)
    actual = run(queries, keys, impl, reduction, device, **case.options)
    assert_results(actual, eager, exact, queries, keys, reduction, **case.options)
    return actual


def assert_results(
    actual: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    queries: Tensor,
    keys: Tensor,
    reduction: str = "none",
    alike: float = 1.0,
    **options: Any,
) -> None:
    """Each within its budget. A gradient is a difference of two sums over negatives: their size sets the band.

    ``alike``: by how much the rounding errors of a sum exceed independent ones, where its terms are alike.
    """
    assert actual[0].dtype == torch.float32
    assert_within_budget(actual[0], eager[0], exact[0], dtype=torch.float32, name="losses")
    sizes = sizes_of_terms(queries.double(), keys.double(), reduction, **options)
    of_queries, of_keys = (alike * size for size in sizes)
    assert_within_budget(actual[1], eager[1], exact[1], dtype=queries.dtype, terms=of_queries, name="grad_queries")
    assert_within_budget(actual[2], eager[2], exact[2], dtype=queries.dtype, terms=of_keys, name="grad_keys")


def sizes_of_terms(queries: Tensor, keys: Tensor, reduction: str, **options: Any) -> tuple[float, float]:
    """The largest sum of absolute terms of a gradient to the queries and to the keys, from grad = G keys."""
    identity = torch.eye(len(keys), dtype=torch.float64)
    of_similarities = run(queries @ keys.T, identity, "reference", reduction, **options)[1].abs()
    return (of_similarities @ keys.abs()).max().item(), (of_similarities.T @ queries.abs()).max().item()


# Similarities at minus infinity, the positive's too: a row, the first row, whose first entry is no negative, a column;
# and a row beside whose negatives at minus infinity the positive is NaN.
AT_MINUS_INFINITY = ("row 3", "row 0", "column 3", "positive of NaN")


def at_minus_infinity(place: str) -> tuple[Tensor, Tensor]:
    queries, keys = Case(40, 50, 16).inputs(torch.float32)
    queries[:, 5] = keys[:, 5] = 1.0
    if place == "column 3":
        keys[3, 5] = -torch.inf
    else:
        queries[0 if place == "row 0" else 3, 5] = -torch.inf
    if place == "positive of NaN":
        keys[3, 5] = 0.0
    return queries, keys


def check_minus_infinity(place: str, impl: str, symmetric: bool, mining: str) -> None:
    """A worst negative at minus infinity costs nothing, unless the positive is no larger: then no number is right."""
    queries, keys = at_minus_infinity(place)
    actual, exact = (
        run(*(x.to(dtype) for x in (queries, keys)), name, mining=mining, symmetric=symmetric)[0]
        for dtype, name in ((torch.float32, impl), (torch.float64, "reference"))
    )
    lost = torch.zeros(40, dtype=torch.bool)
    if place == "positive of NaN" or (mining != "semi_hard" and (symmetric or place != "column 3")):
        lost[0 if place == "row 0" else 3] = True
    assert torch.equal(exact.isnan(), lost)
    assert torch.equal(actual.isnan(), lost)
    torch.testing.assert_close(actual[~lost].double(), exact[~lost], rtol=1e-6, atol=1e-6)


def check_no_negative(impl: str, symmetric: bool, mining: str) -> None:
    """Where there is no negative there is no hinge, and the loss is 0 whatever the positive."""
    keys = torch.tensor([[1.0, 0.0]])
    for positive in (-torch.inf, torch.inf, torch.nan):
        queries = torch.tensor([[positive, 1.0]])
        losses = mmkernels.triplet(queries, keys, mining=mining, symmetric=symmetric, reduction="none", impl=impl)
        assert losses.tolist() == [0.0], positive


def by_hand(queries: Tensor, keys: Tensor, margin: float, mining: str, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Losses [N] and d (their sum) / d similarities [N, M], negative by negative."""
    similarities = (queries.double() @ keys.double().T).tolist()
    n, m = len(queries), len(keys)
    share = 0.5 if symmetric else 1.0
    losses, grad = torch.zeros(n, dtype=torch.float64), torch.zeros(n, m, dtype=torch.float64)
    for i in range(n):
        positive = similarities[i][i]
        rows = [(similarities[i][j], (i, j)) for j in range(m) if j != i]
        columns = [(similarities[j][i], (j, i)) for j in range(n) if j != i]
        for negatives in (rows, columns) if symmetric else (rows,):
            if mining == "semi_hard":
                negatives = [x for x in negatives if positive - margin < x[0] < positive]
            if mining != "all":
                negatives = sorted(negatives, key=lambda x: (-x[0], x[1]))[:1]
            for negative, at in negatives:
                cost = negative - positive + margin
                if cost > 0:
                    losses[i] += share * cost
                    grad[at] += share
                    grad[i, i] -= share
    return losses, grad
