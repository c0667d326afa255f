"""beam_search_step: the order, the numbers, and the same bits from every implementation and in every batch."""

import pytest
import torch

import mmkernels
from mmkernels import _backends
from mmkernels.beam_search.reference import log_softmax
from mmkernels.beam_search.specification import Progress, Rule
from mmkernels.testing import assert_within_budget
from tests.beam_search.cases import CASES, NOT_FINITE, Case, assert_same, check_case, of
from tests.cpu_kernels import DTYPES, assert_same_bits, each_case, needs_library

IMPLS = ["reference", pytest.param("cpu", marks=pytest.mark.skipif(bool(_backends.unavailable("cpu")), reason="none"))]
step = mmkernels.beam_search_step


@each_case(CASES)
def test_cpu_gives_the_bits_of_the_reference(case, dtype):
    check_case(case, dtype, "cpu")


@pytest.mark.parametrize("case", NOT_FINITE, ids=str)
def test_nan_and_infinity_mean_the_same_in_float64(case):
    logits, scores, options = case.inputs(torch.float32)
    single = step(logits, scores, **options, impl="reference")
    double = step(logits.double(), scores.double(), **options)
    assert torch.equal(double.poisoned, single.poisoned)
    assert torch.equal(double.valid, single.valid)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("where", "options", "poisoned"),
    [
        ("any logit that the softmax sees", {}, True),
        ("a forbidden logit that the softmax sees", {"forbidden": True}, True),
        ("a forbidden logit", {"forbidden": True, "mask_first": True}, False),
        ("a forbidden score", {"forbidden": True, "normalize": False}, False),
        ("the row of an absent beam", {"valid": True}, False),
    ],
)
@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
def test_where_nan_and_infinity_poison_an_item(where, options, poisoned, value, impl):
    logits, scores = torch.zeros(6, 40), torch.zeros(2, 3)
    logits[4, 30] = value
    at = torch.arange(6 * 40).view(6, 40) == 4 * 40 + 30
    masks = {"forbidden": at, "valid": ~at.any(1).view(2, 3)}
    found = step(logits, scores, **{name: masks.get(name, on) for name, on in options.items()}, impl=impl)
    assert found.poisoned.tolist() == [False, poisoned]
    assert found.valid.all(1).tolist() == [True, not poisoned]
    assert not found.scores.isnan().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_logits_of_minus_infinity_are_no_candidates_and_scores_of_it_are(impl):
    logits, scores = torch.full((2, 40), -torch.inf), torch.tensor([[0.0, -torch.inf]])
    logits[0, :2], logits[1, 5:8] = 1.0, torch.tensor([1.0, 3.0, 2.0])
    found = step(logits, scores, num_candidates=6, impl=impl)
    assert found.beams[0, :5].tolist() == [0, 0, 1, 1, 1]
    assert found.tokens[0, :5].tolist() == [0, 1, 6, 7, 5]
    assert found.scores[0, 2:].eq(-torch.inf).all()
    assert found.valid[0].tolist() == [True] * 5 + [False]


@needs_library
@pytest.mark.parametrize("name", ["step", "advance"])
def test_the_registered_ops_take_meta_tensors(name):
    logits, scores, options = Case(4, 3, 30, options=of(valid="some", forbidden="rows")).inputs(torch.bfloat16)
    found = torch.ops.mmkernels.beam_search_step_cpu(
        logits, scores, options["valid"], options["forbidden"], 6, True, False
    )
    rule = Rule(0, 5, 0, 1, 3, 1, True, False)
    arguments = {
        "step": (logits, scores, options["valid"], options["forbidden"], 6, True, False),
        "advance": (*found, *Progress.none(4, 3, scores), torch.tensor([2]), torch.ones(6), *rule),
    }[name]
    on_meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in arguments]
    for backend in ("cpu", "triton", "cuda") if name == "step" else ("cpu", "cuda"):
        op = getattr(torch.ops.mmkernels, f"beam_search_{name}_{backend}")
        results = op(*on_meta)
        if backend == "cpu":
            expected = op(*arguments)
        for result, real in zip(results, expected, strict=True):
            assert result.is_meta
            assert (result.shape, result.dtype, result.stride()) == (real.shape, real.dtype, real.stride())


def test_meta_tensors_run_in_the_reference():
    logits, scores, _ = Case(4, 3, 30).inputs(torch.float32)
    for result, real in zip(step(logits.to("meta"), scores.to("meta")), step(logits, scores), strict=True):
        assert result.is_meta
        assert (result.shape, result.dtype) == (real.shape, real.dtype)


@needs_library
@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        ("valid: expected the shape of scores", {"valid": torch.ones(4, 2) > 0}),
        ("forbidden: expected the shape of logits", {"forbidden": torch.ones(4, 9) > 0}),
        ("num_candidates: expected at least 0", {"num_candidates": -1}),
    ],
)
def test_the_registered_op_reads_nothing_past_its_arguments(words, wrong):
    right = {"logits": torch.zeros(12, 30), "scores": torch.zeros(4, 3), "valid": None, "forbidden": None}
    right |= {"num_candidates": 6, "normalize": True, "mask_first": False}
    with pytest.raises(ValueError, match=words):
        torch.ops.mmkernels.beam_search_step_cpu(**(right | wrong))


