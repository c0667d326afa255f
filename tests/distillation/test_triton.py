"""The Triton kernels of distillation in Triton's interpreter, on CPU tensors: parity, extremes, and guard bands.

tests/conftest.py runs this file in a process of its own, where the interpreter is chosen before Triton is imported.
Every tensor that the kernels read or write lies between guards of NaN, and every one they allocate starts as NaN.
"""

import pytest
import torch

import mmkernels
from mmkernels._tiles import configs, launch, products
from mmkernels.distillation import triton_kernels as distillation
from mmkernels.distillation.api import distillation_losses
from tests.distillation.cases import Case, assert_results, run
from tests.interpreting import DTYPES, FAST_IN_FP16, guarded_allocations, guarded_rows, inexact_exp2
from tests.sums import sums_as_in

TILE = configs.DISTILLATION_CONFIGS["interpreter"]["half"].forward.block_m

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    yield from guarded_allocations(monkeypatch, launches=False)


def check(case: Case, dtype: torch.dtype = torch.float32, factors: tuple = (1.0, 1.0, 1.0, 1.0)) -> list:
    """The kernels against float64 on the same inputs, within the error of eager in their dtype."""
    inputs = [guarded_rows(x * factor) for x, factor in zip(case.inputs(dtype), factors, strict=True)]
    options = (case.scale, case.teacher_scale, case.symmetric)
    exact = run([x.double() for x in inputs], *options, "reference")
    actual = run(inputs, *options, "triton")
    with sums_as_in("triton"):
        eager = run(inputs, *options, "eager")
    assert_results(actual, eager, exact, inputs, case.scale)
    return actual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, TILE - 1, TILE, 77])
def test_sizes(N, dtype):
    check(Case(N, N, 48, 64), dtype)


@pytest.mark.parametrize(("D", "teacher_D"), [(1, 3), (100, 33), (33, 130)])
def test_any_number_of_features(D, teacher_D):
    check(Case(33, 33, D, teacher_D))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_alone(dtype):
    check(Case(45, 70, 48, 32, symmetric=False), dtype)
    check(Case(70, 45, 48, 32, symmetric=False), dtype)


@pytest.mark.parametrize("dtype", FAST_IN_FP16[:2])
def test_one_number_arrives_at_all_rows(dtype):
    """The gradient of a mean has stride 0 and may be 0 itself: the unit of the gradients in fp16 is taken from it."""
    inputs = Case(40, 40, 48, 16).inputs(dtype)
    leaves = [x.requires_grad_() for x in inputs[:2]]
    for of_distilled, of_matched in ((1.0, 2.0), (1.0, 0.0), (0.0, 1.0), (0.0, 0.0)):
        actual, expected = (
            torch.autograd.grad(
                distillation_losses(*leaves, 10.0, *inputs[2:], 20.0, True, impl),
                leaves,
                [torch.tensor(x).expand(40) for x in (of_distilled, of_matched)],
            )
            for impl in ("triton", "reference")
        )
        for a, b in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-2 if dtype == torch.float16 else 1e-4)


@pytest.mark.parametrize("dtype", FAST_IN_FP16)
def test_several_groups_strips_and_splits(dtype, monkeypatch):
    """More tiles than one program takes: every loop runs more than once, the last time over less."""
    monkeypatch.setattr(launch, "MAX_PARTIALS", 2)
    monkeypatch.setattr(products, "_STRIP_BYTES", 1)
    monkeypatch.setattr(products, "_STRIP_ROWS", TILE)
    check(Case(4 * TILE + 9, 4 * TILE + 9, 40, 32), dtype)


@pytest.mark.parametrize(("high", "flat"), [(0, False), (2, True)])
def test_other_slots_of_rows(high, flat, monkeypatch):
    """A slot of one row, and of four, and a loop over tiles around one over features: as some GPUs take them."""
    monkeypatch.setattr(launch, "MAX_PARTIALS", 2)
    monkeypatch.setattr(distillation, "forward_flags", lambda tile, family: {"SLOT_HIGH": high, "FLAT": flat})
    monkeypatch.setattr(distillation, "strip_flags", lambda family: {"FLAT": flat})
    check(Case(4 * TILE, 4 * TILE, 16, 40))
    strength = torch.ones(4 * TILE, 1)
    strength[::3] = 40  # rows that lie far below others of their slot are made again
    check(Case(4 * TILE, 4 * TILE, 16, 40, scale=1.0, teacher_scale=1.0), factors=(strength, 1.0, 1.0, 1.0))
    check(Case(4 * TILE, 4 * TILE, 16, 40, scale=1.0, teacher_scale=1.0), factors=(1.0, 1.0, strength, 1.0))


@pytest.mark.parametrize("near", [-0.2, 0.98])
def test_temperature_of_a_hundredth(near):
    """The last tile is square: there all rows come near its maximum, as in the large tiles of a GPU."""
    check(Case(TILE + 9, TILE + 9, 64, 64, scale=100.0, teacher_scale=100.0, near=near, teacher_near=0.98))


