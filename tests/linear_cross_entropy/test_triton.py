"""The Triton kernels of linear_cross_entropy in Triton's interpreter, on CPU tensors: parity and guard bands.

tests/conftest.py runs this file in a process of its own, where the interpreter is chosen before Triton is imported.
Every tensor that the kernels read lies between guards of NaN, and every one they allocate starts as NaN.
"""

import pytest
import torch

import mmkernels
from mmkernels._tiles import configs, launch, products
from tests.interpreting import DTYPES, FAST_IN_FP16, guarded_allocations, guarded_rows, inexact_exp2
from tests.linear_cross_entropy.cases import Case, assert_results, run, run_eager
from tests.sums import sums_as_in

TILE = configs.CONFIGS["interpreter"]["half"].forward.block_m
CASES = [
    Case(1, 1, 1, regime="one of each"),
    Case(TILE - 1, TILE - 1, 48, regime="tile - 1"),
    Case(TILE, TILE, 48, regime="tile"),
    Case(TILE + 1, 3 * TILE + 1, 40, regime="tile + 1"),
    Case(40, 70, 513, regime="odd D"),
    Case(70, 20, 48, bias=False, regime="no bias, fewer classes than rows"),
    Case(45, 70, 48, ignored="some", options={"label_smoothing": 0.1}, regime="smoothing, some ignored"),
    Case(45, 70, 48, bias=False, options={"label_smoothing": 1.0}, regime="smoothing alone, no bias"),
    Case(45, 70, 48, ignored="some", options={"ignore_index": 7}, regime="a class ignored"),
    Case(45, 70, 48, ignored="all", regime="all ignored"),
    Case(0, 70, 48, regime="no row"),
    Case(45, 70, 48, scale=100.0, regime="logits of 100"),
    Case(45, 70, 48, scale=0.0, regime="the bias alone"),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    yield from guarded_allocations(monkeypatch)


def check(case, dtype):
    hidden, weight, bias, targets = case.inputs(dtype)
    in_double = (hidden.double(), weight.double(), None if bias is None else bias.double(), targets)
    exact = run(*in_double, "reference", **case.options)
    with sums_as_in("triton"):
        eager = run_eager(hidden, weight, bias, targets, **case.options)
    given = [None if x is None else guarded_rows(x) for x in (hidden, weight, bias, targets)]
    assert_results(run(*given, "triton", **case.options), eager, exact, hidden, weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_exponentials_as_inexact_as_a_gpu_may_take_them(scale, monkeypatch):
    inexact_exp2(monkeypatch)
    check(Case(77, 100, 64, scale=scale), torch.float32)


@pytest.mark.parametrize("dtype", FAST_IN_FP16)
def test_several_groups_strips_and_splits(dtype, monkeypatch):
    """More tiles than one program takes: every loop runs more than once, the last time over less."""
    monkeypatch.setattr(launch, "MAX_PARTIALS", 2)
    monkeypatch.setattr(products, "_STRIP_BYTES", 1)
    monkeypatch.setattr(products, "_STRIP_ROWS", TILE)
    check(Case(2 * TILE + 9, 9 * TILE + 1, 40, ignored="some"), dtype)


def test_classes_that_a_bias_of_minus_infinity_masks():
    hidden, weight, bias, _ = Case(40, 100, 16).inputs(torch.float32)
    bias[TILE:] = -torch.inf
    inputs = (hidden, weight, bias, torch.arange(40) % TILE)
    exact = run(hidden.double(), weight.double(), bias.double(), inputs[3], "reference")
    actual = run(*inputs, "triton")
    assert_results(actual, run_eager(*inputs), exact, hidden, weight)
    assert (actual[2][TILE:] == 0).all()


def test_a_mean_over_no_row_has_gradients_of_zero():
    hidden, weight, bias, targets = Case(40, 50, 16, ignored="all").inputs(torch.float32)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    loss = mmkernels.linear_cross_entropy(hidden, weight, targets, bias=bias, impl="triton")
    assert loss.isnan()
    assert all((grad == 0).all() for grad in torch.autograd.grad(loss, leaves))


def test_nan_is_not_hidden():
    hidden, weight, bias, targets = Case(40, 50, 16).inputs(torch.float32)
    hidden[3, 5] = torch.nan
    losses, grad_hidden, grad_weight, grad_bias = run(hidden, weight, bias, targets, "triton")
    assert torch.equal(losses.isnan(), torch.arange(40) == 3)
    assert torch.equal(grad_hidden.isnan().all(1), torch.arange(40) == 3)
    assert grad_weight.isnan().all()
    assert grad_bias.isnan().all()


@pytest.mark.parametrize("bits", range(1, 8))
def test_only_what_is_asked_for(bits):
    *leaves, targets = Case(40, 50, 48, ignored="some").inputs(torch.float32)
    everything = run(*leaves, targets, "triton")[1:]
    mask = [bool(bits >> index & 1) for index in range(3)]
    for leaf, needed in zip(leaves, mask, strict=True):
        leaf.requires_grad_(needed)
    losses = mmkernels.linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], reduction="none", impl="triton")
    (losses * torch.linspace(0.5, 1.5, 40)).sum().backward()
    for leaf, needed, full in zip(leaves, mask, everything, strict=True):
        assert (leaf.grad is not None) == needed
        assert not needed or torch.equal(leaf.grad, full)


def test_targets_out_of_range():
    hidden, weight, bias, _ = Case(5, 7, 16).inputs(torch.float32)
    targets = torch.tensor([0, 1, 6, -100, 4])
    assert run(hidden, weight, bias, targets, "triton")[0].isfinite().all()
    for bad in (7, -1):
        targets[2] = bad
        with pytest.raises(ValueError, match=f"7 rows of weight, 0 to 6, or ignore_index=-100, got {bad}"):
            run(hidden, weight, bias, targets, "triton")


def test_a_second_backward():
    *leaves, targets = Case(40, 60, 48).inputs(torch.float32)
    leaves = [x.requires_grad_() for x in leaves]
    loss = mmkernels.linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], impl="triton")
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(one, two)
