"""What the tests of the CPU kernels share: the dtypes and the mark of tests that need the library."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from mmkernels import _backends

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_library = pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason="no compiled library")


# The logits of these queries and keys are extreme.
EXTREMES = [
    pytest.param(torch.ones(65, 8), torch.ones(65, 8), id="all logits equal"),
    pytest.param(1e4 * torch.eye(40), torch.eye(40), id="logits of 1e4 on the diagonal"),
    pytest.param(-1e4 * torch.eye(40), torch.eye(40), id="logits of -1e4 on the diagonal"),
    pytest.param(torch.linspace(-1e4, 1e4, 300)[:, None], torch.ones(300, 1), id="rows far apart"),
    pytest.param(torch.ones(300, 1), torch.linspace(-1e4, 1e4, 300)[:, None], id="columns far apart"),
    pytest.param(torch.full((33, 1), -90.0), torch.ones(33, 1), id="every logit at -90"),
]


def strided_pairs(wide: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Queries and keys that are parts of one tensor [even, 200]."""
    return [
        (wide[:, :96], wide[:, 100:196]),  # rows further apart than they are long
        (wide[:, 1:96], wide[:, 101:196]),  # unaligned, odd
        (wide.T[:96], wide.T[100:196]),  # columns
        (wide[::2], wide[1::2]),
        (wide[:1].expand(len(wide), 200), wide),  # stride 0
    ]


def each_case(cases: Iterable) -> Callable:
    """Makes a test for each case in each dtype; it runs where there is a library."""

    def mark(test: Callable) -> Callable:
        by_case = pytest.mark.parametrize("case", cases, ids=str)(test)
        return needs_library(pytest.mark.parametrize("dtype", DTYPES, ids=str)(by_case))

    return mark


def assert_same_bits(run: Callable[[], tuple[Tensor, ...]]) -> None:
    """Every result has the same bits, whatever the number of threads, and again with as many."""
    before = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results += [run() for _ in range(3)]
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