@pytest.mark.parametrize(("scale", "near"), [(20.0, 0.5), (100.0, 0.3), (100.0, 0.95)])
def test_exponentials_as_inexact_as_a_gpu_may_take_them(scale, near, monkeypatch):
    inexact_exp2(monkeypatch)
    check(Case(77, 77, 64, 48, scale=scale, teacher_scale=scale, near=near, teacher_near=near))


def test_equal_logits_of_any_size():
    """The log-sum-exp less the logit, at -9000: to the digits of what is left."""
    inputs = torch.full((33, 1), -9000.0), torch.ones(33, 1), torch.ones(33, 1), torch.linspace(-3, 3, 33)[:, None]
    for losses in run(inputs, 1.0, 1.0, True, "triton")[:2]:
        torch.testing.assert_close(losses, torch.full((33,), 33.0).log(), rtol=1e-6, atol=0)


def test_tiles_whose_rows_and_columns_lie_far_apart():
    """No constant serves the exponentials of such a tile: the other branch runs, forward and backward."""
    strength = torch.logspace(-1, 2.5, 40)[:, None]
    case = Case(40, 40, 32, 32, scale=1.0, teacher_scale=1.0)
    for place in range(4):
        factors = [torch.ones(40, 1)] * 4
        factors[place] = strength
        check(case, factors=tuple(factors))


@pytest.mark.parametrize("far", ["student", "teacher"])
def test_tiles_whose_columns_alone_lie_far_apart(far):
    """Every row reaches the maximum of the tile, and most columns do not come near it."""
    sides = [torch.ones(40, 1), torch.linspace(-1, 1, 40)[:, None]] * 2
    place = 1 if far == "student" else 3
    sides[place] = 1e3 * sides[place]
    exact = run([x.double() for x in sides], 1.0, 1.0, True, "reference")
    assert_results(run(sides, 1.0, 1.0, True, "triton"), run(sides, 1.0, 1.0, True, "eager"), exact, sides, 1.0)


def test_a_student_equal_to_its_teacher():
    queries, keys, *_ = Case(40, 40, 32, 32).inputs(torch.float32)
    distilled, _, *_ = run((queries, keys, queries, keys), 30.0, 30.0, True, "triton")
    logits = 30 * queries.double() @ keys.double().T
    entropies = sum(torch.special.entr(x.softmax(1)).sum(1) for x in (logits, logits.T)) / 2
    torch.testing.assert_close(distilled.double(), entropies, rtol=1e-5, atol=1e-6)
    leaves = queries.clone().requires_grad_(), keys.clone().requires_grad_()
    loss = mmkernels.distillation(*leaves, 30.0, queries, keys, 30.0, impl="triton", reduction="sum")
    for grad in torch.autograd.grad(loss, leaves):
        assert grad.abs().max() < 2e-5


@pytest.mark.parametrize("where", range(4))
def test_nan_is_not_hidden(where):
    inputs = list(Case(40, 40, 16, 16).inputs(torch.float32))
    inputs[where][3, 5] = torch.nan
    distilled, matched, *grads = run(inputs, 10.0, 20.0, True, "triton")
    assert distilled.isnan().all()
    assert matched.isnan().all() == (where < 2)
    assert all(grad.isnan().all() for grad in grads)


def test_tiny_gradients_do_not_vanish_in_fp16():
    inputs = Case(40, 40, 32, 16).inputs(torch.float16)
    scale = torch.tensor(20.0, requires_grad=True)
    loss = mmkernels.distillation(*inputs[:2], scale, *inputs[2:], 20.0, impl="triton")
    (grad,) = torch.autograd.grad(loss, scale, retain_graph=True)
    (tiny,) = torch.autograd.grad(loss * 2.0**-30, scale)
    assert grad != 0
    assert torch.equal(tiny * 2.0**30, grad)


def test_only_what_is_asked_for():
    inputs = Case(40, 40, 48, 16).inputs(torch.float32)
    arguments = (inputs[0], inputs[1], torch.tensor(10.0), inputs[2], inputs[3], torch.tensor(20.0))
    distilled, matched, *kept = distillation.distillation_forward(*arguments, True, False)
    grads = torch.ones_like(distilled), torch.ones_like(matched)
    results = {}
    for bits in (7, 1, 2, 4, 6):
        mask = [bool(bits & 1), bool(bits & 2), bool(bits & 4)]
        results[bits] = distillation.distillation_backward(*grads, *arguments, *kept, True, mask)
        for index, grad in enumerate(results[bits]):
            if not mask[index]:
                assert grad.shape == (0,)
            else:  # the scale's may be another order of the same sum
                torch.testing.assert_close(grad, results[7][index], rtol=1e-5, atol=1e-6)
