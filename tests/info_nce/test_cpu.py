"""info_nce on the CPU: numbers, gradients and memory; tests/contract.py has the rest."""

import itertools

import pytest
import torch
import torch.nn.functional as F

import mmkernels
from mmkernels.info_nce import ops
from mmkernels.testing import assert_within_budget, features, peak_allocated
from tests.contract import Memory, check_memory
from tests.cpu_kernels import DTYPES, EXTREMES, assert_same_bits, each_case, needs_library, strided_pairs
from tests.info_nce.cases import CASES, Case, assert_results, check_block, check_case, grouped, run, run_eager
from tests.info_nce.spec import INFO_NCE, pairs
from tests.op_arguments import last_arguments, output_masks


@each_case(CASES)
def test_cpu_matches_float64(case, dtype):
    check_case(case, dtype, "cpu")


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_block_of_several(symmetric, dtype):
    for label_smoothing in (0.0, 0.2):
        check_block("cpu", dtype, symmetric, label_smoothing)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_eager_code(case):
    queries, keys = case.inputs(torch.float32)
    options = case.options_in(torch.float32)
    exact = run(queries.double(), keys.double(), case.scale, "reference", **options)
    actual = run(queries, keys, case.scale, "reference", **options)
    assert_results(actual, run_eager(queries, keys, case.scale, **options), exact, queries, keys, case.scale)
    # The oracle itself, against the lines that it stands for.
    eager = run_eager(queries.double(), keys.double(), case.scale, **options)
    for a, b in zip(exact, eager, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("queries", "keys"), EXTREMES)
@needs_library
def test_extreme_logits(queries, keys):
    exact = run(queries.double(), keys.double(), 1.0, "reference")
    assert_results(run(queries, keys, 1.0, "cpu"), run_eager(queries, keys, 1.0), exact, queries, keys, 1.0)


@pytest.mark.parametrize("largest", [99.0, 100.0, 101.0, 117.0])
@pytest.mark.parametrize("symmetric", [True, False])
@needs_library
def test_digits_at_large_logits(largest, symmetric):
    """Whole logits are exact in float32, so what is left is the softmax's own error.

    A loss of lse - positive, or probabilities from one float32 lse, would be off by up to 4e-6 at logits of 100.
    """
    queries, keys = torch.ones(7, 1), largest - torch.arange(7.0)[:, None]
    exact = run(queries.double(), keys.double(), 1.0, "reference", symmetric=symmetric)
    losses, grad_queries, grad_keys, grad_scale = run(queries, keys, 1.0, "cpu", symmetric=symmetric)
    assert (losses.double() - exact[0]).abs().max() < 5e-7
    assert (grad_queries.double() - exact[1]).abs().max() < 5e-7 * largest
    assert (grad_keys.double() - exact[2]).abs().max() < 5e-7
    assert (grad_scale.double() - exact[3]).abs() < 5e-7 * 7 * largest


