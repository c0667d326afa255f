"""The cases that every implementation of linear_cross_entropy is held to, and the two oracles beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from mmkernels.testing import EXP2_ERROR, assert_within_budget, features
from tests.devices import Device, on_device
from tests.sums import sums_as_in


@dataclass
class Case:
    n: int
    v: int
    d: int
    scale: float = 10.0  # of the logits
    bias: bool = True
    ignored: str = "none"  # none, some, most, all
    options: dict[str, Any] = field(default_factory=dict)
    regime: str = ""

    def __str__(self) -> str:
        options = "-".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.regime}-{self.n}x{self.v}x{self.d}-{options}"

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Hidden rows, weight, bias and targets."""
        generator = torch.Generator().manual_seed(self.n)
        hidden = features(self.n, self.d, dtype, seed=self.n) * self.scale
        weight = features(self.v, self.d, dtype, seed=self.v + 1)
        bias = torch.randn(self.v, generator=generator).to(dtype) if self.bias else None
        targets = torch.randint(self.v, (self.n,), generator=generator)
        keep = {"none": 1.0, "some": 0.7, "most": 0.05, "all": 0.0}[self.ignored]
        ignored = torch.rand(self.n, generator=generator) >= keep
        return hidden, weight, bias, targets.masked_fill(ignored, self.options.get("ignore_index", -100))


TILE = 256  # the largest tile of the CPU kernels; 64 is the smallest panel
CASES = [
    Case(1, 1, 1, regime="one of each"),
    Case(2, 3, 3, regime="less than a vector"),
    Case(64, 63, 64, regime="panel - 1"),
    Case(64, 64, 64, regime="panel"),
    Case(65, 65, 65, regime="panel + 1, odd D"),
    Case(TILE - 1, TILE - 1, 96, regime="tile - 1"),
    Case(TILE, TILE, 96, regime="tile"),
    Case(TILE + 1, 9 * TILE + 1, 100, regime="tile + 1, panels of a whole tile"),
    Case(700, 300, 48, regime="fewer classes than rows"),
    Case(3, 5000, 40, regime="few rows"),
    Case(130, 130, 513, regime="D past one L1 block"),
    Case(70, 90, 2048, regime="widest D, lowest panel"),
    Case(300, 320, 1024, regime="rows of 4 KiB are packed"),
    Case(257, 700, 77, bias=False, regime="no bias"),
    Case(257, 700, 77, options={"label_smoothing": 0.1}, regime="smoothing"),
    Case(257, 700, 77, options={"label_smoothing": 1.0}, regime="smoothing alone"),
    Case(90, 300, 77, bias=False, options={"label_smoothing": 0.2}, regime="smoothing, no bias"),
    Case(600, 300, 64, ignored="some", regime="some ignored"),
    Case(600, 300, 64, ignored="most", bias=False, regime="most ignored"),
    Case(300, 300, 64, ignored="some", options={"ignore_index": 17, "label_smoothing": 0.1}, regime="a class ignored"),
    Case(300, 300, 64, ignored="all", regime="all ignored"),
    Case(0, 300, 64, regime="no row"),
    Case(257, 257, 64, scale=100.0, regime="logits of 100"),
    Case(257, 257, 64, scale=0.0, regime="the bias alone"),
]


def run(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    impl: str,
    device: Device = "cpu",
    **options: Any,
) -> tuple[Tensor, ...]:
    """Losses and the gradients to hidden, weight and bias, under weights that differ from row to row."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    given = leaves[2] if bias is not None else None
    fused = on_device(mmkernels.linear_cross_entropy, device)
    losses = fused(leaves[0], leaves[1], targets, bias=given, reduction="none", impl=impl, **options)
    weights = torch.linspace(0.5, 1.5, len(losses), dtype=losses.dtype)
    return losses.detach(), *torch.autograd.grad((losses * weights).sum(), leaves)


def run_eager(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, **options: Any
) -> tuple[Tensor, ...]:
    """The lines that the call replaces, in the precision of the inputs: logits and softmax in their dtype."""
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
    losses = F.cross_entropy(F.linear(*leaves), targets, reduction="none", **options).float()
    weights = torch.linspace(0.5, 1.5, len(losses))
    return losses.detach(), *torch.autograd.grad((losses * weights).sum(), leaves)


def check_case(case: Case, dtype: torch.dtype, impl: str, device: Device = "cpu") -> tuple[Tensor, ...]:
    """Hold the results on that device to their budgets, and return them."""
    inputs = case.inputs(dtype)
    hidden, weight, bias, targets = inputs
    in_double = (hidden.double(), weight.double(), None if bias is None else bias.double(), targets)
    exact = run(*in_double, "reference", **case.options)
    with sums_as_in(impl):
        eager = run_eager(*inputs, **case.options)
    actual = run(*inputs, impl, device, **case.options)
    assert_results(actual, eager, exact, hidden, weight)
    return actual


def assert_results(
    actual: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    hidden: Tensor,
    weight: Tensor,
    terms: Sequence[float] | None = None,
) -> None:
    """Each within its budget. A gradient is a difference of probabilities times features: its terms set the band.

    ``terms`` are their sizes where those of weights of unit length, each class a target once, do not hold.
    """
    of_hidden = hidden.double().abs().max().item() if len(hidden) else 0.0
    terms = terms or [0.0, weight.double().abs().max().item(), of_hidden, 1.0]
    # What a GPU's exponentials may be off: of a probability one in the sum and one beside it, under weights up to 1.5.
    arithmetic = [1.5 * 2 * EXP2_ERROR * term for term in terms]
    names = ("losses", "grad_hidden", "grad_weight", "grad_bias")
    assert len(actual) == len(exact)
    for name, a, b, c, term, more in zip(names, actual, eager, exact, terms, arithmetic, strict=False):
        assert_within_budget(a, b, c, dtype=hidden.dtype, terms=term, arithmetic=more, name=name)
