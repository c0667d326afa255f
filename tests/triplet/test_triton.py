"""The Triton kernels of triplet in Triton's interpreter, on CPU tensors: parity and guard bands.

tests/conftest.py runs this file in a process of its own, where the interpreter is chosen before Triton is imported.
Every tensor that the kernels read lies between guards of NaN, and every one they allocate starts as NaN.
"""

import pytest
import torch

import mmkernels
from mmkernels._tiles import configs, launch, products
from mmkernels._tiles.triton import Tile
from mmkernels.testing import features
from mmkernels.triplet import triton_kernels
from tests.interpreting import DTYPES, FAST_IN_FP16, guarded_allocations, guarded_rows
from tests.triplet.cases import (
    AT_MINUS_INFINITY,
    MININGS,
    Case,
    assert_results,
    cases,
    check_minus_infinity,
    check_no_negative,
    run,
)

TILE = configs.CONFIGS["interpreter"]["half"].forward.block_m
SIZES = [
    Case(1, 1, 1, regime="no negatives"),
    Case(1, 3, 5, regime="negatives of the query alone"),
    Case(TILE - 1, TILE - 1, 48, regime="tile - 1"),
    Case(TILE, TILE, 48, regime="tile"),
    Case(TILE + 1, 3 * TILE + 1, 40, regime="tile + 1"),
    Case(40, 70, 129, regime="odd D"),
    Case(45, 50, 48, options={"margin": 0.25}, regime="hinges of exactly 0"),
    Case(45, 70, 48, options={"symmetric": False}, regime="rows alone"),
]

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    yield from guarded_allocations(monkeypatch)


