"""divided_attention on the CPU: numbers, gradients and memory; tests/contract.py has the rest."""

import dataclasses
import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mmkernels
from mmkernels.divided_attention import reference
from mmkernels.divided_attention.layout import AXES, CLS_MODES, TOKEN_ORDERS, layout_of
from mmkernels.testing import assert_within_budget, peak_allocated
from tests.cpu_kernels import DTYPES, assert_same_bits, each_case, needs_library
from tests.divided_attention.cases import (
    CASES,
    SEED,
    Case,
    assert_results,
    check_case,
    run,
    run_eager,
    visible_rows,
    weights_of,
)

EVERY_LAYOUT = [Case(20, 5, *choice) for choice in itertools.product(AXES, CLS_MODES, TOKEN_ORDERS)]
# One case of each schedule and treatment of the class token.
FEW = [
    Case(20, 5, "time"),
    Case(20, 5, "time", "global_cls", "tn"),
    Case(20, 5, "space", mask="holes"),
    Case(20, 5, "space", "global_cls"),
    Case(20, 5, "joint", dropout_p=0.2),
]


def attend(qkv, case, impl="cpu", **options):
    return mmkernels.divided_attention(qkv, frame_mask=case.frame_mask(), impl=impl, **{**case.options, **options})


@each_case(CASES)
def test_cpu_matches_float64(case, dtype):
    check_case(case, dtype, "cpu")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_dense_definition(case):
    """The oracle against another derivation, both in float64."""
    qkv = case.inputs(torch.float64)
    for actual, dense in zip(run(qkv, case, "reference"), run_eager(qkv, case), strict=True):
        # The dense code keeps log-sum-exps in float32.
        torch.testing.assert_close(
            actual.to(dense.dtype),
            dense,
            rtol=1e-5 if dense.dtype == torch.float32 else 1e-9,
            atol=1e-6 if dense.dtype == torch.float32 else 1e-11,
        )


# Whole clips of the size that TimeSformer has, one clip and head of them.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case",
    [
        Case(196, 8, "space", batch=1, heads=1, head=64, regime="TimeSformer"),
        Case(196, 8, "time", batch=1, heads=1, head=64, regime="TimeSformer"),
        Case(2, 96, "time", batch=1, heads=1, head=64, regime="long clip"),
        Case(784, 2, "space", batch=1, heads=1, head=64, regime="448 px"),
        Case(100, 8, "joint", batch=1, heads=1, head=64, regime="more than one block of queries"),
        Case(64, 16, "joint", "none", batch=1, heads=1, head=32, regime="rows of 4 KiB"),
    ],
    ids=str,
)
@needs_library
def test_cpu_matches_float64_at_full_size(case, dtype):
    check_case(case, dtype, "cpu")


# ---- Dropout


def test_philox_gives_the_published_words():
    """The known answers that the authors of Philox publish with Random123."""
    for counter, key, word in (
        ([0, 0, 0, 0], 0, 0x6627E8D5),
        ([0xFFFFFFFF] * 4, -1, 0x408F276D),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822, 0xD16CFE09),
    ):
        actual = reference.philox(torch.tensor([key]), [torch.tensor([c]) for c in counter])
        assert actual.item() == word