@pytest.mark.parametrize("V", [2, 17, 1000, 50257])
@pytest.mark.parametrize("scale", [0.1, 4.0, 300.0])
def test_log_softmax_is_as_exact_as_torchs(V, scale):
    x = torch.randn(5, V, generator=torch.Generator().manual_seed(V)) * scale
    eager, exact = torch.log_softmax(x, -1), torch.log_softmax(x.double(), -1)
    assert_within_budget(log_softmax(x), eager, exact)


@pytest.mark.parametrize("impl", IMPLS)
def test_scores_and_order_are_those_of_topk(impl):
    logits, scores, _ = Case(4, 5, 3001).inputs(torch.float32)
    found = step(logits, scores, impl=impl)
    totals = (scores[:, :, None] + torch.log_softmax(logits, -1).view(4, 5, -1)).flatten(1)
    best, at = totals.topk(10)
    torch.testing.assert_close(found.scores, best, rtol=1e-6, atol=1e-5)
    assert torch.equal(found.beams * 3001 + found.tokens, at)
    assert found.valid.all()
    assert not found.poisoned.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_ties_go_to_the_lower_beam_then_the_lower_token(impl):
    found = step(torch.ones(6, 50), torch.zeros(2, 3), impl=impl)
    assert found.beams.eq(0).all()
    assert torch.equal(found.tokens, torch.arange(6).expand(2, 6))


@pytest.mark.parametrize("impl", IMPLS)
def test_of_equal_scores_the_higher_logit_goes_first(impl):
    """At a score of -1e6 logits 2^-10 apart round to one score: the index alone would give 0, 1."""
    logits = torch.arange(50.0)[None] * 2.0**-10
    found = step(logits, torch.full((1, 1), -1e6), impl=impl)
    assert found.scores[0, 0] == found.scores[0, 1]
    assert found.tokens.tolist() == [[49, 48]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_every_batch(impl, dtype):
    logits, scores, _ = Case(6, 5, 4003).inputs(dtype)
    whole = step(logits, scores, impl=impl)
    for items in ([0], [5], [3, 1], [4, 4, 2, 0]):
        rows = (torch.tensor(items)[:, None] * 5 + torch.arange(5)).flatten()
        assert_same(step(logits[rows], scores[items], impl=impl), type(whole)(*(x[items] for x in whole)))


@needs_library
def test_same_bits_whatever_the_number_of_threads_and_the_strides():
    logits, scores, _ = Case(6, 5, 9001).inputs(torch.float32)
    assert_same_bits(lambda: step(logits, scores, impl="cpu"))
    expected = step(logits, scores, impl="cpu")
    wide = torch.cat([logits, logits], 1)[:, :9001]
    for other in (wide, logits.T.contiguous().T, logits.repeat_interleave(2, 0)[::2]):
        assert_same(step(other, scores, impl="cpu"), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{}, {"mask_first": True}, {"normalize": False}])
def test_logits_scores_and_masks_may_be_column_major(impl, options):
    logits, scores, masks = Case(3, 4, 50, options=of(valid="some", forbidden="rows")).inputs(torch.float32)
    del masks["num_candidates"]
    expected = step(logits, scores, **masks, **options, impl=impl)
    for name in ("logits", "scores", "valid", "forbidden"):
        given = {"logits": logits, "scores": scores, **masks}
        given[name] = given[name].T.contiguous().T
        assert_same(step(**given, **options, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_poisoned_item_leaves_the_others_alone(impl, value):
    logits, scores, _ = Case(3, 4, 500).inputs(torch.float32)
    clean = step(logits, scores, impl=impl)
    logits[5, 77] = value
    found = step(logits, scores, impl=impl)
    assert found.poisoned.tolist() == [False, True, False]
    assert not found.valid[1].any()
    for a, b in zip(found[:4], clean[:4], strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    valid = torch.ones(3, 4, dtype=torch.bool)
    valid[1, 1] = False  # nobody reads it
    assert not step(logits, scores, valid=valid, impl=impl).poisoned.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_forbidden_tokens_before_and_after_the_softmax(impl):
    logits, scores, _ = Case(2, 3, 40).inputs(torch.float32)
    forbidden = torch.arange(40) % 4 != 1
    after = step(logits, scores, forbidden=forbidden, impl=impl)
    before = step(logits, scores, forbidden=forbidden, mask_first=True, impl=impl)
    allowed = logits.masked_fill(forbidden, -torch.inf)
    for found, log_probs in (
        (after, torch.log_softmax(logits, -1).masked_fill(forbidden, -torch.inf)),
        (before, torch.log_softmax(allowed, -1)),
    ):
        best, at = (scores[:, :, None] + log_probs.view(2, 3, 40)).flatten(1).topk(6)
        torch.testing.assert_close(found.scores, best, rtol=1e-6, atol=1e-5)
        assert torch.equal(found.beams * 40 + found.tokens, at)
