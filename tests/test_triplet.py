"""triplet on the CPU: numbers, gradients, memory, compilation and the refusal of bad input."""

import pytest
import torch
from triplet_cases import MININGS, Case, assert_results, by_hand, cases, run

import mmkernels


@pytest.mark.parametrize("case", [case for case in cases() if case.n * case.m < 20_000], ids=str)
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


@pytest.mark.parametrize("mining", MININGS)
def test_reductions_are_torchs(mining):
    queries, keys = Case(100, 120, 30).inputs(torch.float32)
    losses = mmkernels.triplet(queries, keys, mining=mining, reduction="none")
    assert losses.shape == (100,)
    torch.testing.assert_close(mmkernels.triplet(queries, keys, mining=mining), losses.mean())
    torch.testing.assert_close(mmkernels.triplet(queries, keys, mining=mining, reduction="sum"), losses.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    queries, keys = (x.requires_grad_() for x in Case(100, 100, 32).inputs(torch.float32))
    with torch.autocast("cpu", dtype=dtype):
        loss = mmkernels.triplet(queries, keys)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, mmkernels.triplet(queries.to(dtype), keys.to(dtype)))
    loss.backward()
    assert queries.grad.dtype == torch.float32


def bad_inputs():
    q, k = torch.zeros(4, 8), torch.zeros(6, 8)
    return {
        "queries: expected a tensor": (TypeError, ([1.0], k), {}),
        "keys: expected float32, bfloat16": (TypeError, (q, k.long()), {}),
        "keys: expected the dtype of queries": (TypeError, (q, k.half()), {}),
        "queries: expected 2 dimensions": (ValueError, (q[0], k), {}),
        "keys: expected at least one row": (ValueError, (q, k[:0]), {}),
        "queries: expected D >= 1": (ValueError, (q[:, :0], k[:, :0]), {}),
        "keys: expected D = 8": (ValueError, (q, k[:, :5]), {}),
        "keys: expected device cpu": (ValueError, (q, k.to("meta")), {}),
        "keys: expected at least N = 6 rows, .* got 4": (ValueError, (k, q), {}),
        "margin: expected a float, got Tensor": (TypeError, (q, k), {"margin": torch.tensor(0.2)}),
        "margin: expected a finite value of at least 0, got -0.1": (ValueError, (q, k), {"margin": -0.1}),
        "margin: expected a finite value of at least 0, got nan": (ValueError, (q, k), {"margin": float("nan")}),
        "margin: expected a finite value of at least 0, got inf": (ValueError, (q, k), {"margin": float("inf")}),
        "mining: expected one of 'all', 'hardest', 'semi_hard', got 'semihard'": (
            ValueError,
            (q, k),
            {"mining": "semihard"},
        ),
        "symmetric: expected a bool, got int": (TypeError, (q, k), {"symmetric": 1}),
        "reduction: expected": (ValueError, (q, k), {"reduction": "avg"}),
        "impl: expected 'auto' or one of": (ValueError, (q, k), {"impl": "cuda13"}),
    }


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("text", bad_inputs())
def test_bad_input_is_named(text, impl):
    error, arguments, options = bad_inputs()[text]
    with pytest.raises(error, match=text):
        mmkernels.triplet(*arguments, **{"impl": impl, **options})


def test_bad_input_is_named_under_compile():
    compiled = torch.compile(lambda q, k: mmkernels.triplet(q, k))
    with pytest.raises(ValueError, match="keys: expected D = 8"):
        compiled(torch.zeros(4, 8), torch.zeros(6, 5))
    whole = torch.compile(lambda q, k: mmkernels.triplet(q, k, margin=-1.0), fullgraph=True)
    with pytest.raises(Exception, match="margin: expected a finite value"):
        whole(torch.zeros(4, 8), torch.zeros(6, 8))
