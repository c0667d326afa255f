"""The Triton kernels of retrieval in Triton's interpreter, on CPU tensors: parity and guard bands.

tests/conftest.py runs this file in a process of its own, where the interpreter is chosen before Triton is imported.
Every tensor that the kernels read lies between guards of NaN, and every one they allocate starts as NaN.
"""

import pytest
import torch

import mmkernels
from mmkernels._tiles import overrides
from mmkernels.retrieval import triton_kernels
from tests.interpreting import DTYPES, FAST_IN_FP16, guarded_allocations, guarded_rows
from tests.retrieval.cases import Case, check_case, check_order, whole_numbers

TILE = triton_kernels.TOPK["interpreter"]["half"].block_m
CASES = [
    Case(1, 1, 1, regime="one of each"),
    Case(TILE - 1, TILE - 1, 48, regime="tile - 1"),
    Case(TILE, TILE, 48, regime="tile"),
    Case(TILE + 1, 3 * TILE + 1, 40, regime="tile + 1"),
    Case(20, 70, 513, regime="odd D"),
    Case(3, 150, 16, distinct=3, regime="almost all are copies"),
    Case(40, 45, 48, scale=0.0, regime="all scores 0"),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    yield from guarded_allocations(monkeypatch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, dtype):
    check_case(case, dtype, "triton", guarded_rows)


@pytest.mark.parametrize("dtype", FAST_IN_FP16)
def test_several_tiles_a_split_and_several_strips(dtype, monkeypatch):
    """Every loop runs more than once, the last time over less."""
    monkeypatch.setattr(triton_kernels, "_PROGRAMS", 4)
    monkeypatch.setattr(triton_kernels, "_MOST_KEPT", 16)
    monkeypatch.setattr(triton_kernels, "_STRIP_BYTES", 1)
    check_case(Case(2 * TILE + 9, 6 * TILE + 1, 40), dtype, "triton", guarded_rows)


@pytest.mark.parametrize("sides", [(16, 64), (64, 16)], ids="{0[0]}x{0[1]}".format)
def test_tiles_that_are_no_squares(sides):
    """Their diagonal, on which the targets' scores are, is as long as the shorter side."""
    tile = dict(zip(("BLOCK_M", "BLOCK_N"), sides, strict=True))
    with overrides.replacing({("retrieval", kernel, "ieee"): tile for kernel in overrides.KERNELS["retrieval"]}):
        check_case(Case(3 * TILE + 1, TILE + 1, 40), torch.float32, "triton", guarded_rows)


@pytest.mark.parametrize("programs", [1, 512])
def test_whole_numbers_are_exact(programs, monkeypatch):
    """One list of all tiles, whose last of equals gives way, or one of each."""
    monkeypatch.setattr(triton_kernels, "_PROGRAMS", programs)
    queries, keys, scores = whole_numbers(40, 130, 7, torch.float32)
    check_order(queries, keys, scores, torch.arange(40) * 3, "triton", guarded_rows)


def test_nan_and_infinity():
    queries, keys, _ = whole_numbers(30, 130, 8, torch.float32)
    queries, keys = queries + 0.5, keys + 0.25
    queries[3, 5] = torch.nan
    keys[[40, 41, 129], 2] = -torch.tensor(torch.nan)
    keys[100:105, 1] = torch.inf
    keys[105:110, 1] = -torch.inf
    queries[7] = 0.0  # times infinity
    scores = queries @ keys.T
    for target in (40, 102, 107):
        check_order(queries, keys, scores, torch.full((30,), target), "triton", guarded_rows)


def test_targets_of_any_stride():
    queries, keys, _ = whole_numbers(40, 130, 7, torch.float32)
    targets = torch.arange(120)[::3]
    ranks = mmkernels.retrieval_ranks(queries, keys, targets, impl="triton")
    assert torch.equal(ranks, mmkernels.retrieval_ranks(queries, keys, targets, impl="reference"))


def test_targets_out_of_range():
    queries, keys, _ = whole_numbers(5, 7, 16, torch.float32)
    assert (mmkernels.retrieval_ranks(queries, keys, torch.tensor([0, 1, 6, 2, 4]), impl="triton") < 7).all()
    for bad in (7, -1):
        with pytest.raises(ValueError, match=f"7 keys, 0 to 6, got {bad}"):
            mmkernels.retrieval_ranks(queries, keys, torch.tensor([0, 1, bad, 2, 4]), impl="triton")