@pytest.mark.parametrize("case", [dataclasses.replace(c, head=64, amplitude=0.0) for c in EVERY_LAYOUT], ids=str)
@needs_library
def test_dropout_drops_the_same_entries_as_the_reference(case):
    """All scores are equal and the values are unit vectors, so that each entry of the output is one probability."""
    qkv = case.inputs(torch.float32)
    patches = (case.tokens - 1) if case.cls_mode != "none" else case.tokens
    values = torch.zeros(case.batch, case.tokens, case.heads, case.head)
    values[:, torch.arange(case.tokens), :, torch.arange(case.tokens) % case.head] = 1
    assert patches == 100
    qkv[..., 2 * case.heads * case.head :] = values.flatten(2)
    for p in (0.1, 0.5, 0.9):
        for seed in (0, 1, SEED, -1):
            actual, expected = (
                attend(qkv, case, impl, dropout_p=p, dropout_seed=seed) for impl in ("cpu", "reference")
            )
            assert torch.equal(actual != 0, expected != 0)
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@needs_library
def test_dropout_keeps_the_mean_and_drops_the_share():
    case = Case(60, 8, "space", head=64, amplitude=0.0)
    qkv = case.inputs(torch.float32)
    qkv[..., 2 * case.heads * case.head :] = 1
    outs = torch.stack([attend(qkv, case, dropout_p=0.25, dropout_seed=s)[:, 1:, 0] for s in range(40)])
    # Each output is a mean of 61 kept entries: Binomial(61, 3/4) / (61 * 3/4).
    assert abs(outs.mean().item() - 1) < 4 * (0.25 / 0.75 / 61 / outs.numel()) ** 0.5
    assert abs(outs.var().item() / (0.25 / 0.75 / 61) - 1) < 0.05
    assert not torch.equal(outs[0], outs[1])


@needs_library
def test_dropout_seed_of_any_form_and_none_draws_from_torchs_generator():
    case = Case(20, 5, "space")
    qkv = case.inputs(torch.float32)
    expected = attend(qkv, case, dropout_p=0.5, dropout_seed=7)
    assert torch.equal(attend(qkv, case, dropout_p=0.5, dropout_seed=torch.tensor(7)), expected)
    torch.manual_seed(3)
    first, second = attend(qkv, case, dropout_p=0.5), attend(qkv, case, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(attend(qkv, case, dropout_p=0.5), first)
    assert not torch.equal(first, second)
    assert torch.equal(attend(qkv, case, dropout_seed=7), attend(qkv, case))


# ---- Inputs of every kind


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_strides_are_honoured(case, dtype):
    wide = torch.randn(6, 2 * case.tokens, 200, generator=torch.Generator().manual_seed(1)).to(dtype)
    views = {
        "rows further apart than they are long": wide[:2, : case.tokens, :96],
        "unaligned": wide[:2, : case.tokens, 1:97],
        "every second token, every third clip": wide[::3, ::2, :96],
        "one clip for all": wide[:1, : case.tokens, :96].expand(2, -1, -1),
        "tokens before clips": wide[:2, : case.tokens, :96].transpose(0, 1).contiguous().transpose(0, 1),
        "features apart": wide[:2, : case.tokens].transpose(1, 2).contiguous().transpose(1, 2)[..., :96],
    }
    for name, view in views.items():
        for a, b in zip(run(view, case, "cpu"), run(view.contiguous(), case, "cpu"), strict=True):
            assert torch.equal(a, b), name
        assert run(view, case, "cpu")[0].is_contiguous()


@pytest.mark.parametrize("case", FEW, ids=str)
@needs_library
def test_gradients_that_arrive_with_strides(case):
    qkv = case.inputs(torch.float32).requires_grad_()
    out = attend(qkv, case)
    grad = weights_of(out)
    (expected,) = torch.autograd.grad(out, qkv, grad, retain_graph=True)
    doubled = torch.stack([grad, torch.full_like(grad, torch.nan)], 2)
    for view in (doubled[:, :, 0], doubled.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)[:, :, 0]):
        assert not view.is_contiguous()
        assert torch.equal(torch.autograd.grad(out, qkv, view, retain_graph=True)[0], expected)
    (grad_of_sum,) = torch.autograd.grad(out.sum(), qkv)  # arrives with strides of 0
    assert grad_of_sum.isfinite().all()


@pytest.mark.parametrize("case", FEW, ids=str)
@needs_library
def test_no_clips(case):
    case = dataclasses.replace(case, batch=0)
    out, lse, grad = run(case.inputs(torch.float32), case, "cpu")
    assert out.shape == (0, case.tokens, 32)
    assert lse.shape[0] == 0
    assert grad.shape == (0, case.tokens, 96)


