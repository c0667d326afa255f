"""The cases that every implementation of info_nce is held to, and the two oracles beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from mmkernels.testing import EXP2_ERROR, assert_within_budget, features
from tests.devices import Device, on_device
from tests.sizes import edges
from tests.sums import sums_as_in


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

    def options_in(self, dtype: torch.dtype) -> dict[str, Any]:
        """The options with the queues as rows of this dtype: given is how many."""
        queues = {
            name: features(rows, self.d, dtype, seed=rows)
            for name, rows in self.options.items()
            if name in ("key_queue", "query_queue")
        }
        return self.options | queues


def repeated_targets(n: int, m: int) -> Tensor:
    return (torch.arange(n) * 7 // 3) % m


def grouped(n: int, m: int, count: int, **options: Any) -> dict[str, Any]:
    """Queries and keys dealt to `count` groups, each in an order of its own; ids of any size and sign."""
    ids = torch.arange(count) * 10**12 - 7
    return {"query_groups": ids[torch.arange(n) * 5 % count], "key_groups": ids[torch.arange(m) * 3 % count], **options}


CASES = [
    Case(1, 1, 1, regime="one of each"),
    *edges(Case),
    Case(700, 300, 48, options={"targets": repeated_targets(700, 300)}, regime="more queries than keys"),
    Case(257, 260, 77, options={"label_smoothing": 0.1}, regime="smoothing"),
    Case(257, 260, 77, options={"label_smoothing": 1.0}, regime="smoothing alone"),
    Case(257, 260, 77, options={"symmetric": False}, regime="rows alone"),
    Case(90, 300, 77, options={"symmetric": False, "label_smoothing": 0.2}, regime="rows alone, smoothing"),
    Case(200, 300, 64, options={"targets": repeated_targets(200, 300), "label_smoothing": 0.1}, regime="targets"),
    Case(257, 257, 64, scale=100.0, near=-0.2, regime="temperature 0.01, negative mean cosine"),
    Case(257, 257, 64, scale=100.0, near=0.95, regime="loss near zero"),
    Case(257, 257, 64, scale=0.0, regime="scale 0"),
    Case(65, 65, 64, scale=-5.0, regime="negative scale"),
    Case(300, 310, 64, options=grouped(300, 310, 37), regime="groups"),
    Case(300, 310, 64, options=grouped(300, 310, 7, label_smoothing=0.1), regime="groups, smoothing"),
    Case(65, 70, 48, options=grouped(65, 70, 1), regime="one group"),
    Case(131, 131, 48, scale=100.0, near=0.95, options=grouped(131, 131, 131), regime="a group for each"),
    Case(
        300, 200, 48, options=grouped(300, 200, 41, targets=repeated_targets(300, 200)), regime="groups beside targets"
    ),
    Case(64, 600, 48, options=grouped(64, 600, 301, symmetric=False), regime="groups, rows alone, keys of no query"),
    Case(70, 270, 64, options={"key_queue": 300}, regime="queue of keys"),
    Case(257, 260, 64, options={"key_queue": 40, "query_queue": 300}, regime="both queues"),
    Case(64, 64, 64, options={"query_queue": 1}, regime="queue of one query"),
    Case(
        130,
        90,
        33,
        options=grouped(130, 90, 17, key_queue=200, targets=repeated_targets(130, 90)),
        regime="groups, queue",
    ),
    Case(
        130,
        90,
        33,
        options=grouped(
            130, 90, 17, key_queue=20, query_queue=70, targets=repeated_targets(130, 90), label_smoothing=0.1
        ),
        regime="groups, both queues",
    ),
]


def run(
    queries: Tensor, keys: Tensor, scale: float, impl: str, device: Device = "cpu", **options: Any
) -> tuple[Tensor, ...]:
    """Losses and the gradients to queries, keys and scale, under weights that differ from row to row."""
    queries, keys = queries.detach().requires_grad_(), keys.detach().requires_grad_()
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    logit_scale = torch.tensor(scale, dtype=dtype, requires_grad=True)
    queues = {name: x.to(queries.dtype) for name, x in options.items() if name in ("key_queue", "query_queue")}
    options = options | queues
    info_nce = on_device(mmkernels.info_nce, device)
    losses = info_nce(queries, keys, logit_scale, reduction="none", impl=impl, **options)
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
    all_keys, all_queries = (
        x if options.get(queue) is None else torch.cat([x, options[queue].to(x.dtype)])
        for x, queue in ((keys, "key_queue"), (queries, "query_queue"))
    )
    row_targets, column_targets = targets, own
    if "query_groups" in options:
        positive = (options["query_groups"][:, None] == options["key_groups"]).to(queries.dtype)
        row_targets = F.pad(positive / positive.sum(1, keepdim=True), (0, len(all_keys) - len(keys)))
        positive = positive.T[targets]
        column_targets = F.pad(positive / positive.sum(1, keepdim=True), (0, len(all_queries) - len(queries)))
    logits = logit_scale.to(queries.dtype) * queries @ all_keys.T
    losses = F.cross_entropy(logits, row_targets, label_smoothing=smoothing, reduction="none").float()
    if options.get("symmetric", True):
        columns = logits.T[targets]
        if all_queries is not queries:
            columns = logit_scale.to(queries.dtype) * keys[targets] @ all_queries.T
        columns = F.cross_entropy(columns, column_targets, label_smoothing=smoothing, reduction="none")
        losses = (losses + columns) / 2
    weights = torch.linspace(0.5, 1.5, len(losses))
    grads = torch.autograd.grad((losses * weights).sum(), (queries, keys, logit_scale))
    return losses.detach(), *grads


def check_case(case: Case, dtype: torch.dtype, impl: str, device: Device = "cpu") -> tuple[Tensor, ...]:
    """Hold the results on that device to their budgets, and return them."""
    queries, keys = case.inputs(dtype)
    options = case.options_in(dtype)
    exact = run(queries.double(), keys.double(), case.scale, "reference", **options)
    with sums_as_in(impl):
        eager = run_eager(queries, keys, case.scale, **options)
    actual = run(queries, keys, case.scale, impl, device, **options)
    assert_results(actual, eager, exact, queries, keys, case.scale)
    return actual


def assert_results(
    actual: tuple[Tensor, ...],
    eager: tuple[Tensor, ...],
    exact: tuple[Tensor, ...],
    queries: Tensor,
    keys: Tensor,
    scale: float,
    terms: Sequence[float] | None = None,
) -> None:
    """Each within its budget. A gradient is a difference of probabilities times features: its terms set the band.

    ``terms`` are their sizes where those of unit features, each with one match, do not hold.
    """
    names = ("losses", "grad_queries", "grad_keys", "grad_scale")
    bands = terms or terms_of(queries, keys, scale), arithmetic_of(queries, keys, scale)
    for name, a, b, c, size, arithmetic in zip(names, actual, eager, exact, *bands, strict=True):
        assert_within_budget(a, b, c, dtype=queries.dtype, terms=size, arithmetic=arithmetic, name=name)


def terms_of(queries: Tensor, keys: Tensor, scale: float) -> list[float]:
    """The size of what the losses and the gradients to queries, keys and scale are a difference of."""
    of_queries, of_keys = (x.double().abs().max().item() for x in (queries, keys))
    return [0.0, abs(scale) * of_keys, abs(scale) * of_queries, len(queries) ** 0.5 * of_queries * of_keys]


def arithmetic_of(queries: Tensor, keys: Tensor, scale: float) -> list[float]:
    """What a GPU's exponentials may be off in the losses and the gradients: of a probability one in the sum and one
    beside it, under weights up to 1.5. A loss has them in the share of what is not the positive's alone."""
    of_queries, of_keys = (x.double().norm(dim=1).max().item() for x in (queries, keys))
    terms = [*terms_of(queries, keys, scale)[:3], len(queries) ** 0.5 * of_queries * of_keys]
    return [1.5 * 2 * EXP2_ERROR * size for size in terms]