@pytest.mark.parametrize("groups", [False, True])
@needs_library
def test_losses_near_zero_keep_their_digits(groups):
    """The last tile of 9 x 9 has logits that all come near its largest, and eager's loss is 0."""
    each = torch.arange(777)
    options = {"query_groups": each, "key_groups": each} if groups else {}
    check_case(Case(777, 777, 256, scale=100.0, near=0.95, options=options), torch.float32, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_strides_are_honoured(dtype):
    wide = features(130, 200, dtype)
    for queries, keys in strided_pairs(wide):
        in_place, copied = run(queries, keys, 10.0, "cpu"), run(queries.contiguous(), keys.contiguous(), 10.0, "cpu")
        for a, b in zip(in_place, copied, strict=True):
            # Keys are read in place or packed: the same products, but for the order of the sums over D.
            torch.testing.assert_close(a, b, rtol=1e-2 if dtype != torch.float32 else 1e-4, atol=2e-3)


@pytest.mark.parametrize("mask", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [70, 260])  # the products of wide features are kept
@needs_library
def test_only_the_gradients_that_are_needed(mask, dtype, size):
    case = Case(300, 310, size)
    queries, keys = case.inputs(dtype)
    everything = run(queries, keys, 10.0, "cpu")[1:]
    leaves = [queries, keys, torch.tensor(10.0)]
    for leaf, needed in zip(leaves, mask, strict=True):
        leaf.requires_grad_(needed)
    weights = torch.linspace(0.5, 1.5, 300)
    with output_masks() as asked:
        (mmkernels.info_nce(*leaves, reduction="none", impl="cpu") * weights).sum().backward()
    assert asked == [list(mask)]
    for leaf, needed, full in zip(leaves, mask, everything, strict=True):
        assert (leaf.grad is not None) == needed
        if needed:
            assert torch.equal(leaf.grad, full)


@needs_library
def test_reductions_are_torchs():
    queries, keys = Case(100, 120, 30).inputs(torch.float32)
    losses = mmkernels.info_nce(queries, keys, 7.0, reduction="none")
    assert losses.shape == (100,)
    torch.testing.assert_close(mmkernels.info_nce(queries, keys, 7.0), losses.mean())
    torch.testing.assert_close(mmkernels.info_nce(queries, keys, 7.0, reduction="sum"), losses.sum())


@pytest.mark.parametrize("impl", [pytest.param("cpu", marks=needs_library), "reference"])
def test_weights_are_those_of_torchs_cross_entropy(impl):
    queries, keys = Case(100, 120, 30).inputs(torch.float32)
    classes = torch.linspace(0.1, 2.0, 120)
    targets = torch.arange(100) * 7 % 120
    options = {"targets": targets, "symmetric": False, "impl": impl}
    logits = 7.0 * queries @ keys.T
    for reduction in ("none", "mean", "sum"):
        loss = mmkernels.info_nce(queries, keys, 7.0, weights=classes[targets], reduction=reduction, **options)
        torch.testing.assert_close(loss, F.cross_entropy(logits, targets, classes, reduction=reduction))
    # Both directions of a query take its weight; the weights take the gradient of what they are factors of.
    weights = torch.rand(100, requires_grad=True)
    losses = mmkernels.info_nce(queries, keys, 7.0, reduction="none", impl=impl)
    loss = mmkernels.info_nce(queries, keys, 7.0, weights=weights, impl=impl)
    torch.testing.assert_close(loss, (losses * weights).sum() / weights.sum())
    (grad,) = torch.autograd.grad(loss, weights)
    torch.testing.assert_close(grad, (losses - loss) / weights.sum())
    # The weights may have any floating dtype; the loss stays float32, and is as exact.
    for dtype in (torch.bfloat16, torch.float64):
        loss = mmkernels.info_nce(queries, keys, 7.0, weights=weights.to(dtype), impl=impl)
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, mmkernels.info_nce(queries, keys, 7.0, weights=weights.to(dtype).float()))