@pytest.mark.parametrize("case", FEW, ids=str)
@pytest.mark.parametrize("amplitude", [30.0, 300.0])
@needs_library
def test_extreme_scores(case, amplitude):
    """Scores to 1e3 and 1e5. They are whole numbers, so that what is left is the softmax's own error."""
    case = dataclasses.replace(case, scale=1.0)
    qkv = case.inputs(torch.float32)
    qkv[..., :64] = (qkv[..., :64] * amplitude**0.5).round()
    exact, eager = run(qkv.double(), case, "reference"), run_eager(qkv, case)
    assert_results(run(qkv, case, "cpu"), eager, exact, qkv, case)


@pytest.mark.parametrize("value", [1e4, -1e4, 88.0, -88.0])
@pytest.mark.parametrize("case", FEW, ids=str)
@needs_library
def test_all_scores_equal(case, value):
    qkv = case.inputs(torch.float32)
    qkv[..., :32] = value / 4
    qkv[..., 32:64] = 0.25
    exact, eager = run(qkv.double(), case, "reference"), run_eager(qkv, case)
    assert_results(run(qkv, case, "cpu"), eager, exact, qkv, case)


@pytest.mark.parametrize("case", EVERY_LAYOUT, ids=str)
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@needs_library
def test_nan_in_nan_out(case, part, value):
    """Wherever the eager reference has no number, there is none here."""
    qkv = case.inputs(torch.float32)
    qkv[1, 7, part * 32 + 3] = value
    actual, expected = run(qkv, case, "cpu"), run(qkv, case, "reference")
    for name, a, b in zip(("out", "lse", "grad"), actual, expected, strict=True):
        assert (a.isnan() >= b.isnan()).all(), name
        assert a[0].isfinite().all(), "another clip"
    assert not actual[2].isfinite().all()


@needs_library
def test_absent_frames_are_never_read():
    """What padding holds does not matter, NaN included."""
    for case in EVERY_LAYOUT:
        case = dataclasses.replace(case, mask="holes")
        qkv = case.inputs(torch.float32)
        expected = run(qkv, case, "cpu")
        absent = torch.zeros(case.batch, case.tokens, dtype=torch.bool)
        for b, n, t in itertools.product(range(case.batch), range(case.positions), range(case.frames)):
            patch = n * case.frames + t if case.token_order == "nt" else t * case.positions + n
            absent[b, (case.cls_mode != "none") + patch] = not case.frame_mask()[b, t]
        qkv[absent] = torch.nan
        for impl in ("cpu", "reference"):
            for actual, before in zip(run(qkv, case, impl), expected, strict=True):
                assert torch.equal(actual, before) if impl == "cpu" else actual.isfinite().eq(before.isfinite()).all()
        assert expected[0][absent].eq(0).all()
        assert expected[2][absent].eq(0).all()


@needs_library
def test_a_clip_without_frames_is_never_read():
    """Nor is its class token, unless that attends to all tokens, itself among them."""
    for case in EVERY_LAYOUT:
        case = dataclasses.replace(case, mask="empty")
        if case.cls_mode == "global_cls" or case.axis == "joint":
            continue
        qkv = case.inputs(torch.float32)
        expected = run(qkv, case, "cpu")
        qkv[1] = torch.nan
        for impl in ("cpu", "reference"):
            for actual, before in zip(run(qkv, case, impl), expected, strict=True):
                assert torch.equal(actual, before) if impl == "cpu" else actual.isfinite().eq(before.isfinite()).all()
        assert expected[0][1].eq(0).all()
        assert expected[2][1].eq(0).all()


@needs_library
def test_numbers_of_another_layout_are_refused():
    """The kernels read where the layout says: one that is not of these tokens would have them read past the end."""
    qkv = torch.zeros(1, 13, 48)
    forward = torch.ops.mmkernels.divided_attention_cpu_forward
    layout = layout_of(13, 3, "space", "paper", "tn")
    forward(qkv, None, None, layout, 2, 1.0, 0.0)
    wrong = [layout[:-1], layout_of(16, 3, "space", "paper", "tn"), layout._replace(patch_step=2)]
    wrong += [layout._replace(has_cls=0), layout._replace(cls=3), layout._replace(frame_step=0)]
    for numbers in wrong:
        with pytest.raises(ValueError, match="layout: "):
            forward(qkv, None, None, numbers, 2, 1.0, 0.0)


