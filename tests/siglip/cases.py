"""The cases that every implementation of siglip is held to, and the two oracles beside it."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from mmkernels.testing import assert_within_budget, features
from tests.devices import Device, on_device
from tests.sizes import edges
from tests.sums import sums_as_in

REDUCTIONS = ("none", "mean", "sum")


@dataclass
class Case:
    n: int
    m: int
    d: int
    scale: float = 10.0
    bias: float = -10.0
    near: float = 0.3  # mean cosine of a query and its key
    regime: str = ""

    def __str__(self) -> str:
        return f"{self.regime}-{self.n}x{self.m}x{self.d}"

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float, float]:
        """Queries, keys, scale and bias."""
        queries = features(self.n, self.d, dtype, seed=self.n)
        keys = features(self.m, self.d, dtype, seed=self.m + 1, like=queries, mean_cosine=self.near)
        return queries, keys, self.scale, self.bias


CASES = [
    Case(1, 1, 1, regime="one of each"),
    *edges(Case),
    Case(700, 700, 48, regime="several tiles"),
    Case(1, 600, 40, regime="one query"),
    Case(257, 260, 77, bias=0.0, regime="no bias"),
    Case(257, 260, 77, scale=1.0, bias=5.0, regime="every pair taken for a match"),
    Case(257, 257, 64, scale=100.0, near=-0.2, regime="scale 100, negative mean cosine"),
    Case(257, 257, 64, scale=110.0, bias=-16.5, near=0.95, regime="loss near zero"),
    Case(257, 257, 64, scale=0.0, regime="scale 0"),
    Case(65, 65, 64, scale=-5.0, regime="negative scale"),
]


def run(
    queries: Tensor,
    keys: Tensor,
    scale: float,
    bias: float,
    impl: str,
    reduction: str = "none",
    device: Device = "cpu",
) -> tuple[Tensor, ...]:
    """The loss and the gradients to queries, keys, scale and bias, under weights that differ from row to row."""
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    leaves = [x.detach().requires_grad_() for x in (queries, keys)]
    leaves += [torch.tensor(x, dtype=dtype, requires_grad=True) for x in (scale, bias)]
    loss = on_device(mmkernels.siglip, device)(*leaves, reduction=reduction, impl=impl)
    return loss.detach(), *torch.autograd.grad(_weighted(loss), leaves)


def run_eager(queries: Tensor, keys: Tensor, scale: float, bias: float, reduction: str = "none") -> tuple[Tensor, ...]:
    """The lines that the call replaces, in the precision of the features: logits and losses in their dtype."""
    leaves = [x.detach().requires_grad_() for x in (queries, keys)]
    leaves += [torch.tensor(x, requires_grad=True) for x in (scale, bias)]
    logits = leaves[2].to(queries.dtype) * leaves[0] @ leaves[1].T + leaves[3].to(queries.dtype)
    labels = 2 * torch.eye(*logits.shape, dtype=queries.dtype) - 1
    losses = -F.logsigmoid(labels * logits)
    loss = losses.sum(1) if reduction == "none" else losses.sum() / (len(queries) if reduction == "mean" else 1)
    return loss.detach().float(), *torch.autograd.grad(_weighted(loss.float()), leaves)


def row_weights(rows: int) -> Tensor:
    """From 1/2 to 23/16 in sixteenths: where every pair counts for one of them, float32 sums them without an error."""
    return (8 + torch.arange(rows) % 16) / 16


def _weighted(loss: Tensor) -> Tensor:
    return (loss * row_weights(len(loss))).sum() if loss.ndim else 0.75 * loss


def check_case(
    case: Case,
    dtype: torch.dtype,
    impl: str,
    reductions: tuple[str, ...] = REDUCTIONS,
    device: Device = "cpu",
) -> list[Tensor]:
    """Hold the results on that device to their budgets, and return them."""
    inputs = case.inputs(dtype)
    results: list[Tensor] = []
    for reduction in reductions:
        with sums_as_in(impl):
            eager, exact = oracles(*inputs, reduction)
        actual = run(*inputs, impl, reduction, device)
        assert_results(actual, eager, exact, *inputs, reduction)
        results += actual
    return results


def oracles(
    queries: Tensor, keys: Tensor, scale: float, bias: float, reduction: str = "none"
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """What eager gives in the dtype of the features, and what float64 does."""
    exact = run(queries.double(), keys.double(), scale, bias, "reference", reduction)
    return run_eager(queries, keys, scale, bias, reduction), exact


def assert_results(
    actual: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    queries: Tensor,
    keys: Tensor,
    scale: float,
    bias: float,
    reduction: str = "none",
    alike: float = 1.0,
) -> None:
    """Each within its budget. A gradient is a sum of positive and negative terms: their size sets the band.

    ``alike``: by how much the rounding errors of a sum exceed independent ones, where its terms are alike.
    """
    q, k = queries.double(), keys.double()
    products = q @ k.T
    probabilities = torch.sigmoid(scale * products + bias)
    grads = alike * (probabilities - torch.eye(*products.shape)).abs() / (len(q) if reduction == "mean" else 1)
    one = grads.max().item() * abs(scale)
    terms = [
        0.0,
        one * k.abs().max().item(),
        one * q.abs().max().item(),
        (grads * products.abs()).sum().item(),
        grads.sum().item(),
    ]
    names = ("loss", "grad_queries", "grad_keys", "grad_scale", "grad_bias")
    for name, a, b, c, term in zip(names, actual, eager, exact, terms, strict=True):
        assert_within_budget(a, b, c, dtype=queries.dtype, terms=term, name=f"{name}, {reduction}")


def check_block(impl: str, dtype: torch.dtype, n: int, m: int, match_offset: int) -> None:
    """The ops over keys that are a block of several: key i + match_offset matches query i, if there is one."""
    queries, keys = features(n, 48, dtype, seed=1), features(m, 48, dtype, seed=2)
    scale, bias, weights = torch.tensor(10.0), torch.tensor(-3.0), row_weights(n)
    leaves = [x.double().requires_grad_() for x in (queries, keys, scale, bias)]
    logits = leaves[2] * leaves[0] @ leaves[1].T + leaves[3]
    labels = 2.0 * (torch.arange(m) == torch.arange(n)[:, None] + match_offset) - 1
    exact = -F.logsigmoid(labels * logits).sum(1)
    wanted = (exact, *torch.autograd.grad((exact * weights).sum(), leaves))
    losses = getattr(torch.ops.mmkernels, f"siglip_{impl}_losses")(queries, keys, scale, bias, match_offset)
    gradients = getattr(torch.ops.mmkernels, f"siglip_{impl}_gradients")
    actual = gradients(weights, queries, keys, scale, bias, True, match_offset, True, [True] * 4)
    assert torch.equal(losses, actual[0])
    for got, expected in zip(actual, wanted, strict=True):
        assert got.dtype == torch.float32
        # The gradient of the logits is rounded to the dtype of the features.
        near = (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps) * expected.abs().max()
        torch.testing.assert_close(got.double(), expected.detach(), rtol=0, atol=float(near))
