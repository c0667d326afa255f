"""The cases that every implementation of distillation is held to, and the two oracles beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmkernels.distillation.api import distillation_losses
from mmkernels.testing import EXP2_ERROR, assert_within_budget, features
from tests.devices import Device, on_device
from tests.sums import sums_as_in


@dataclass
class Case:
    n: int
    m: int
    d: int
    teacher_d: int
    scale: float = 10.0
    teacher_scale: float = 20.0
    symmetric: bool = True
    near: float = 0.3  # mean cosine of a query and its key
    teacher_near: float = 0.5
    regime: str = ""

    def __str__(self) -> str:
        return f"{self.regime}-{self.n}x{self.m}x{self.d}x{self.teacher_d}"

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """Queries, keys, the teacher's queries and keys."""
        queries, teacher_queries = (
            features(self.n, size, dtype, seed=self.n + size) for size in (self.d, self.teacher_d)
        )
        keys = features(self.m, self.d, dtype, seed=self.m + 1, like=queries, mean_cosine=self.near)
        teacher_keys = features(
            self.m, self.teacher_d, dtype, seed=self.m + 2, like=teacher_queries, mean_cosine=self.teacher_near
        )
        return queries, keys, teacher_queries, teacher_keys


TILE = 256  # the largest tile of the CPU kernels; 64 is the smallest panel
CASES = [
    Case(1, 1, 1, 1, regime="one of each"),
    Case(2, 2, 3, 5, regime="less than a vector"),
    Case(65, 65, 65, 33, regime="panel + 1, odd sizes"),
    Case(TILE, TILE, 96, 96, regime="tile"),
    Case(TILE + 1, TILE + 1, 100, 48, regime="tile + 1"),
    Case(300, 700, 64, 96, symmetric=False, regime="rows alone, more keys"),
    Case(700, 300, 64, 40, symmetric=False, regime="rows alone, more queries"),
    Case(70, 70, 64, 2048, regime="wide teacher, lowest panel"),
    Case(130, 130, 1024, 513, regime="rows of 4 KiB are packed"),
    Case(257, 257, 64, 64, scale=100.0, teacher_scale=100.0, near=0.95, teacher_near=0.95, regime="losses near zero"),
    Case(257, 257, 64, 64, scale=100.0, teacher_scale=100.0, near=-0.2, regime="far from the teacher"),
    Case(257, 257, 64, 64, scale=0.0, regime="scale 0"),
    Case(65, 65, 64, 64, teacher_scale=0.0, regime="uniform teacher"),
    Case(65, 65, 64, 64, scale=-5.0, teacher_scale=-5.0, regime="negative scales"),
]


def run(
    inputs: tuple[Tensor, ...],
    scale: float,
    teacher_scale: float,
    symmetric: bool,
    impl: str,
    device: Device = "cpu",
) -> list[Tensor]:
    """Both losses and the gradients to queries, keys and scale, under weights that differ from row to row."""
    queries, keys = (x.detach().requires_grad_() for x in inputs[:2])
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    logit_scale = torch.tensor(scale, dtype=dtype, requires_grad=True)
    if impl == "eager":
        losses = eager(queries, keys, logit_scale, *inputs[2:], teacher_scale, symmetric)
    else:
        fused = on_device(distillation_losses, device)
        losses = fused(queries, keys, logit_scale, *inputs[2:], teacher_scale, symmetric, impl)
    return [*(x.detach() for x in losses), *gradients(losses, (queries, keys, logit_scale))]


def gradients(losses: tuple[Tensor, Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    distilled, matched = losses
    weights = torch.linspace(0.5, 1.5, len(distilled), dtype=distilled.dtype)
    # Rows past the last key have no key of their number.
    total = (distilled * weights).sum() + (matched * weights.flip(0))[~matched.isnan()].sum()
    return torch.autograd.grad(total, leaves)


def eager(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    teacher_scale: float,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """The lines that the call replaces, in the precision of the features: open_clip's, one loss a query."""
    logits = scale.to(queries.dtype) * queries @ keys.T
    teacher = teacher_scale * teacher_queries @ teacher_keys.T

    def losses(logits: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        log_p = logits.log_softmax(1)
        matched = torch.full((len(logits),), torch.nan, dtype=torch.float64 if log_p.dtype == torch.float64 else None)
        matched = torch.cat([-log_p.diagonal().to(matched.dtype), matched[min(logits.shape) :]])
        return -(teacher.softmax(1) * log_p).sum(1).to(matched.dtype), matched

    rows = losses(logits, teacher)
    if not symmetric:
        return rows
    columns = losses(logits.T, teacher.T)
    return (rows[0] + columns[0]) / 2, (rows[1] + columns[1]) / 2


def check_case(case: Case, dtype: torch.dtype, impl: str, device: Device = "cpu") -> list[Tensor]:
    """Hold the results on that device to their budgets, and return them."""
    inputs, options = case.inputs(dtype), (case.scale, case.teacher_scale, case.symmetric)
    exact = run(tuple(x.double() for x in inputs), *options, "reference")
    with sums_as_in(impl):
        eager = run(inputs, *options, "eager")
    actual = run(inputs, *options, impl, device)
    assert_results(actual, eager, exact, inputs, case.scale)
    return actual


def assert_results(
    actual: list[Tensor],
    eager: list[Tensor],
    exact: list[Tensor],
    inputs: tuple[Tensor, ...],
    scale: float,
    terms: Sequence[float] | None = None,
) -> None:
    """Each within its budget. A gradient is a difference of probabilities times features: its terms set the band.

    ``terms`` are their sizes where those of unit features, each with one match, do not hold.
    """
    queries, keys = inputs[:2]
    largest = [x.double().abs().max().item() for x in (queries, keys)]
    all_rows = len(queries) ** 0.5 * largest[0] * largest[1]
    # The weights of a row's softmaxes and of its match add up to 2.
    terms = terms or [0.0, 0.0, 2 * abs(scale) * largest[1], 2 * abs(scale) * largest[0], 2 * all_rows]
    # What a GPU's exponentials may be off: of both softmaxes one in the sum and one beside it.
    longest = [x.double().norm(dim=1).max().item() for x in (queries, keys)]
    arithmetic = [2 * 2 * EXP2_ERROR * term for term in (*terms[:4], 2 * len(queries) ** 0.5 * longest[0] * longest[1])]
    names = ("distilled", "matched", "grad_queries", "grad_keys", "grad_scale")
    for name, a, b, c, term, more in zip(names, actual, eager, exact, terms, arithmetic, strict=True):
        there = ~c.isnan()
        assert torch.equal(there, ~a.isnan()), name
        assert_within_budget(a[there], b[there], c[there], dtype=queries.dtype, terms=term, arithmetic=more, name=name)