@needs_library
def test_time_of_timesformer_leaves_the_class_token_out():
    case = Case(20, 5, "time")
    out, _, grad = run(case.inputs(torch.float32), case, "cpu")
    assert out[:, 0].eq(0).all()
    assert grad[:, 0].eq(0).all()


# ---- Threads


@pytest.mark.parametrize("case", [dataclasses.replace(c, positions=60, batch=3, heads=5) for c in FEW], ids=str)
@needs_library
def test_same_bits_whatever_the_number_of_threads(case):
    qkv = case.inputs(torch.bfloat16)
    assert_same_bits(lambda: run(qkv, case, "cpu"))


def test_larger_heads_run_in_the_reference():
    case = Case(4, 3, "space", heads=1, head=257)
    assert attend(case.inputs(torch.float32), case, "auto").shape == (2, 13, 257)
    with pytest.raises(RuntimeError, match=r"cpu: it takes heads of up to 256, and these are 257"):
        attend(case.inputs(torch.float32), case)


# ---- Memory and FLOPs. The contract bounds both passes together, where a copy of qkv in the forward pass would hide
# behind the gradient of the backward pass; here each is bounded alone.


@pytest.mark.parametrize("case", EVERY_LAYOUT, ids=str)
@needs_library
def test_what_is_saved_for_backward(case):
    """qkv, the output and one float32 per row: no probability, no copy."""
    qkv = case.inputs(torch.bfloat16).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        out, lse = attend(qkv, case, return_lse=True)
    assert {x.data_ptr() for x in saved} == {qkv.data_ptr(), out.data_ptr(), lse.data_ptr()}
    assert sum(x.nbytes for x in saved) == qkv.nbytes + out.nbytes + lse.nbytes