def check_block(impl: str, dtype: torch.dtype, symmetric: bool, label_smoothing: float) -> None:
    """The backward op of one block of keys among three, with the log-sum-exps over all of them."""
    n, counts, size = 70, (33, 90, 40), 48
    queries = features(n, size, dtype, seed=1)
    blocks = [features(count, size, dtype, seed=2 + index) for index, count in enumerate(counts)]
    scale = torch.tensor(20.0)
    targets = torch.where(torch.arange(n) % 3 == 0, -1, torch.arange(n) * 7 % counts[1])  # some are elsewhere
    row_weights = torch.linspace(0.5, 1.5, n)
    q, k = queries.double(), blocks[1].double()
    logits = 20 * q @ torch.cat(blocks).double().T
    lse = logits.logsumexp(1)
    own = 20 * q @ k.T
    weights = torch.linspace(0.1, 2.0, counts[1])
    col_lse = own.logsumexp(0) + 0.5  # of other queries, too
    grad = row_weights.double()[:, None] * (own - lse[:, None]).exp()
    if symmetric:
        grad += weights.double() * (own - col_lse).exp()
    matched = (targets >= 0).nonzero()[:, 0]
    grad[matched, targets[matched]] -= (2 if symmetric else 1) * (1 - label_smoothing) * row_weights.double()[matched]
    expected = 20 * grad @ k, 20 * grad.T @ q, (grad * own / 20).sum()

    def in_two(x: Tensor) -> Tensor:
        x = x / torch.log(torch.tensor(2.0, dtype=torch.float64)) if impl == "triton" else x
        return torch.stack([x.float(), (x - x.float()).float()])

    of_columns = (in_two(col_lse), weights) if symmetric else (in_two(col_lse)[:, :0], weights[:0])
    actual = getattr(torch.ops.mmkernels, f"info_nce_{impl}_block_backward")(
        queries, blocks[1], scale, targets, in_two(lse), of_columns[0], row_weights, of_columns[1], label_smoothing,
        [True] * 3,
    )  # fmt: skip
    for got, wanted in zip(actual, expected, strict=True):
        assert got.dtype == torch.float32
        # The gradient of the logits is rounded to the dtype of the features.
        near = (1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps) * float(wanted.abs().max())
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=near)