@needs_library
def test_groups_of_one_are_targets():
    queries, keys = Case(300, 300, 64).inputs(torch.float32)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    groups = {"query_groups": torch.arange(300), "key_groups": torch.empty(300, dtype=torch.int64)}
    groups["key_groups"][order] = torch.arange(300)
    by_targets = run(queries, keys, 100.0, "cpu", targets=order)
    by_groups = run(queries, keys, 100.0, "cpu", targets=order, **groups)
    for a, b in zip(by_groups, by_targets, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    apart = {name: x.repeat_interleave(2)[::2] for name, x in {"targets": order, **groups}.items()}  # of stride 2
    for a, b in zip(run(queries, keys, 100.0, "cpu", **apart), by_groups, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("needed", [("keys",), ("key_queue",), ("keys", "key_queue"), ("query_queue",), ()], ids=str)
@needs_library
def test_gradients_of_queues_are_made_when_asked_for(dtype, needed):
    queries, keys = Case(130, 140, 48).inputs(dtype)
    rows = {"keys": keys, "key_queue": features(77, 48, dtype, seed=5), "query_queue": features(90, 48, dtype, seed=6)}
    if "query_queue" not in needed:
        del rows["query_queue"]  # one symmetric pass over more keys than have gradients

    def grads(impl, dtype):
        leaves = {name: x.to(dtype, copy=True).requires_grad_(name in needed) for name, x in rows.items()}
        scale = torch.tensor(10.0, dtype=torch.float64 if dtype == torch.float64 else torch.float32, requires_grad=True)
        keys = leaves.pop("keys")
        mmkernels.info_nce(queries.to(dtype), keys, scale, reduction="sum", impl=impl, **leaves).backward()
        return {"scale": scale.grad} | {name: x.grad for name, x in ({"keys": keys} | leaves).items()}

    actual, eager, exact = grads("cpu", dtype), grads("reference", dtype), grads("reference", torch.float64)
    for name, grad in actual.items():
        assert (grad is not None) == (name in (*needed, "scale"))
        if grad is not None:
            assert_within_budget(grad, eager[name], exact[name], dtype=dtype, terms=10.0, name=name)
            if needed == ("keys",):  # no row is made for the queue
                assert grad.untyped_storage().nbytes() == grad.nbytes


@needs_library
def test_gradient_of_the_scale_is_the_product_with_the_features():
    """d loss / d scale = <Q, dQ> / scale = <K, dK> / scale: three ways to one number."""
    queries, keys = Case(400, 500, 64).inputs(torch.float32)
    _, grad_queries, grad_keys, grad_scale = run(queries, keys, 20.0, "cpu")
    by_queries = (queries.double() * grad_queries.double()).sum() / 20
    by_keys = (keys.double() * grad_keys.double()).sum() / 20
    torch.testing.assert_close(by_queries, by_keys, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad_scale.double(), by_queries, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("groups", [False, True])
@needs_library
def test_same_bits_whatever_the_number_of_threads(groups):
    queries, keys = Case(1100, 900, 64, options={"targets": None}).inputs(torch.bfloat16)
    options = {"targets": torch.arange(1100) % 900, **(grouped(1100, 900, 71) if groups else {})}
    assert_same_bits(lambda: run(queries, keys, 20.0, "cpu", **options))


@pytest.mark.parametrize("where", ["queries", "keys", "scale"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@needs_library
def test_nan_in_nan_out(where, value):
    queries, keys = Case(300, 300, 40).inputs(torch.float32)
    scale = value if where == "scale" else 10.0
    if where == "queries":
        queries[7, 3] = value
    if where == "keys":
        keys[7, 3] = value
    actual, eager = run(queries, keys, scale, "cpu"), run(queries, keys, scale, "reference")
    for a, b in zip(actual, eager, strict=True):
        assert torch.equal(a.isfinite(), b.isfinite()) or (b.isnan() <= ~a.isfinite()).all()
    assert not actual[0][7].isfinite()
    assert actual[3].isnan()


@pytest.mark.parametrize(
    "options", [grouped(3000, 3000, 49), {"key_queue": 3000}, {"key_queue": 1, "query_queue": 3000}]
)
@needs_library
def test_groups_and_queues_need_no_matrix(options, threads):
    """One of 3000 x 3000 would take 9 MB as booleans."""
    case = Case(3000, 3000, 16, options=options)
    leaves = [x.requires_grad_() for x in case.inputs(torch.float32)]
    options = case.options_in(torch.float32)
    threads(1)
    peak = peak_allocated(lambda: torch.autograd.grad(mmkernels.info_nce(*leaves, 10.0, impl="cpu", **options), leaves))
    assert 2 * leaves[0].nbytes < peak <= 4 << 20


@pytest.mark.slow
@needs_library
def test_65536_pairs_in_the_memory_of_their_inputs_at_any_number_of_threads(threads):
    threads(64)
    check_memory(INFO_NCE, Memory(pairs(512), 65536), torch.bfloat16, scratch=0)


@each_case(CASES)
def test_products_kept_or_made_again_give_the_same_bits(case, dtype, monkeypatch):
    queries, keys = case.inputs(dtype)

    def results(keep):
        monkeypatch.setattr(ops, "keeps_products", lambda *_: keep)
        return run(queries, keys, case.scale, "cpu", **case.options_in(dtype))

    kept, again = (results(keep) for keep in (True, False))
    for a, b in zip(kept, again, strict=True):
        assert torch.equal(a, b)


@needs_library
def test_products_are_kept_where_they_are_small():
    """No larger than 64 MiB, of features that are not narrow, and only if a gradient can be asked for."""

    def kept(n, m, d=128, learns=True, **options):
        queries, keys = features(n, d, seed=1).requires_grad_(learns), features(m, d, seed=2)
        with last_arguments() as keep:
            mmkernels.info_nce(queries, keys, 10.0, impl="cpu", **options)
        assert keep in ([True], [False]), keep
        return keep[0]

    assert kept(4096, 4096)  # 64 MiB
    assert not kept(4096, 4097)
    assert not kept(300, 400, d=127)
    assert not kept(300, 400, learns=False)
    queue = features(13, 128, seed=3)
    assert not kept(4096, 4096, key_queue=queue)
    with torch.no_grad():
        assert not kept(300, 400)


@needs_library
def test_a_scale_of_any_form():
    queries, keys = Case(20, 20, 8).inputs(torch.float32)
    expected = mmkernels.info_nce(queries, keys, 3.0)
    for scale in (3, torch.tensor(3.0), torch.tensor([3.0]), torch.tensor([[3.0]], dtype=torch.float64)):
        assert torch.equal(mmkernels.info_nce(queries, keys, scale), expected)
    scale = torch.tensor([3.0], dtype=torch.float16, requires_grad=True)
    mmkernels.info_nce(queries, keys, scale).backward()
    assert scale.grad.shape == (1,)
    assert scale.grad.dtype == torch.float16


@pytest.mark.parametrize("fault", ["zero", "off by one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_budget_fails_for(fault, dtype):
    case = Case(257, 257, 64)
    queries, keys = case.inputs(dtype)
    exact = run(queries.double(), keys.double(), case.scale, "reference")
    eager = run_eager(queries, keys, case.scale)
    if fault == "zero":
        wrong = [torch.zeros_like(x) for x in eager]
    else:
        shifted = (torch.arange(257) + 1).clamp(max=256)
        wrong = run(queries, keys, case.scale, "reference", targets=shifted)
    for a, b, c in zip(wrong, eager, exact, strict=True):
        with pytest.raises(AssertionError, match=r"error .* budget"):
            assert_within_budget(a.to(b.dtype), b, c, dtype=dtype)
