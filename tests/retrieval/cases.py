"""The cases that every implementation of retrieval_ranks and retrieval_topk is held to, and their oracles."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import mmkernels
from mmkernels.testing import assert_within_budget, features
from tests.sums import sums_as_in


@dataclass
class Case:
    n: int  # queries
    m: int  # keys, of which some are copies
    d: int
    distinct: int = 0  # keys that are no copies; 0: half of them
    scale: float = 1.0  # of the scores
    regime: str = ""

    def __str__(self) -> str:
        return f"{self.regime}-{self.n}x{self.m}x{self.d}"

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, distinct keys, which of these each key is, and targets."""
        generator = torch.Generator().manual_seed(self.n + self.m)
        distinct = min(self.distinct or -(-self.m // 2), self.m)
        queries = features(self.n, self.d, dtype, seed=self.n) * self.scale
        place = torch.cat([torch.arange(distinct), torch.randint(distinct, (self.m - distinct,), generator=generator)])
        place = place[torch.randperm(self.m, generator=generator)]
        targets = torch.randint(self.m, (self.n,), generator=generator)
        return queries, features(distinct, self.d, dtype, seed=self.m + 1), place, targets


TILE = 256  # the largest tile of the CPU kernels
CASES = [
    Case(1, 1, 1, regime="one of each"),
    Case(1, 700, 64, regime="one query"),
    Case(2, 3, 3, regime="less than a vector"),
    Case(64, 63, 64, regime="panel - 1"),
    Case(64, 64, 64, regime="panel"),
    Case(65, 65, 65, regime="panel + 1, odd D"),
    Case(TILE - 1, TILE - 1, 96, regime="tile - 1"),
    Case(TILE, TILE, 96, regime="tile"),
    Case(TILE + 1, 3 * TILE + 1, 100, regime="tile + 1"),
    Case(9 * TILE + 1, 300, 40, regime="panels of a whole tile"),
    Case(20, 5001, 40, regime="few queries"),
    Case(130, 300, 513, regime="D past one L1 block"),
    Case(70, 90, 2048, regime="widest D, lowest panel"),
    Case(100, 320, 1024, regime="rows of 4 KiB are packed"),
    Case(90, 1030, 48, distinct=3, regime="almost all are copies"),
    Case(90, 600, 48, distinct=1, regime="all are copies"),
    Case(90, 600, 48, distinct=600, regime="no copies"),
    Case(90, 300, 48, scale=1e4, regime="large scores"),
    Case(90, 300, 48, scale=0.0, regime="all scores 0"),
]


def in_order(scores: Tensor) -> tuple[Tensor, Tensor]:
    """All scores and keys in the written order, from the whole matrix."""
    values, indices = scores.sort(dim=1, descending=True, stable=True)
    return values, indices.masked_fill(values.isnan(), -1)


def ranks_in(indices: Tensor, targets: Tensor) -> Tensor:
    """Where each target stands in its row; past the end if it does not."""
    found = indices == targets[:, None]
    return torch.where(found.any(1), found.int().argmax(1), indices.shape[1])


def check_case(
    case: Case, dtype: torch.dtype, impl: str, prepare: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[Tensor, Tensor]:
    """Hold the scores of the distinct keys to the budget and all that follows from their bits to equality; return them.

    A key's score must not depend on where it stands: the order of the whole gallery, copies included, follows from the
    scores that its distinct keys had in a gallery of their own. `prepare` puts a tensor where the kernels run.
    """
    queries, distinct, place, targets = case.inputs(dtype)
    found = mmkernels.retrieval_topk(prepare(queries), prepare(distinct), len(distinct), impl=impl)
    values, order = (x.cpu() for x in found)
    assert torch.equal(order.sort(1).values, torch.arange(len(distinct)).expand_as(order))
    of_distinct = torch.empty_like(values).scatter_(1, order, values)
    with sums_as_in(impl):
        exact, eager = queries.double() @ distinct.double().T, queries.float() @ distinct.float().T
    assert_within_budget(of_distinct, eager, exact, dtype=torch.float32, terms=case.scale, name="scores")

    check_order(queries, distinct[place], of_distinct[:, place], targets, impl, prepare)
    return values, order


def check_order(
    queries: Tensor,
    keys: Tensor,
    scores: Tensor,
    targets: Tensor,
    impl: str,
    prepare: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Ranks and the best keys are those of the scores, [N, M]."""
    values, indices = in_order(scores)
    n, m = scores.shape
    given = prepare(queries), prepare(keys)
    for k in sorted({1, min(10, m), min(100, m), m}):
        found, where = (x.cpu() for x in mmkernels.retrieval_topk(*given, k, impl=impl))
        assert where.dtype == torch.int64
        assert torch.equal(where, indices[:, :k]), f"k={k}: indices"
        torch.testing.assert_close(found, values[:, :k], rtol=0, atol=0, equal_nan=True)
    ranks = mmkernels.retrieval_ranks(*given, prepare(targets), impl=impl).cpu()
    assert ranks.dtype == torch.int64
    assert torch.equal(ranks, ranks_in(indices, targets)), "ranks"
    if n <= m:
        ranks = mmkernels.retrieval_ranks(*given, impl=impl).cpu()
        assert torch.equal(ranks, ranks_in(indices, torch.arange(n))), "ranks of the diagonal"


def whole_numbers(n: int, m: int, d: int, dtype: torch.dtype, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and their scores, all exact in every dtype and order of the sums; most scores are ties."""
    generator = torch.Generator().manual_seed(seed)
    queries, keys = (torch.randint(-2, 3, (rows, d), generator=generator) for rows in (n, m))
    return queries.to(dtype), keys.to(dtype), (queries @ keys.T).float()
