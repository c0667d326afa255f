"""distillation on the CPU: numbers, gradients and memory; tests/contract.py has the rest."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import mmkernels
from mmkernels.distillation import ops as distillation_ops
from mmkernels.distillation.api import distillation_losses
from mmkernels.testing import assert_within_budget, features
from tests.cpu_kernels import DTYPES, assert_same_bits, each_case, needs_library
from tests.distillation.cases import CASES, Case, assert_results, check_case, run
from tests.op_arguments import last_arguments, output_masks


@each_case(CASES)
def test_cpu_matches_float64(case, dtype):
    check_case(case, dtype, "cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_eager_code(case):
    check_case(case, torch.float32, "reference")
    # The oracle itself, against the lines that it stands for.
    inputs, options = [x.double() for x in case.inputs(torch.float32)], (case.scale, case.teacher_scale, case.symmetric)
    for a, b in zip(run(inputs, *options, "reference"), run(inputs, *options, "eager"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("impl", [pytest.param("cpu", marks=needs_library), "reference"])
def test_a_student_equal_to_its_teacher(impl):
    """The loss is the teacher's entropy, the least there is, and the gradient 0."""
    queries, keys, *_ = Case(300, 300, 48, 48).inputs(torch.float32)
    leaves = queries.clone().requires_grad_(), keys.clone().requires_grad_(), torch.tensor(30.0, requires_grad=True)
    losses = mmkernels.distillation(*leaves, queries, keys, 30.0, reduction="none", impl=impl)
    logits = 30 * queries.double() @ keys.double().T
    entropies = [torch.special.entr(x.softmax(1)).sum(1) for x in (logits, logits.T)]
    torch.testing.assert_close(losses.double(), sum(entropies) / 2, rtol=1e-5, atol=1e-6)
    for grad in torch.autograd.grad(losses.sum(), leaves):
        assert grad.abs().max() < 2e-5


def one_sided(rows: float) -> tuple[torch.Tensor, ...]:
    return torch.ones(300, 1), torch.linspace(-rows, rows, 300)[:, None]


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        pytest.param((torch.ones(65, 8), torch.ones(65, 8)), one_sided(1.0), id="all of the student's logits equal"),
        pytest.param(one_sided(1e4), one_sided(1e4), id="columns far apart"),
        pytest.param(one_sided(1e4)[::-1], one_sided(1e4)[::-1], id="rows far apart"),
        pytest.param(one_sided(1e4), one_sided(-1e4), id="a student that is sure of the opposite"),
        pytest.param(one_sided(1e4), one_sided(1.0), id="the student's columns far apart"),
        pytest.param(one_sided(1e4)[::-1], one_sided(1.0)[::-1], id="the student's rows far apart"),
        pytest.param(one_sided(1.0), one_sided(1e4), id="the teacher's columns far apart"),
        pytest.param(one_sided(1.0)[::-1], one_sided(1e4)[::-1], id="the teacher's rows far apart"),
        pytest.param((1e4 * torch.eye(40), torch.eye(40)), (torch.eye(40), torch.eye(40)), id="1e4 on the diagonal"),
        pytest.param((torch.full((33, 1), -90.0), torch.ones(33, 1)), one_sided(3.0), id="every logit at -90"),
    ],
)
@needs_library
def test_extreme_logits(student, teacher):
    n = len(student[0])
    inputs = (*student, *(x[:n] for x in teacher))
    exact = run(tuple(x.double() for x in inputs), 1.0, 1.0, True, "reference")
    assert_results(run(inputs, 1.0, 1.0, True, "cpu"), run(inputs, 1.0, 1.0, True, "eager"), exact, inputs, 1.0)


