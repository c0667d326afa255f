"""triplet on the CPU: numbers, gradients and memory; tests/contract.py has the rest."""

import pytest
import torch

import mmkernels
from mmkernels.testing import assert_within_budget, features
from tests.cpu_kernels import DTYPES, assert_same_bits, each_case, needs_library, strided_pairs
from tests.op_arguments import output_masks
from tests.triplet.cases import (
    AT_MINUS_INFINITY,
    CASES,
    IN_ONE_PASS,
    MININGS,
    Case,
    assert_results,
    by_hand,
    check_case,
    check_minus_infinity,
    check_no_negative,
    run,
)


@pytest.mark.parametrize("case", [case for case in CASES if case.n * case.m < 20_000], ids=str)
def test_reference_is_what_the_words_say(case):
    queries, keys = case.inputs(torch.float64)
    options = {"margin": 0.2, "symmetric": True, **case.options}
    losses, grad = by_hand(queries, keys, **options)
    actual = run(queries, keys, "reference", "sum", **options)
    expected = (losses.sum(), 0.5 * grad @ keys, 0.5 * grad.T @ queries)  # under the weight of 0.5 that run gives
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(run(queries, keys, "reference", **options)[0], losses, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mining", MININGS)
def test_reference_in_every_dtype(mining, dtype):
    case = Case(100, 120, 40, {"mining": mining})
    queries, keys = case.inputs(dtype)
    exact = run(queries.double(), keys.double(), "reference", **case.options)
    actual = run(queries, keys, "reference", **case.options)
    assert_results(actual, actual, exact, queries, keys, **case.options)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mining", MININGS)
def test_reference_is_that_of_pytorch_metric_learning(mining, symmetric):
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning.distances import DotProductSimilarity
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchEasyHardMiner, BatchHardMiner
    from pytorch_metric_learning.reducers import SumReducer

    distance = DotProductSimilarity(normalize_embeddings=False)
    loss_of = TripletMarginLoss(margin=0.2, distance=distance, reducer=SumReducer())
    # Its semi-hard negatives have no lower bound: one that lies below it costs nothing.
    miner = {
        "all": None,
        "hardest": BatchHardMiner(distance=distance),
        "semi_hard": BatchEasyHardMiner(distance=distance, pos_strategy="easy", neg_strategy="semihard"),
    }[mining]

    def theirs(anchors, others):
        labels, other_labels = torch.arange(len(anchors)), torch.arange(len(others))
        mined = None if miner is None else miner(anchors, labels, others, other_labels)
        return loss_of(anchors, labels, mined, others, other_labels)

    queries, keys = (x.requires_grad_() for x in Case(60, 60, 32, near=1.5).inputs(torch.float64))
    expected = (theirs(queries, keys) + theirs(keys, queries)) / 2 if symmetric else theirs(queries, keys)
    actual = mmkernels.triplet(queries, keys, mining=mining, symmetric=symmetric, reduction="sum", impl="reference")
    assert expected > 1
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    if mining == "all":  # where several negatives are equally bad, they take any one
        leaves = (queries, keys)
        for a, b in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@each_case(CASES)
def test_cpu_matches_float64(case, dtype):
    check_case(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("case", IN_ONE_PASS, ids=str)
@needs_library
def test_losses_and_gradients_in_one_pass(case, reduction, dtype):
    check_case(case, dtype, "cpu", reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [33, 100, 700])
@needs_library
def test_a_negative_like_the_positive_is_an_exact_tie(size, dtype):
    """Similarities of real numbers round, but those of equal keys round alike, wherever they lie."""
    n = 600
    queries = features(n, size, dtype, seed=1)
    keys = features(n, size, dtype, seed=2, like=queries, mean_cosine=0.8)
    copies = torch.cat([keys, keys[torch.arange(n) * 7 % n]])  # keys past the N-th: of each pair a negative like it
    none = {"reduction": "none", "symmetric": False, "impl": "cpu"}
    # Not below the positive, and so no semi-hard negative; at a margin of 0 it costs nothing.
    alone = mmkernels.triplet(queries, keys, margin=1e-7, mining="semi_hard", **none)
    with_copies = mmkernels.triplet(queries, copies, margin=1e-7, mining="semi_hard", **none)
    assert torch.equal(with_copies, alone)
    assert (mmkernels.triplet(queries, copies, margin=0.0, mining="hardest", **none) == alone.new_zeros(n)).any()
    # It costs the margin to the last bit, and is the hardest where no other is above it.
    hardest = mmkernels.triplet(queries, copies, margin=0.25, mining="hardest", **none)
    assert (hardest >= 0.25).all()
    assert (hardest == 0.25).float().mean() > 0.5


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        pytest.param(torch.ones(65, 8), torch.ones(65, 8), id="all similarities equal"),
        pytest.param(1e4 * torch.eye(40), torch.eye(40), id="1e4 on the diagonal"),
        pytest.param(-1e4 * torch.eye(40), torch.eye(40), id="-1e4 on the diagonal"),
        pytest.param(torch.linspace(-1e4, 1e4, 300)[:, None], torch.ones(300, 1), id="rows far apart"),
        pytest.param(torch.ones(300, 1), torch.linspace(-1e4, 1e4, 300)[:, None], id="columns far apart"),
    ],
)
@needs_library
def test_extreme_similarities(queries, keys, mining):
    for reduction in ("none", "mean"):
        exact = run(queries.double(), keys.double(), "reference", reduction, mining=mining)
        eager = run(queries, keys, "reference", reduction, mining=mining)
        actual = run(queries, keys, "cpu", reduction, mining=mining)
        assert_results(actual, eager, exact, queries, keys, reduction, mining=mining)


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_strides_are_honoured(dtype, mining):
    wide = Case(130, 200, 200).inputs(dtype)[1]
    for queries, keys in strided_pairs(wide):
        for reduction in ("none", "mean"):
            in_place = run(queries, keys, "cpu", reduction, mining=mining)
            copied = run(queries.contiguous(), keys.contiguous(), "cpu", reduction, mining=mining)
            assert all(torch.equal(a, b) for a, b in zip(in_place, copied, strict=True))


