"""siglip on the CPU: numbers, gradients and memory; tests/contract.py has the rest."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import mmkernels
from mmkernels.testing import assert_within_budget, features
from tests.contract import Memory, check_memory
from tests.cpu_kernels import DTYPES, assert_same_bits, each_case, needs_library, strided_pairs
from tests.op_arguments import output_masks
from tests.siglip.cases import (
    CASES,
    REDUCTIONS,
    Case,
    assert_results,
    check_block,
    check_case,
    oracles,
    row_weights,
    run,
    run_eager,
)
from tests.siglip.spec import SIGLIP, pairs


@each_case(CASES)
def test_cpu_matches_float64(case, dtype):
    check_case(case, dtype, "cpu")


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("match_offset", [0, 60, 299, 300])
def test_a_block_of_the_keys(match_offset, dtype):
    check_block("cpu", dtype, 270, 300, match_offset)
    check_block("cpu", dtype, 300, 70, match_offset)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_eager_code(case, reduction):
    queries, keys, scale, bias = case.inputs(torch.float64)
    exact = run(queries, keys, scale, bias, "reference", reduction)
    for a, b in zip(exact, run_eager(queries, keys, scale, bias, reduction), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("queries", "keys", "bias"),
    [
        pytest.param(torch.ones(65, 8), torch.ones(65, 8), 0.0, id="all logits equal"),
        pytest.param(1e4 * torch.eye(40), torch.eye(40), 0.0, id="logits of 1e4 on the diagonal"),
        pytest.param(-1e4 * torch.eye(40), torch.eye(40), 0.0, id="logits of -1e4 on the diagonal"),
        pytest.param(torch.linspace(-1e4, 1e4, 300)[:, None], torch.ones(300, 1), 0.0, id="rows far apart"),
        pytest.param(torch.ones(300, 1), torch.linspace(-1e4, 1e4, 300)[:, None], 0.0, id="columns far apart"),
        pytest.param(torch.ones(33, 1), torch.ones(33, 1), -90.0, id="every logit at -89"),
        pytest.param(torch.ones(33, 1), torch.ones(40, 1), 1e4, id="every logit at 10001"),
    ],
)
@pytest.mark.parametrize("reduction", ["none", "sum"])
@needs_library
def test_extreme_logits(queries, keys, bias, reduction):
    inputs = (queries, keys, 1.0, bias)
    assert_results(run(*inputs, "cpu", reduction), *oracles(*inputs, reduction), *inputs, reduction)


@pytest.mark.parametrize("logit", [-60.0, -30.0, -16.0, -10.0, -3.0, -0.5, 0.0, 0.5, 3.0, 10.0, 30.0, 60.0])
@pytest.mark.parametrize("match", [True, False])
@needs_library
def test_the_digits_of_one_pair(logit, match):
    """A pair at the bias that SigLIP starts from costs 4.5e-5, others 1e-26: to a few units in the last place."""
    queries = torch.ones(1, 1, requires_grad=True)
    # A key that matches the query at no cost takes no part where the pair at hand is the other one.
    keys = torch.tensor([[logit]] if match else [[200.0], [logit]])
    loss = mmkernels.siglip(queries, keys, 1.0, reduction="sum", impl="cpu")
    y = torch.tensor(-logit if match else logit, dtype=torch.float64)
    slope = torch.sigmoid(y) * (-logit if match else logit)
    (grad,) = torch.autograd.grad(loss, queries)
    assert abs(loss.double() - F.softplus(y, threshold=100)) <= 3e-7 * F.softplus(y, threshold=100)
    assert abs(grad.double() - slope) <= 4e-7 * slope.abs()


@needs_library
def test_small_losses_beside_a_large_one():
    """20000 pairs of 1e-6 each, none of which a float32 sum that has come to 1000 would notice."""
    keys = torch.full((20001, 1), -13.8)
    keys[0] = -1000.0  # the match
    inputs = (torch.ones(1, 1), keys, 1.0, 0.0)
    assert_results(run(*inputs, "cpu"), *oracles(*inputs), *inputs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_strides_are_honoured(dtype):
    wide = features(130, 200, dtype)
    for queries, keys in strided_pairs(wide):
        for reduction in ("none", "mean"):
            in_place = run(queries, keys, 10.0, -10.0, "cpu", reduction)
            copied = run(queries.contiguous(), keys.contiguous(), 10.0, -10.0, "cpu", reduction)
            for a, b in zip(in_place, copied, strict=True):
                # Keys are read in place or packed: the same products, but for the order of the sums over D.
                torch.testing.assert_close(a, b, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=2e-3)


@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=4))[:-1], ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@needs_library
def test_only_the_gradients_that_are_needed(mask, reduction):
    for dtype in (torch.float32, torch.bfloat16):
        queries, keys, scale, bias = Case(300, 310, 70).inputs(dtype)
        everything = run(queries, keys, scale, bias, "cpu", reduction)
        leaves = [queries, keys, torch.tensor(scale), torch.tensor(bias)]
        for leaf, needed in zip(leaves, mask, strict=True):
            leaf.requires_grad_(needed)
        with output_masks() as asked:
            loss = mmkernels.siglip(*leaves, reduction=reduction, impl="cpu")
            assert torch.equal(loss, everything[0])
            weights = row_weights(300) if reduction == "none" else torch.tensor(0.75)
            (loss * weights).sum().backward()
        assert asked == [list(mask)]
        for leaf, needed, full in zip(leaves, mask, everything[1:], strict=True):
            assert (leaf.grad is not None) == needed
            if needed:
                assert leaf.grad.dtype == leaf.dtype
                assert torch.equal(leaf.grad, full)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_the_loss_is_the_same_with_gradients_and_without(dtype):
    queries, keys, scale, bias = Case(300, 310, 70).inputs(dtype)
    losses = mmkernels.siglip(queries, keys, scale, bias, reduction="none", impl="cpu")
    assert losses.shape == (300,)
    for reduction, expected in (("mean", losses.mean()), ("sum", losses.sum())):
        assert torch.equal(mmkernels.siglip(queries, keys, scale, bias, reduction=reduction, impl="cpu"), expected)
        learning = mmkernels.siglip(queries.requires_grad_(), keys, scale, bias, reduction=reduction, impl="cpu")
        assert torch.equal(learning, expected)
        with torch.no_grad():
            assert not mmkernels.siglip(queries, keys, scale, bias, reduction=reduction, impl="cpu").requires_grad


@needs_library
def test_gradients_are_made_in_the_forward_pass_only_where_they_can_be_asked_for():
    """Loss without gradients: one product. With them: one pass makes both, and the backward pass none."""
    calls = []

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            calls.extend(name for name in ("losses", "gradients") if f"siglip_cpu_{name}" in str(function))
            return function(*arguments, **(options or {}))

    queries, keys, *_ = Case(30, 30, 16).inputs(torch.float32)
    with Counting():
        for reduction in REDUCTIONS:
            mmkernels.siglip(queries, keys, 1.0, impl="cpu", reduction=reduction)
        assert calls == ["losses"] * 3
        calls.clear()
        with torch.no_grad():
            mmkernels.siglip(queries.requires_grad_(), keys, 1.0, impl="cpu")
        assert calls == ["losses"]
        calls.clear()
        loss = mmkernels.siglip(queries, keys, 1.0, impl="cpu")
        assert calls == ["gradients"]
        loss.backward()
        assert calls == ["gradients"]
        calls.clear()
        mmkernels.siglip(queries, keys, 1.0, reduction="none", impl="cpu").sum().backward()
        assert calls == ["losses", "gradients"]


@needs_library
def test_gradient_of_the_scale_is_the_product_with_the_features():
    """d loss / d scale = <Q, dQ> / scale = <K, dK> / scale: three ways to one number."""
    queries, keys, scale, bias = Case(400, 500, 64).inputs(torch.float32)
    _, grad_queries, grad_keys, grad_scale, _ = run(queries, keys, scale, bias, "cpu")
    by_queries = (queries.double() * grad_queries.double()).sum() / scale
    by_keys = (keys.double() * grad_keys.double()).sum() / scale
    torch.testing.assert_close(by_queries, by_keys, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad_scale.double(), by_queries, rtol=1e-5, atol=1e-7)


@needs_library
def test_same_bits_whatever_the_number_of_threads():
    inputs = Case(1100, 1300, 64).inputs(torch.bfloat16)
    assert_same_bits(lambda: run(*inputs, "cpu", "mean") + run(*inputs, "cpu"))


@pytest.mark.parametrize("where", ["queries", "keys", "scale", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@needs_library
def test_nan_in_nan_out(where, value):
    queries, keys, scale, bias = Case(300, 310, 40).inputs(torch.float32)
    if where in ("queries", "keys"):
        (queries if where == "queries" else keys)[7, 3] = value
    scale, bias = value if where == "scale" else scale, value if where == "bias" else bias
    for reduction in ("none", "mean"):
        actual = run(queries, keys, scale, bias, "cpu", reduction)
        for a, b in zip(actual, run(queries, keys, scale, bias, "reference", reduction), strict=True):
            assert (b.isfinite() | ~a.isfinite()).all()  # where eager gives no number, neither does the kernel
        if where == "queries" and value != value:
            assert torch.equal(actual[1].isfinite().all(1), torch.arange(300) != 7)
            if reduction == "none":
                assert torch.equal(actual[0].isfinite(), torch.arange(300) != 7)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@needs_library
def test_a_pair_at_minus_infinity_costs_nothing(reduction):
    """A key that is infinitely far from every query, at an odd number of them: the bias keeps its gradient."""
    queries, keys, scale, bias = Case(301, 310, 40).inputs(torch.float32)
    queries[:, 3], keys[305, 3] = 1.0, -torch.inf
    actual, exact = (run(queries, keys, scale, bias, impl, reduction) for impl in ("cpu", "reference"))
    for index in (0, 4):
        assert exact[index].isfinite().all()
        torch.testing.assert_close(actual[index], exact[index], rtol=1e-5, atol=0)


@pytest.mark.parametrize("far", [1e-4, 1.0, 3000.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@needs_library
def test_float16_neither_overflows_nor_loses_small_gradients(far, reduction):
    """Gradients of a mean may lie below float16, those of a sum above it, until what arrives scales them."""
    queries, keys, _, bias = Case(500, 500, 16, bias=3.0).inputs(torch.float16)
    scale = torch.tensor(far, requires_grad=True)
    leaves = [queries.requires_grad_(), keys.requires_grad_(), scale]
    loss = mmkernels.siglip(*leaves, bias, reduction=reduction, impl="cpu")
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    exact_loss = mmkernels.siglip(*exact_leaves, bias, reduction=reduction)
    exact = torch.autograd.grad(exact_loss, exact_leaves)
    arriving = 256 / max(float(x.abs().max()) for x in exact[:2])  # as a gradient scaler would have it
    for actual, right in zip(torch.autograd.grad(arriving * loss, leaves), exact, strict=True):
        right = arriving * right
        torch.testing.assert_close(actual.double(), right, rtol=2e-3, atol=1e-3 * right.abs().max().item())


@pytest.mark.slow
@needs_library
def test_65536_pairs_in_the_memory_of_their_inputs_at_any_number_of_threads(threads):
    threads(64)
    check_memory(SIGLIP, Memory(pairs(512), 65536), torch.bfloat16, scratch=0)


@needs_library
def test_scale_and_bias_of_any_form():
    queries, keys, *_ = Case(20, 20, 8).inputs(torch.float32)
    expected = mmkernels.siglip(queries, keys, 3.0, -2.0)
    forms = (lambda x: int(x), torch.tensor, lambda x: torch.tensor([x]), lambda x: torch.tensor([[x]]).double())
    for form in forms:
        assert torch.equal(mmkernels.siglip(queries, keys, form(3.0), form(-2.0)), expected)
    assert torch.equal(mmkernels.siglip(queries, keys, 3.0), mmkernels.siglip(queries, keys, 3.0, 0.0))
    bias = torch.tensor([-2.0], dtype=torch.float16, requires_grad=True)
    mmkernels.siglip(queries, keys, 3.0, bias).backward()
    assert bias.grad.shape == (1,)
    assert bias.grad.dtype == torch.float16


@pytest.mark.parametrize("fault", ["zero", "off by one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_budget_fails_for(fault, dtype):
    queries, keys, scale, bias = Case(257, 257, 64, near=0.9).inputs(dtype)
    exact = run(queries.double(), keys.double(), scale, bias, "reference")
    eager = run_eager(queries, keys, scale, bias)
    if fault == "zero":
        wrong = [torch.zeros_like(x) for x in eager]
    else:
        # Without the bias: its gradient, the sum of all probabilities less one per row, does not see which key matches.
        wrong = run(queries, keys.roll(1, 0), scale, bias, "reference")[:4]
    for a, b, c in zip(wrong, eager, exact, strict=False):
        with pytest.raises(AssertionError, match=r"error .* budget"):
            assert_within_budget(a.to(b.dtype), b, c, dtype=dtype)