@needs_library
def test_losses_near_zero_keep_their_digits():
    """The last tile of 9 x 9 has logits that all come near its largest, and eager's loss is next to 0."""
    case = Case(777, 777, 256, 256, scale=100.0, teacher_scale=100.0, near=0.95, teacher_near=0.95)
    check_case(case, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_strides_are_honoured(dtype):
    wide = features(130, 400, dtype)
    parts = [wide[:, :96], wide[:, 101:197], wide[:, 200:280], wide[:, 301:381]]
    copies = [x.contiguous() for x in parts]
    for a, b in zip(run(parts, 10.0, 20.0, True, "cpu"), run(copies, 10.0, 20.0, True, "cpu"), strict=True):
        # Keys are read in place or packed: the same products, but for the order of the sums over D.
        torch.testing.assert_close(a, b, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=2e-3)


@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
@needs_library
def test_only_the_gradients_that_are_needed(mask):
    queries, keys, *teacher = Case(300, 300, 70, 30).inputs(torch.float32)
    results = []
    for needed in ((True, True, True), mask):
        leaves = [queries.clone(), keys.clone(), torch.tensor(10.0)]
        for leaf, of_leaf in zip(leaves, needed, strict=True):
            leaf.requires_grad_(of_leaf)
        with output_masks() as asked:
            mmkernels.distillation(*leaves, *teacher, 20.0, impl="cpu").backward()
        assert asked == [list(needed)]
        results.append([leaf.grad for leaf in leaves])
    for needed, full, part in zip(mask, *results, strict=True):
        assert (part is not None) == needed
        if needed:
            assert torch.equal(part, full)


@needs_library
def test_weights_and_reductions():
    queries, keys, *teacher = Case(100, 120, 30, 20).inputs(torch.float32)
    arguments = (queries, keys, 7.0, *teacher, torch.tensor([9.0]))
    targets = (9 * teacher[0] @ teacher[1].T).softmax(1)
    rows = F.cross_entropy(7 * queries @ keys.T, targets, reduction="none")
    weights = torch.linspace(0, 2, 100)
    losses = mmkernels.distillation(*arguments, symmetric=False, reduction="none")
    torch.testing.assert_close(losses, rows)
    torch.testing.assert_close(mmkernels.distillation(*arguments, symmetric=False), rows.mean())
    weighted = mmkernels.distillation(*arguments, symmetric=False, weights=weights)
    torch.testing.assert_close(weighted, (rows * weights).sum() / weights.sum())


@needs_library
def test_one_number_arrives_at_all_rows():
    """The gradient of a sum has stride 0."""
    *leaves, teacher_queries, teacher_keys = Case(40, 40, 48, 16).inputs(torch.float32)
    leaves = [x.requires_grad_() for x in leaves]
    arriving = [torch.tensor(x).expand(40) for x in (1.0, 2.0)]
    actual, expected = (
        torch.autograd.grad(
            distillation_losses(*leaves, 10.0, teacher_queries, teacher_keys, 20.0, impl=impl), leaves, arriving
        )
        for impl in ("cpu", "reference")
    )
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@needs_library
def test_no_gradient_reaches_the_teacher():
    inputs = [x.requires_grad_() for x in Case(20, 20, 8, 8).inputs(torch.float32)]
    teacher_scale = torch.tensor(5.0, requires_grad=True)
    for impl in ("cpu", "reference"):
        mmkernels.distillation(*inputs[:2], 5.0, *inputs[2:], teacher_scale, impl=impl).backward()
        assert inputs[0].grad is not None
        assert inputs[2].grad is inputs[3].grad is teacher_scale.grad is None


@needs_library
def test_same_bits_whatever_the_number_of_threads():
    inputs = Case(900, 900, 64, 48).inputs(torch.bfloat16)
    assert_same_bits(lambda: run(inputs, 20.0, 30.0, True, "cpu"))


@pytest.mark.parametrize("where", range(4))
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@needs_library
def test_nan_in_nan_out(where, value):
    inputs = list(Case(300, 300, 40, 40).inputs(torch.float32))
    inputs[where][7, 3] = value
    distilled, matched, *grads = run(inputs, 10.0, 20.0, True, "cpu")
    assert distilled[7].isnan()
    assert where > 1 or not matched[7].isfinite()
    assert all(not grad.isfinite().all() for grad in grads)
    assert grads[2].isnan()


@each_case(CASES)
def test_products_kept_or_made_again_give_the_same_bits(case, dtype, monkeypatch):
    def results(keep):
        monkeypatch.setattr(distillation_ops, "keeps_products", lambda *_: keep)
        return run(case.inputs(dtype), case.scale, case.teacher_scale, case.symmetric, "cpu")

    for a, b in zip(results(True), results(False), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@needs_library
def test_products_are_kept_where_they_are_small():
    """The student's and the teacher's no larger than 64 MiB."""

    def kept(n, m):
        queries, keys = features(n, 128, seed=1).requires_grad_(), features(m, 128, seed=2)
        with last_arguments() as keep:
            mmkernels.distillation(queries, keys, 10.0, queries.detach(), keys, 20.0, impl="cpu", symmetric=False)
        assert keep in ([True], [False]), keep
        return keep[0]

    assert kept(2048, 4096)  # 64 MiB
    assert not kept(2048, 4097)


@pytest.mark.parametrize("fault", ["zero", "another teacher"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_budget_fails_for(fault, dtype):
    case = Case(257, 257, 64, 64)
    inputs, options = case.inputs(dtype), (case.scale, case.teacher_scale, case.symmetric)
    exact = run(tuple(x.double() for x in inputs), *options, "reference")
    eager = run(inputs, *options, "eager")
    if fault == "zero":
        wrong = [torch.zeros_like(x) for x in eager]
    else:
        wrong = run((*inputs[:3], inputs[3].roll(1, 0)), *options, "reference")
    for index, (a, b, c) in enumerate(zip(wrong, eager, exact, strict=True)):
        if index == 1 and fault != "zero":
            continue  # the loss against the diagonal does not see the teacher
        with pytest.raises(AssertionError, match=r"error .* budget"):
            assert_within_budget(a.to(b.dtype), b, c, dtype=dtype)
