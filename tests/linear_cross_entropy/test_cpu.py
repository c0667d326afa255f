"""linear_cross_entropy on the CPU: numbers, gradients and memory; tests/contract.py has the rest."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import mmkernels
from mmkernels.linear_cross_entropy import ops
from mmkernels.testing import assert_within_budget, features
from tests.cpu_kernels import DTYPES, EXTREMES, assert_same_bits, each_case, needs_library, strided_pairs
from tests.linear_cross_entropy.cases import CASES, Case, assert_results, check_case, run, run_eager


def in_double(hidden, weight, bias, targets):
    return hidden.double(), weight.double(), None if bias is None else bias.double(), targets


@each_case(CASES)
def test_cpu_matches_float64(case, dtype):
    check_case(case, dtype, "cpu")


@each_case(CASES)
def test_products_kept_or_made_again_give_the_same_bits(case, dtype, monkeypatch):
    inputs = case.inputs(dtype)
    kept = run(*inputs, "cpu", **case.options)
    monkeypatch.setattr(ops, "_keeps_products", lambda *_: False)
    for a, b in zip(kept, run(*inputs, "cpu", **case.options), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_eager_code(case):
    inputs = in_double(*case.inputs(torch.float32))
    for a, b in zip(run(*inputs, "reference", **case.options), run_eager(*inputs, **case.options), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("hidden", "weight"), EXTREMES)
@needs_library
def test_extreme_logits(hidden, weight):
    inputs = (hidden, weight, None, torch.arange(len(hidden)))
    exact = run(*in_double(*inputs), "reference")
    assert_results(run(*inputs, "cpu"), run_eager(*inputs), exact, hidden, weight)


@pytest.mark.parametrize("largest", [99.0, 100.0, 101.0, 117.0])
@needs_library
def test_digits_at_large_logits(largest):
    """Whole logits are exact in float32, so what is left is the softmax's own error.

    A loss of lse - positive, or probabilities from one float32 lse, would be off by up to 4e-6 at logits of 100.
    """
    inputs = (torch.ones(7, 1), largest - torch.arange(7.0)[:, None], torch.zeros(7), torch.arange(7))
    exact = run(*in_double(*inputs), "reference")
    losses, grad_hidden, grad_weight, grad_bias = run(*inputs, "cpu")
    assert (losses.double() - exact[0]).abs().max() < 5e-7
    assert (grad_hidden.double() - exact[1]).abs().max() < 5e-7 * largest
    assert (grad_weight.double() - exact[2]).abs().max() < 5e-7
    assert (grad_bias.double() - exact[3]).abs().max() < 5e-7


@pytest.mark.parametrize("masked", [range(1, 300), range(256, 300), range(0, 300, 2)], ids=str)
@needs_library
def test_classes_that_a_bias_of_minus_infinity_masks(masked):
    """Whole panels of the weight may have no class that counts."""
    hidden, weight, _, _ = Case(70, 300, 16).inputs(torch.float32)
    bias = torch.zeros(300)
    bias[list(masked)] = -torch.inf
    allowed = torch.tensor(sorted(set(range(300)) - set(masked)))
    inputs = (hidden, weight, bias, allowed[torch.arange(70) % len(allowed)])
    exact = run(*in_double(*inputs), "reference")
    actual = run(*inputs, "cpu")
    assert_results(actual, run_eager(*inputs), exact, hidden, weight)
    assert (actual[2][list(masked)] == 0).all()
    forbidden = torch.full((70,), masked[0])
    assert (run(hidden, weight, bias, forbidden, "cpu")[0] == torch.inf).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_strides_are_honoured(dtype):
    wide = features(130, 200, dtype)
    targets = torch.arange(130) % 65
    bias = torch.linspace(-1, 1, 260)[::2]
    for hidden, weight in strided_pairs(wide):
        rest = (bias[: len(weight)], targets[: len(hidden)])
        in_place = run(hidden, weight, *rest, "cpu")
        copied = run(hidden.contiguous(), weight.contiguous(), *(x.contiguous() for x in rest), "cpu")
        for a, b in zip(in_place, copied, strict=True):
            # Hidden rows are read in place or packed: the same products, but for the order of the sums over D.
            torch.testing.assert_close(a, b, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=2e-3)


@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [70, 260])  # the products of wide features are kept
@needs_library
def test_only_the_gradients_that_are_needed(mask, dtype, size):
    *leaves, targets = Case(300, 310, size, ignored="some").inputs(dtype)
    everything = run(*leaves, targets, "cpu")[1:]
    for leaf, needed in zip(leaves, mask, strict=True):
        leaf.requires_grad_(needed)
    losses = mmkernels.linear_cross_entropy(*leaves[:2], targets, bias=leaves[2], reduction="none", impl="cpu")
    (losses * torch.linspace(0.5, 1.5, 300)).sum().backward()
    for leaf, needed, full in zip(leaves, mask, everything, strict=True):
        assert (leaf.grad is not None) == needed
        if needed:
            assert leaf.grad.dtype == dtype
            assert torch.equal(leaf.grad, full)


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("impl", ["cpu", "reference"])
@needs_library
def test_reductions_are_torchs(impl, reduction, ignored):
    """All ignored: the mean is NaN, and every gradient is 0, as in torch."""
    *leaves, targets = Case(100, 120, 30, ignored=ignored, options={"label_smoothing": 0.1}).inputs(torch.float32)
    results = []
    for loss in (
        lambda h, w, b: mmkernels.linear_cross_entropy(h, w, targets, bias=b, reduction=reduction, impl=impl),
        lambda h, w, b: F.cross_entropy(F.linear(h, w, b), targets, reduction=reduction),
    ):
        inputs = [x.detach().clone().requires_grad_() for x in leaves]
        value = loss(*inputs)
        results.append([value.detach(), *torch.autograd.grad(value.sum(), inputs)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, equal_nan=True, rtol=1e-4, atol=1e-6)


@needs_library
def test_what_is_ignored_is_not_even_read():
    """Rows of NaN under ignored targets: the losses and gradients of the others are those without them."""
    hidden, weight, bias, targets = Case(300, 200, 40, ignored="some").inputs(torch.float32)
    counted = targets != -100
    hidden[~counted] = torch.nan
    losses, grad_hidden, grad_weight, grad_bias = run(hidden, weight, bias, targets, "cpu")
    assert (losses[~counted] == 0).all()
    assert (grad_hidden[~counted] == 0).all()
    leaves = [hidden[counted].requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    alone = F.cross_entropy(F.linear(*leaves), targets[counted], reduction="none")
    weights = torch.linspace(0.5, 1.5, 300)[counted]
    expected = torch.autograd.grad((alone * weights).sum(), leaves)
    torch.testing.assert_close(losses[counted], alone)
    for actual, right in zip((grad_hidden[counted], grad_weight, grad_bias), expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-4, atol=1e-5)


@needs_library
def test_a_weight_tied_to_the_embedding():
    tokens, targets = torch.arange(50) % 30, torch.arange(50) % 29
    grads = []
    for loss in (
        lambda h, w: mmkernels.linear_cross_entropy(h, w, targets, impl="cpu"),
        lambda h, w: F.cross_entropy(F.linear(h, w), targets),
    ):
        weight = features(30, 16, seed=3).requires_grad_()
        loss(3 * F.embedding(tokens, weight), weight).backward()
        grads.append(weight.grad)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


@needs_library
def test_same_bits_whatever_the_number_of_threads():
    inputs = Case(900, 3000, 64, ignored="some").inputs(torch.bfloat16)
    assert_same_bits(lambda: run(*inputs, "cpu", label_smoothing=0.1))


@pytest.mark.parametrize("where", ["hidden", "weight", "bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@needs_library
def test_nan_in_nan_out(where, value):
    hidden, weight, bias, targets = Case(300, 600, 40).inputs(torch.float32)
    {"hidden": hidden, "weight": weight, "bias": bias[:, None]}[where][7, 0] = value
    actual, eager = run(hidden, weight, bias, targets, "cpu"), run_eager(hidden, weight, bias, targets)
    for a, b in zip(actual, eager, strict=True):
        assert (b.isfinite() | ~a.isfinite()).all()  # where eager gives no number, neither does the kernel
    if where == "hidden":
        assert not actual[0][7].isfinite()
        assert torch.equal(actual[0].isfinite(), torch.arange(300) != 7)
        assert torch.equal(actual[1].isfinite().all(1), torch.arange(300) != 7)
        assert actual[3].isnan().all()
    elif value != value:
        assert not actual[0].isfinite().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_products_are_kept_where_they_are_small(dtype):
    """No larger than the weight and its gradient or 64 MiB, and only if a gradient can be asked for."""

    def kept(n, v, d, learns=True):
        hidden, weight, _, targets = Case(n, v, d, bias=False).inputs(dtype)
        hidden.requires_grad_(learns)
        held = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.nbytes) or x, lambda x: x):
            mmkernels.linear_cross_entropy(hidden, weight, targets, impl="cpu")
        return 4 * n * v in held

    assert kept(1024, 16384, 64)  # 64 MiB
    assert not kept(1025, 16384, 64)
    assert not kept(1024, 16384, 64, learns=False)
    rows = 2 * 600 * torch.empty((), dtype=dtype).element_size() // 4
    assert kept(rows, 30000, 600)  # as the weight and its gradient
    assert not kept(rows + 1, 30000, 600)
    with torch.no_grad():
        assert not kept(64, 64, 64)


@pytest.mark.parametrize("fault", ["zero", "off by one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_budget_fails_for(fault, dtype):
    inputs = Case(257, 300, 64).inputs(dtype)
    exact, eager = run(*in_double(*inputs), "reference"), run_eager(*inputs)
    if fault == "zero":
        wrong = [torch.zeros_like(x) for x in eager]
    else:
        wrong = run(*inputs[:3], (inputs[3] + 1) % 300, "reference")
    for a, b, c in zip(wrong, eager, exact, strict=True):
        with pytest.raises(AssertionError, match=r"error .* budget"):
            assert_within_budget(a.to(b.dtype), b, c, dtype=dtype)
