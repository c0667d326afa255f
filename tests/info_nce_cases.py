"""The cases that every implementation of info_nce is held to, and the two oracles beside it."""

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from mmkernels.testing import assert_within_budget, features


@dataclass
class Case:
    n: int
    m: int
    d: int
    scale: float = 10.0
    options: dict[str, Any] = field(default_factory=dict)
    near: float = 0.3  # mean cosine of a query and its key
    regime: str = ""

    def __str__(self) -> str:
        options = "-".join(f"{k}={v if not isinstance(v, Tensor) else 'given'}" for k, v in self.options.items())
        return f"{self.regime or 'plain'}-{self.n}x{self.m}x{self.d}-{options}"

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        queries = features(self.n, self.d, dtype, seed=self.n)
        keys = features(self.m, self.d, dtype, seed=self.m + 1, like=queries, mean_cosine=self.near)
        return queries, keys


def repeated_targets(n: int, m: int) -> Tensor:
    return (torch.arange(n) * 7 // 3) % m


TILE = 256  # the largest tile of the CPU kernels; 64 is the smallest panel
CASES = [
    Case(1, 1, 1, regime="one of each"),
    Case(2, 3, 3, regime="less than a vector"),
    Case(63, 63, 64, regime="panel - 1"),
    Case(64, 64, 64, regime="panel"),
    Case(65, 65, 65, regime="panel + 1, odd D"),
    Case(TILE - 1, TILE - 1, 96, regime="tile - 1"),
    Case(TILE, TILE, 96, regime="tile"),
    Case(TILE + 1, TILE + 1, 100, regime="tile + 1"),
    Case(300, 700, 130, regime="more keys than queries"),
    Case(700, 300, 48, options={"targets": repeated_targets(700, 300)}, regime="more queries than keys"),
    Case(130, 130, 513, regime="D past one L1 block"),
    Case(70, 90, 2048, regime="widest D, lowest panel"),
    Case(300, 320, 1024, regime="rows of 4 KiB are packed"),
    Case(257, 260, 77, options={"label_smoothing": 0.1}, regime="smoothing"),
    Case(257, 260, 77, options={"label_smoothing": 1.0}, regime="smoothing alone"),
    Case(257, 260, 77, options={"symmetric": False}, regime="rows alone"),
    Case(90, 300, 77, options={"symmetric": False, "label_smoothing": 0.2}, regime="rows alone, smoothing"),
    Case(200, 300, 64, options={"targets": repeated_targets(200, 300), "label_smoothing": 0.1}, regime="targets"),
    Case(257, 257, 64, scale=100.0, near=-0.2, regime="temperature 0.01, negative mean cosine"),
    Case(257, 257, 64, scale=100.0, near=0.95, regime="loss near zero"),
    Case(257, 257, 64, scale=0.0, regime="scale 0"),
    Case(65, 65, 64, scale=-5.0, regime="negative scale"),
]


def run(queries: Tensor, keys: Tensor, scale: float, impl: str, **options: Any) -> tuple[Tensor, ...]:
    """Losses and the gradients to queries, keys and scale, under weights that differ from row to row."""
    queries, keys = queries.detach().requires_grad_(), keys.detach().requires_grad_()
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    logit_scale = torch.tensor(scale, dtype=dtype, requires_grad=True)
    losses = mmkernels.info_nce(queries, keys, logit_scale, reduction="none", impl=impl, **options)
    weights = torch.linspace(0.5, 1.5, len(losses), dtype=dtype)
    grads = torch.autograd.grad((losses * weights).sum(), (queries, keys, logit_scale))
    return losses.detach(), *grads


def run_eager(queries: Tensor, keys: Tensor, scale: float, **options: Any) -> tuple[Tensor, ...]:
    """The lines that the call replaces, in the precision of the features: logits and softmax in their dtype."""
    queries, keys = queries.detach().requires_grad_(), keys.detach().requires_grad_()
    logit_scale = torch.tensor(scale, requires_grad=True)
    own = torch.arange(len(queries))
    targets = options.get("targets", own)
    smoothing = options.get("label_smoothing", 0.0)
    logits = logit_scale.to(queries.dtype) * queries @ keys.T
    losses = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none").float()
    if options.get("symmetric", True):
        columns = F.cross_entropy(logits.T[targets], own, label_smoothing=smoothing, reduction="none")
        losses = (losses + columns) / 2
    weights = torch.linspace(0.5, 1.5, len(losses))
    grads = torch.autograd.grad((losses * weights).sum(), (queries, keys, logit_scale))
    return losses.detach(), *grads


def check_case(case: Case, dtype: torch.dtype, impl: str) -> None:
    queries, keys = case.inputs(dtype)
    exact = run(queries.double(), keys.double(), case.scale, "reference", **case.options)
    eager = run_eager(queries, keys, case.scale, **case.options)
    actual = run(queries, keys, case.scale, impl, **case.options)
    assert_results(actual, eager, exact, queries, keys, case.scale)


def assert_results(
    actual: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    queries: Tensor,
    keys: Tensor,
    scale: float,
) -> None:
    """Each within its budget. A gradient is a difference of probabilities times features: its terms set the band."""
    largest = [x.double().abs().max().item() for x in (queries, keys)]
    all_rows = len(queries) ** 0.5 * largest[0] * largest[1]
    terms = [0.0, abs(scale) * largest[1], abs(scale) * largest[0], all_rows]
    names = ("losses", "grad_queries", "grad_keys", "grad_scale")
    for name, a, b, c, term in zip(names, actual, eager, exact, terms, strict=True):
        assert_within_budget(a, b, c, dtype=queries.dtype, terms=term, name=name)