def check(case, dtype, reduction="none"):
    queries, keys = case.inputs(dtype)
    exact = run(queries.double(), keys.double(), "reference", reduction, **case.options)
    eager = run(queries, keys, "reference", reduction, **case.options)
    actual = run(guarded_rows(queries), guarded_rows(keys), "triton", reduction, **case.options)
    assert_results(actual, eager, exact, queries, keys, reduction, **case.options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", cases(SIZES), ids=str)
def test_cases(case, dtype):
    check(case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SIZES[2:], ids=str)
def test_losses_and_gradients_in_one_pass(case, dtype):
    check(case, dtype, "mean")


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("dtype", FAST_IN_FP16)
def test_several_groups_strips_and_splits(dtype, mining, reduction, monkeypatch):
    """More tiles than one program takes: every loop runs more than once, the last time over less."""
    monkeypatch.setattr(launch, "MAX_PARTIALS", 2)
    monkeypatch.setattr(products, "_STRIP_BYTES", 1)
    monkeypatch.setattr(products, "_STRIP_ROWS", TILE)
    check(Case(2 * TILE + 9, 6 * TILE + 1, 40, {"mining": mining}), dtype, reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_negative_like_the_positive_is_an_exact_tie(dtype):
    n = 50
    queries = features(n, 70, dtype, seed=1)
    keys = features(n, 70, dtype, seed=2, like=queries, mean_cosine=0.8)
    copies = torch.cat([keys, keys[torch.arange(n) * 7 % n]])
    none = {"reduction": "none", "symmetric": False, "impl": "triton"}
    alone = mmkernels.triplet(queries, keys, margin=1e-7, mining="semi_hard", **none)
    assert torch.equal(mmkernels.triplet(queries, copies, margin=1e-7, mining="semi_hard", **none), alone)
    hardest = mmkernels.triplet(queries, copies, margin=0.25, mining="hardest", **none)
    assert (hardest >= 0.25).all()
    assert (hardest == 0.25).float().mean() > 0.5


@pytest.mark.parametrize(("mining", "negatives"), [("all", 44), ("hardest", 1), ("semi_hard", 0)])
def test_equal_similarities_of_any_size(mining, negatives):
    """Each costs the margin, of which no digit is lost beside them."""
    rows = torch.full((45, 8), 16.0)
    losses = mmkernels.triplet(rows, rows, mining=mining, reduction="none", impl="triton")
    torch.testing.assert_close(losses, torch.full((45,), 0.2 * negatives), rtol=1e-6, atol=0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("where", ["queries", "keys"])
@pytest.mark.parametrize("mining", MININGS)
def test_nan_is_not_hidden(mining, where, symmetric):
    queries, keys = Case(40, 50, 16).inputs(torch.float32)
    (queries if where == "queries" else keys)[3, 5] = torch.nan
    options = {"mining": mining, "symmetric": symmetric}
    actual, eager = run(queries, keys, "triton", **options), run(queries, keys, "reference", **options)
    lost = actual[0].isnan()
    assert lost[3]
    assert (eager[0].isnan() <= lost).all()
    assert actual[1][lost].isnan().all()
    assert actual[2][:40][lost].isnan().all()
    if mining == "all":
        for a, b in zip(actual, eager, strict=True):
            assert (b.isnan() <= a.isnan()).all()
    assert run(queries, keys, "triton", "mean", **options)[0].isnan()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("place", AT_MINUS_INFINITY)
@pytest.mark.parametrize("mining", MININGS)
def test_worst_negatives_at_minus_infinity(mining, place, symmetric):
    check_minus_infinity(place, "triton", symmetric, mining)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mining", MININGS)
def test_no_negative_and_a_positive_not_finite(mining, symmetric):
    check_no_negative("triton", symmetric, mining)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("mining", MININGS)
def test_tiles_whose_rows_share_slots(mining, reduction, monkeypatch):
    """In tiles as high as a GPU's, rows 8 apart share the registers of their columns."""
    tile = Tile(128, 64, 32, 4, 1)
    monkeypatch.setattr(triton_kernels, "choose_tile", lambda op, features: (tile, "ieee"))
    check(Case(270, 400, 40, {"mining": mining}), torch.float32, reduction)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("mining", ["all", "hardest"])
@pytest.mark.parametrize("mask", [(True, False), (False, True)], ids=str)
def test_only_what_is_asked_for(mask, mining, reduction):
    leaves = Case(40, 50, 48).inputs(torch.float32)
    everything = run(*leaves, "triton", reduction, mining=mining)[1:]
    for leaf, needed in zip(leaves, mask, strict=True):
        leaf.requires_grad_(needed)
    losses = mmkernels.triplet(*leaves, mining=mining, reduction=reduction, impl="triton")
    (losses * torch.linspace(0.5, 1.5, losses.numel()).view_as(losses)).sum().backward()
    for leaf, needed, full in zip(leaves, mask, everything, strict=True):
        assert (leaf.grad is not None) == needed
        assert not needed or torch.equal(leaf.grad, full)
    if mining == "all":
        sums = torch.ops.mmkernels.triplet_triton_hinge_gradients(*leaves, None, 0.2, True, list(mask))[1:]
        assert [grad.numel() > 0 for grad in sums] == list(mask)


@pytest.mark.parametrize("mining", ["all", "hardest"])
def test_a_second_backward(mining):
    leaves = [x.requires_grad_() for x in Case(40, 60, 48).inputs(torch.float32)]
    loss = mmkernels.triplet(*leaves, mining=mining, impl="triton")
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    for one, two in zip(first, torch.autograd.grad(loss, leaves), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", FAST_IN_FP16[:2])
@pytest.mark.parametrize("mining", ["all", "hardest"])
def test_one_number_arrives_at_all_rows(mining, dtype):
    """The number has stride 0 and may be 0 itself: the unit of the gradients in fp16 is taken from it."""
    leaves = [x.requires_grad_() for x in Case(40, 60, 48).inputs(dtype)]
    for arriving in (1.0, 0.0):
        actual, expected = (
            torch.autograd.grad(
                mmkernels.triplet(*leaves, mining=mining, reduction="none", impl=impl),
                leaves,
                torch.tensor(arriving).expand(40),
            )
            for impl in ("triton", "reference")
        )
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-3 if dtype == torch.float16 else 1e-5, atol=1e-5)


def test_a_key_that_is_the_worst_of_all():
    """More entries in a row of the sparse gradient than one step of its product takes."""
    queries, keys = Case(50, 60, 32).inputs(torch.float32)
    keys[55] = 2.0
    queries = queries.abs()
    options = {"mining": "hardest"}
    exact = run(queries.double(), keys.double(), "reference", **options)
    assert (exact[2][55].abs().sum() > 10).all()
    assert_results(run(queries, keys, "triton", **options), exact, exact, queries, keys, **options)
