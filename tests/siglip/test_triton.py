"""The Triton kernels of siglip in Triton's interpreter, on CPU tensors: parity and guard bands.

tests/conftest.py runs this file in a process of its own, where the interpreter is chosen before Triton is imported.
Every tensor that the kernels read lies between guards of NaN, and every one they allocate starts as NaN.
"""

import pytest
import torch

import mmkernels
from mmkernels._tiles import configs, products
from mmkernels.siglip import triton_kernels
from tests.interpreting import DTYPES, FAST_IN_FP16, guarded_allocations, guarded_rows, inexact_exp2
from tests.siglip.cases import REDUCTIONS, Case, assert_results, check_block, oracles, row_weights, run
from tests.sums import sums_as_in

TILE = configs.CONFIGS["interpreter"]["half"].grad_logits.block_m
CASES = [
    Case(1, 1, 1, regime="one of each"),
    Case(TILE - 1, TILE - 1, 48, regime="tile - 1"),
    Case(TILE, TILE, 48, regime="tile"),
    Case(TILE + 1, TILE + 1, 40, regime="tile + 1"),
    Case(40, 70, 99, regime="odd D, more keys than queries"),
    Case(1, 70, 48, regime="one query"),
    Case(45, 45, 48, bias=0.0, regime="no bias"),
    Case(45, 45, 48, scale=1.0, bias=5.0, regime="every pair taken for a match"),
    Case(45, 45, 48, scale=100.0, near=-0.2, regime="scale 100, negative mean cosine"),
    Case(45, 45, 48, scale=110.0, bias=-16.5, near=0.95, regime="loss near zero"),
    Case(45, 45, 48, scale=0.0, regime="scale 0"),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    yield from guarded_allocations(monkeypatch)


def check(case, dtype, reduction):
    queries, keys, *numbers = case.inputs(dtype)
    actual = run(guarded_rows(queries), guarded_rows(keys), *numbers, "triton", reduction)
    with sums_as_in("triton"):
        eager, exact = oracles(queries, keys, *numbers, reduction)
    assert_results(actual, eager, exact, queries, keys, *numbers, reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cases(case, dtype):
    for reduction in ("none", "mean"):
        check(case, dtype, reduction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("match_offset", [0, 40, 69, 70])
def test_a_block_of_the_keys(match_offset, dtype):
    check_block("triton", dtype, 45, 70, match_offset)
    check_block("triton", dtype, 70, 33, match_offset)


@pytest.mark.parametrize("scale", [10.0, 100.0])
def test_exponentials_as_inexact_as_a_gpu_may_take_them(scale, monkeypatch):
    inexact_exp2(monkeypatch)
    for reduction in ("none", "mean"):
        check(Case(77, 100, 64, scale=scale), torch.float32, reduction)


@pytest.mark.parametrize("dtype", FAST_IN_FP16)
@pytest.mark.parametrize("flat", [True, False])
def test_several_strips_and_splits(dtype, flat, monkeypatch):
    """More tiles than one program takes: every loop runs more than once, the last time over less. Not flat: a loop over
    tiles around one over features, as some GPUs take it."""
    monkeypatch.setattr(triton_kernels, "strip_flags", lambda family: {"FLAT": flat})
    monkeypatch.setattr(triton_kernels, "_PROGRAMS", 1)
    monkeypatch.setattr(triton_kernels, "_TILES", 4)
    monkeypatch.setattr(triton_kernels, "_PARTIAL_BYTES", 1)
    monkeypatch.setattr(products, "_STRIP_BYTES", 1)
    monkeypatch.setattr(products, "_STRIP_ROWS", TILE)
    for reduction in ("none", "mean"):
        check(Case(TILE + 9, 4 * TILE + 1, 40), dtype, reduction)


@pytest.mark.parametrize("logit", [-1e4, -60.0, -10.0, 0.5, 60.0, 1e4])
def test_the_digits_of_one_pair(logit):
    keys = torch.tensor([[2e4], [logit]])  # the first matches at no cost
    for reduction in ("none", "sum"):
        inputs = (torch.ones(1, 1), keys, 1.0, 0.0)
        actual, (_, exact) = run(*inputs, "triton", reduction), oracles(*inputs, reduction)
        for a, b in zip(actual, exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=6e-6 if logit == -60 else 1e-6, atol=1e-40)


def test_nan_is_not_hidden():
    queries, keys, *numbers = Case(40, 50, 16).inputs(torch.float32)
    queries[3, 5] = torch.nan
    for reduction in ("none", "mean"):
        loss, grad_queries, grad_keys, *grads = run(queries, keys, *numbers, "triton", reduction)
        assert torch.equal(grad_queries.isnan().all(1), torch.arange(40) == 3)
        assert grad_keys.isnan().all()
        assert all(grad.isnan() for grad in grads)
        assert torch.equal(loss.isnan(), torch.arange(40) == 3) if reduction == "none" else loss.isnan()


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_only_what_is_asked_for(reduction):
    queries, keys, scale, bias = Case(40, 50, 48).inputs(torch.float32)
    loss, *everything = run(queries, keys, scale, bias, "triton", reduction)
    for bits in range(1, 16):
        mask = [bool(bits >> index & 1) for index in range(4)]
        leaves = [queries.clone(), keys.clone(), torch.tensor(scale), torch.tensor(bias)]
        for leaf, needed in zip(leaves, mask, strict=True):
            leaf.requires_grad_(needed)
        got = mmkernels.siglip(*leaves, reduction=reduction, impl="triton")
        assert torch.equal(got, loss)
        (got * (row_weights(40) if reduction == "none" else torch.tensor(0.75))).sum().backward()
        for leaf, needed, full in zip(leaves, mask, everything, strict=True):
            assert (leaf.grad is not None) == needed
            if needed and leaf.ndim:
                assert torch.equal(leaf.grad, full)
            elif needed:  # summed up on the way over the queries or over the keys
                torch.testing.assert_close(leaf.grad, full, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_second_backward(reduction):
    queries, keys, *numbers = Case(40, 60, 48).inputs(torch.float16)
    leaves = [queries.requires_grad_(), keys.requires_grad_()]
    leaves += [torch.tensor(x, requires_grad=True) for x in numbers]
    loss = mmkernels.siglip(*leaves, reduction=reduction, impl="triton").sum()
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", FAST_IN_FP16[:2])
def test_one_number_arrives_at_all_rows(dtype):
    """The number has stride 0 and may be 0 itself: the unit of the gradients in fp16 is taken from it."""
    leaves = [x.requires_grad_() for x in Case(40, 60, 48).inputs(dtype)[:2]]
    losses = mmkernels.siglip(*leaves, 10.0, -10.0, reduction="none", impl="triton")
    loss = mmkernels.siglip(*leaves, 10.0, -10.0, reduction="sum", impl="triton")
    for arriving in (1.0, 0.0):
        actual = torch.autograd.grad(losses, leaves, torch.tensor(arriving).expand(40), retain_graph=True)
        expected = torch.autograd.grad(loss, leaves, torch.tensor(arriving), retain_graph=True)
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-5)


def test_without_gradients():
    queries, keys, *numbers = Case(40, 60, 48).inputs(torch.float32)
    losses = mmkernels.siglip(queries, keys, *numbers, reduction="none", impl="triton")
    assert torch.equal(losses, run(queries, keys, *numbers, "triton")[0])
    assert torch.equal(mmkernels.siglip(queries, keys, *numbers, impl="triton"), losses.mean())
