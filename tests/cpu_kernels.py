"""What the tests of the CPU kernels share: the dtypes and the mark of tests that need the library."""

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor

from mmkernels import _backends

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
needs_library = pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason="no compiled library")


def each_case(cases: Iterable) -> Callable:
    """A test of its own for each case in each dtype, where there is a library."""

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