@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("mask", [(True, False), (False, True)], ids=str)
@needs_library
def test_only_the_gradients_that_are_needed(mask, reduction, mining):
    queries, keys = Case(300, 310, 70).inputs(torch.bfloat16)
    expected, *everything = run(queries, keys, "cpu", reduction, mining=mining)
    leaves = [queries, keys]
    for leaf, needed in zip(leaves, mask, strict=True):
        leaf.requires_grad_(needed)
    with output_masks() as asked:
        losses = mmkernels.triplet(*leaves, mining=mining, reduction=reduction, impl="cpu")
        assert torch.equal(losses, expected)
        (losses * torch.linspace(0.5, 1.5, losses.numel()).view_as(losses)).sum().backward()
    assert asked == [list(mask)]
    for leaf, needed, full in zip(leaves, mask, everything, strict=True):
        assert (leaf.grad is not None) == needed
        if needed:
            assert torch.equal(leaf.grad, full)


@needs_library
def test_no_gradients_are_made_where_none_can_be_asked_for():
    leaves = [x.requires_grad_() for x in Case(30, 30, 16).inputs(torch.float32)]
    with output_masks() as asked, torch.no_grad():
        mmkernels.triplet(*leaves, impl="cpu")
    assert asked == []


@pytest.mark.parametrize("scale", [2.0**16, 2.0**-10])
@needs_library
def test_a_loss_scale_loses_no_digits_in_half_precision(scale):
    """A gradient of 1 / N a term is below the least normal float16: the loss scale must reach it before it rounds."""
    queries, keys = Case(300, 300, 40).inputs(torch.float16)
    exact = run(queries.double(), keys.double(), "reference", "mean")[1:]
    leaves = [x.requires_grad_() for x in (queries, keys)]
    grads = torch.autograd.grad(scale * mmkernels.triplet(*leaves, impl="cpu"), leaves)
    for a, b in zip(grads, exact, strict=True):
        torch.testing.assert_close(a.double(), 2 * scale * b, rtol=2**-11, atol=2**-25 * 1.01)


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("mining", MININGS)
@needs_library
def test_same_bits_whatever_the_number_of_threads(mining, reduction):
    queries, keys = features(900, 64, torch.bfloat16), features(1100, 64, torch.bfloat16, seed=1)
    assert_same_bits(lambda: run(queries, keys, "cpu", reduction, mining=mining))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("where", ["queries", "keys"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mining", MININGS)
@needs_library
def test_nan_in_nan_out(mining, value, where, symmetric):
    queries, keys = Case(300, 320, 40).inputs(torch.float32)
    (queries if where == "queries" else keys)[7, 3] = value
    options = {"mining": mining, "symmetric": symmetric}
    actual, eager = run(queries, keys, "cpu", **options), run(queries, keys, "reference", **options)
    lost = ~actual[0].isfinite()
    assert (~eager[0].isfinite() <= lost).all()
    assert (eager[0].isnan() <= actual[0].isnan()).all()
    assert actual[1][lost].isnan().all()
    assert actual[2][:300][lost].isnan().all()
    if value != value:
        assert lost[7]
        assert eager[0][7].isnan()
        assert symmetric is False or where == "keys" or lost.all()  # it is every key's worst negative
        assert where == "queries" or lost.all()  # and every query's
    if mining == "all":
        for a, b in zip(actual, eager, strict=True):
            assert (~b.isfinite() <= ~a.isfinite()).all()
    assert lost.any() == (not mmkernels.triplet(queries, keys, impl="cpu", **options).isfinite())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("place", AT_MINUS_INFINITY)
@pytest.mark.parametrize("mining", MININGS)
@needs_library
def test_worst_negatives_at_minus_infinity(mining, place, symmetric):
    check_minus_infinity(place, "cpu", symmetric, mining)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("mining", MININGS)
@needs_library
def test_no_negative_and_a_positive_not_finite(mining, symmetric):
    for impl in ("reference", "cpu"):
        check_no_negative(impl, symmetric, mining)


@pytest.mark.parametrize("mining", MININGS)
def test_reductions_are_torchs(mining):
    queries, keys = Case(100, 120, 30).inputs(torch.float32)
    losses = mmkernels.triplet(queries, keys, mining=mining, reduction="none")
    assert losses.shape == (100,)
    torch.testing.assert_close(mmkernels.triplet(queries, keys, mining=mining), losses.mean())
    torch.testing.assert_close(mmkernels.triplet(queries, keys, mining=mining, reduction="sum"), losses.sum())


@pytest.mark.parametrize("fault", ["zero", "off by one"])
@pytest.mark.parametrize("mining", MININGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_budget_fails_for(mining, dtype, fault):
    case = Case(257, 257, 64, {"mining": mining})
    queries, keys = case.inputs(dtype)
    exact = run(queries.double(), keys.double(), "reference", **case.options)
    eager = run(queries, keys, "reference", **case.options)
    if fault == "zero":
        wrong = [torch.zeros_like(x) for x in eager]
    else:
        wrong = run(queries, keys.roll(1, 0), "reference", **case.options)
    for a, b, c in zip(wrong, eager, exact, strict=True):
        with pytest.raises(AssertionError, match=r"error .* budget"):
            assert_within_budget(a, b, c)