@pytest.mark.parametrize(("axis", "mode"), list(itertools.product(AXES, CLS_MODES)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@needs_library
def test_memory_is_outputs_and_scratch(axis, mode, dtype):
    """Beside what is returned: some 1.5 MB of scratch a thread, and the class token's share of every sequence."""
    case = Case(196, 8, axis, mode, heads=12, head=64, batch=2)
    qkv = case.inputs(dtype).requires_grad_()
    out, lse = attend(qkv, case, return_lse=True)
    layout = layout_of(case.tokens, case.frames, axis, mode, "nt")
    cls = case.batch * 12 * layout.num_sequences * 4 * (3 * 64) * bool(layout.cls_rows)
    # Joint sequences are long: keys and values of one head, packed, and a block of scores.
    scratch = torch.get_num_threads() * (8 << 20 if axis == "joint" else 3 << 19)
    with torch.no_grad():
        forward = peak_allocated(lambda: attend(qkv, case, return_lse=True))
    assert out.nbytes + lse.nbytes <= forward <= out.nbytes + lse.nbytes + cls + scratch
    grad = torch.ones_like(out)
    backward = peak_allocated(lambda: torch.autograd.grad(out, qkv, grad))
    assert qkv.nbytes <= backward <= qkv.nbytes + cls + scratch


@pytest.mark.parametrize("case", EVERY_LAYOUT, ids=str)
@needs_library
def test_flops_are_those_of_the_pairs_that_attend(case):
    pairs = int(visible_rows(case)[2][0].sum())
    layout = layout_of(case.tokens, case.frames, case.axis, case.cls_mode, case.token_order)
    assert layout.pairs == pairs
    qkv = case.inputs(torch.float32).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        out = attend(qkv, case)
    assert counter.get_total_flops() == 2 * 2 * case.batch * case.heads * case.head * pairs
    with FlopCounterMode(display=False) as counter:
        out.sum().backward()
    assert counter.get_total_flops() == 5 * 2 * case.batch * case.heads * case.head * pairs


# ---- Attention maps


@pytest.mark.parametrize("mask", ["", "holes", "empty"])
@pytest.mark.parametrize("case", EVERY_LAYOUT, ids=str)
def test_maps_times_values_are_the_output(case, mask):
    case = dataclasses.replace(case, mask=mask)
    qkv = case.inputs(torch.float64)
    tokens = torch.tensor([0, 3, case.tokens - 1, 3, 17])
    maps = mmkernels.divided_attention_maps(qkv, tokens, frame_mask=case.frame_mask(), **case.options)
    assert maps.shape == (case.batch, case.heads, 5, case.tokens)
    values = qkv.unflatten(-1, (3, case.heads, case.head))[:, :, 2].transpose(1, 2)
    out = attend(qkv, case, "reference")
    torch.testing.assert_close((maps @ values).transpose(1, 2).flatten(2), out[:, tokens])
    sums = maps.sum(-1)
    assert torch.all((sums - 1).abs().lt(1e-12) | sums.eq(0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_maps_under_autocast(dtype):
    case, tokens = Case(20, 5, "space"), torch.arange(30)
    qkv = case.inputs(torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        maps = mmkernels.divided_attention_maps(qkv, tokens, **case.options)
    assert torch.equal(maps, mmkernels.divided_attention_maps(qkv.to(dtype), tokens, **case.options))


@pytest.mark.parametrize("case", EVERY_LAYOUT, ids=str)
def test_maps_of_meta_tensors_have_the_shape(case):
    qkv, tokens = case.inputs(torch.bfloat16), torch.tensor([0, 3, 17])
    maps = mmkernels.divided_attention_maps(qkv.to("meta"), tokens.to("meta"), **case.options)
    assert maps.is_meta
    expected = mmkernels.divided_attention_maps(qkv, tokens, **case.options)
    assert (maps.shape, maps.dtype) == (expected.shape, expected.dtype)


def test_maps_refuse_bad_tokens():
    case = Case(4, 3, "space")
    qkv = case.inputs(torch.float32)
    for error, tokens, text in (
        (TypeError, [0], "tokens: expected an int64 tensor"),
        (TypeError, torch.tensor([0.0]), r"tokens: expected int64, got torch.float32; use tokens.long\(\)"),
        (ValueError, torch.tensor(0), r"tokens: expected shape \[Q\]"),
        (ValueError, torch.zeros(1, dtype=torch.int64, device="meta"), "tokens: expected device cpu"),
        (ValueError, torch.tensor([0, 13]), "tokens: expected indices of the tokens, 0 to 12, got 0 to 13"),
        (ValueError, torch.tensor([-1]), "tokens: expected indices of the tokens, 0 to 12, got -1 to -1"),
    ):
        with pytest.raises(error, match=text):
            mmkernels.divided_attention_maps(qkv, tokens, **case.options)
    assert mmkernels.divided_attention_maps(qkv, torch.tensor([], dtype=torch.int64), **case.options).shape[2] == 0


# ---- The budget itself


@pytest.mark.parametrize("fault", ["zero", "off by one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FEW[:4], ids=str)
def test_the_budget_fails_for(case, fault, dtype):
    """A tensor of zeros, and a mask that leaves out one frame more."""
    qkv = case.inputs(dtype)
    exact, eager = run(qkv.double(), case, "reference"), run_eager(qkv, case)
    if fault == "zero":
        wrong = [torch.zeros_like(x) for x in eager]
    else:
        leaf = qkv.detach().requires_grad_()
        mask = torch.ones(case.batch, case.frames, dtype=torch.bool) if case.frame_mask() is None else case.frame_mask()
        mask[:, mask.int().argmax(1)] = False
        out, lse = mmkernels.divided_attention(leaf, frame_mask=mask, return_lse=True, impl="reference", **case.options)
        wrong = [out.detach(), lse.nan_to_num(neginf=0.0), *torch.autograd.grad(out, leaf, weights_of(out))]
    for a, b, c in zip(wrong, eager, exact, strict=True):
        b, c = (x.nan_to_num(neginf=0.0) for x in (b, c))
        with pytest.raises(AssertionError, match=r"error .* budget"):
            assert_within_budget(a, b, c, dtype=dtype)
