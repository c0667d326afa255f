"""The Triton kernels of divided_attention in Triton's interpreter, on CPU tensors: parity, extremes, guard bands.

tests/conftest.py runs this file in a process of its own, where the interpreter is chosen before Triton is imported.
Every tensor that the kernels read or write lies between guards of NaN, and every one they allocate starts as NaN.
"""

import pytest
import torch
import triton
import triton.language as tl

import mmkernels
from mmkernels.divided_attention import triton_kernels
from mmkernels.divided_attention.layout import layout_of
from mmkernels.divided_attention.triton_kernels import configs, engine
from tests.divided_attention import cases as cases
from tests.divided_attention.cases import CASES, SEED, Case
from tests.interpreting import guarded_allocations, inexact_exp2
from tests.sums import sums_as_in

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
OP = mmkernels.divided_attention

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    yield from guarded_allocations(monkeypatch)


def guarded(qkv: torch.Tensor) -> torch.Tensor:
    """[B, L, 3 C] inside a larger tensor full of NaN: before and after each clip, after each token."""
    B, L, width = qkv.shape
    buffer = torch.full((B + 2, L + 2, -(-width // 8) * 8 + 8), torch.nan, dtype=qkv.dtype)
    buffer[1:-1, 1:-1, :width] = qkv
    return buffer[1:-1, 1:-1, :width]


def check(case: Case, qkv: torch.Tensor) -> None:
    with sums_as_in("triton"):
        exact, eager = cases.run(qkv.double(), case, "reference"), cases.run_eager(qkv, case)
    cases.assert_results(cases.run(guarded(qkv), case, "triton"), eager, exact, qkv, case)


def run(qkv: torch.Tensor, grad_out: torch.Tensor | None = None, impl: str = "triton", **options):
    """Output, log-sum-exps, gradient."""
    leaf = qkv.detach().requires_grad_()
    out, lse = OP(leaf, return_lse=True, impl=impl, **options)
    grad_out = cases.weights_of(out) if grad_out is None else grad_out
    return out.detach(), lse, torch.autograd.grad(out, leaf, grad_out)[0]


# A few of each regime; the rest is slow.
def is_small(case: Case) -> bool:
    return case.positions * case.frames * case.head <= 600 and not case.dropout_p


SMALL = [case for case in CASES if is_small(case)]
FAST = {FP32: SMALL[::5], FP16: SMALL[2::40], BF16: SMALL[22::40]}
MORE = [
    Case(20, 2, "space", "paper", amplitude=10.0, regime="scores of a hundred"),
    # Streamed: a tile and the class token, and more than one block with a step.
    Case(32, 2, "space", batch=1, heads=1, head=8, mask="holes", regime="one item past a tile"),
    Case(32, 2, "space", "global_cls", "tn", batch=1, heads=1, head=8, regime="one item past a tile"),
    Case(2, 65, "time", "none", batch=1, heads=1, head=8, regime="three blocks"),
    # Dropout's factors in the gradients, packed and streamed, of both treatments of the class token.
    Case(2, 4, "time", "global_cls", dropout_p=0.3, head=8, regime="dropout"),
    Case(2, 4, "time", "paper", dropout_p=0.3, heads=1, head=8, mask="ragged", regime="dropout"),
    Case(17, 2, "space", "global_cls", "tn", batch=1, dropout_p=0.3, head=8, regime="dropout"),
    Case(17, 2, "space", dropout_p=0.3, heads=1, head=8, mask="ragged", regime="dropout"),
    # More partials of the class token than the merge adds in a step.
    Case(20, 3, "time", "paper", batch=1, heads=1, head=8, regime="many partials"),
    Case(20, 3, "time", "global_cls", batch=1, heads=1, head=8, regime="many partials"),
]


@pytest.mark.parametrize("case", [*FAST[FP32], *MORE], ids=str)
def test_fp32(case, monkeypatch):
    monkeypatch.setattr(triton_kernels, "MERGE_ROWS", 4)
    check(case, case.inputs(FP32))


@pytest.mark.parametrize("case", [Case(3, 5, "time"), Case(33, 2, "space", amplitude=5.0)], ids=str)
def test_exponentials_as_inexact_as_a_gpu_may_take_them(case, monkeypatch):
    inexact_exp2(monkeypatch)
    check(case, case.inputs(FP32))


HALF = [(case, dtype) for dtype in (FP16, BF16) for case in FAST[dtype]]
HALF.append((Case(2, 5, "time", scale=-0.5, regime="negative scale"), BF16))


@pytest.mark.parametrize(("case", "dtype"), HALF, ids=str)
def test_half(case, dtype):
    check(case, case.inputs(dtype))


# Keys of one piece, of two and of three, less than a block of queries and more; up to the end of the last piece.
WHOLE = [
    Case(16, 2, "space", batch=1, heads=2, head=24, regime="one piece"),
    Case(47, 2, "space", "global_cls", "tn", batch=1, heads=1, head=8, regime="two pieces"),
    Case(2, 65, "time", "none", batch=1, heads=1, head=8, regime="three pieces"),
    Case(39, 3, "space", "paper", batch=1, heads=1, amplitude=5.0, regime="two blocks and a half"),
]


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_whole(case, dtype, monkeypatch):
    choose, chosen = triton_kernels.choose_whole, []
    monkeypatch.setattr(triton_kernels, "choose_whole", lambda *call: chosen.append(choose(*call)) or chosen[-1])
    check(case, case.inputs(dtype))
    assert all(chosen)
    assert len(chosen) == 1 + (case.cls_mode != "none")  # forward and, with a class token, backward


def test_a_negative_scale_is_streamed():
    for kernel in configs.WHOLE:
        assert configs.choose_whole(kernel, torch.empty(0, dtype=BF16), 64, 197, 0.125)
        assert configs.choose_whole(kernel, torch.empty(0, dtype=BF16), 64, 197, -0.125) is None
    case = Case(39, 2, "space", batch=1, heads=1, scale=-0.5, regime="negative scale")
    check(case, case.inputs(BF16))


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(CASES)), ids=lambda index: str(CASES[index]))
def test_all(index):
    """Each case in one dtype, each regime in all."""
    check(CASES[index], CASES[index].inputs((FP32, BF16, FP16)[index % 3]))


@pytest.mark.parametrize("axis", ["time", "space"])
# On either side of the largest signed number.
@pytest.mark.parametrize(("cls_mode", "dropout_p"), [("paper", 0.3), ("global_cls", 0.9)])
def test_dropout_drops_the_entries_of_the_reference(axis, cls_mode, dropout_p):
    """Equal probabilities and one feature a key: the output is the mask, of packed and of streamed kernels."""
    for positions, frames in ((3, 5), (2, 17) if axis == "time" else (17, 2)):
        tokens = 1 + positions * frames
        qkv = torch.zeros(2, tokens, 3 * 2 * 40)
        qkv.unflatten(-1, (3, 2, 40))[:, :, 2] = torch.eye(tokens, 40)[:, None]
        options = {"num_frames": frames, "num_heads": 2, "axis": axis, "cls_mode": cls_mode}
        options |= {"dropout_p": dropout_p, "dropout_seed": SEED}
        results = [OP(guarded(qkv), impl=impl, **options) for impl in ("triton", "reference")]
        assert torch.equal(results[0] == 0, results[1] == 0)
        torch.testing.assert_close(*results)
        assert (results[1] != 0).any()


# Packed and streamed, each with a class token that is averaged (or left out) and with one that spans all groups.
REGIMES = [
    Case(4, 5, "time", batch=1, heads=1, scale=1.0),
    Case(4, 5, "time", "global_cls", "tn", batch=1, heads=1, scale=1.0),
    Case(20, 3, "space", batch=1, heads=1, scale=1.0),
    Case(20, 3, "space", "global_cls", batch=1, heads=1, scale=1.0, mask="holes"),
]


@pytest.mark.parametrize("value", [1e4, -1e4])
@pytest.mark.parametrize("case", REGIMES, ids=str)
def test_all_scores_equal(case, value):
    """Log-sum-exps, rounded at 10,000, would leave a global class token and all gradients a thousandth off."""
    qkv = case.inputs(FP32)
    qkv[..., :16] = value / 4
    qkv[..., 16:32] = 0.25
    check(case, qkv)


@pytest.mark.parametrize("amplitude", [30.0, 300.0])
@pytest.mark.parametrize("case", REGIMES, ids=str)
def test_extreme_scores(case, amplitude):
    """Scores to 1e3 and 1e5, in whole numbers: what is left is the softmax's own error."""
    qkv = case.inputs(FP32)
    qkv[..., :32] = (qkv[..., :32] * amplitude**0.5).round()
    check(case, qkv)


def test_nan_is_not_hidden():
    for axis, frames in (("time", 4), ("space", 2)):
        qkv = torch.randn(2, 1 + 24 * frames, 3 * 16)
        qkv[0, 5, 3] = torch.nan  # a query
        out, lse, grad = run(guarded(qkv), num_frames=frames, num_heads=1, axis=axis)
        assert out[0, 5].isnan().all()
        assert lse.isnan().sum() == 1
        assert out[0].isnan().any(1).sum() == 1
        assert grad[0].isnan().any()
        assert out[1].isfinite().all()
        assert grad[1].isfinite().all()
        qkv = torch.randn(2, 1 + 24 * frames, 3 * 16)
        qkv[0, 5, 35] = torch.nan  # a value
        out, _, grad = run(guarded(qkv), num_frames=frames, num_heads=1, axis=axis)
        assert out[0, 5, 3].isnan()
        assert grad[0, 5].isnan().any()
        assert out[1].isfinite().all()
        assert grad[1].isfinite().all()


def test_absent_frames_are_not_read():
    for axis, positions in (("time", 5), ("space", 20), ("joint", 8)):
        qkv = torch.randn(2, 1 + positions * 3, 3 * 16)
        mask = torch.tensor([[True, False, True], [True, True, True]])
        options = {"num_frames": 3, "num_heads": 1, "axis": axis, "cls_mode": "paper", "frame_mask": mask}
        right = run(qkv, **options)
        qkv[0, 2::3] = torch.nan
        grad_out = cases.weights_of(right[0])
        grad_out[0, 2::3] = torch.nan
        for one, other in zip(run(guarded(qkv), grad_out, **options), right, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("axis", ["time", "space"])
def test_layouts_give_the_same(axis):
    qkv = torch.randn(2, 1 + 17 * 2, 3 * 8)
    options = {"num_frames": 2, "num_heads": 1, "axis": axis, "cls_mode": "paper"}
    right = run(qkv, **options)
    wide = torch.empty(2, 35, 50)
    wide[..., 1:49:2] = qkv
    odd = torch.empty(2, 35, 27)
    odd[..., 3:] = qkv
    apart = qkv.transpose(0, 1).contiguous().transpose(0, 1)  # [L, B, 3 C] in memory: read where it lies
    for one, other in zip(run(apart, **options), right, strict=True):
        assert torch.equal(one, other)
    for copied in (wide[..., 1:49:2], odd[..., 3:]):  # features apart; rows that begin anywhere
        assert torch.equal(OP(copied, impl="triton", **options), right[0])
    repeated = OP(qkv[:1].expand(2, -1, -1), impl="triton", **options)
    assert torch.equal(repeated[0], right[0][0])
    assert torch.equal(repeated[1], right[0][0])
    ones = torch.ones(2, 35, 8)
    assert torch.equal(run(qkv, torch.ones(()).expand_as(ones), **options)[2], run(qkv, ones, **options)[2])


def test_clips_further_apart_than_32_bits_reach(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    qkv = torch.randn(2, 1 + 4 * 3, 3 * 16).bfloat16()
    apart = torch.empty(2**31 + qkv[0].numel(), dtype=torch.bfloat16)  # of which but two pages are touched
    apart = apart.as_strided(qkv.shape, (2**31, qkv.stride(1), 1)).copy_(qkv)
    for axis in ("time", "space"):
        options = {"num_frames": 3, "num_heads": 1, "axis": axis}
        for one, other in zip(run(apart, **options), run(qkv, **options), strict=True):
            assert torch.equal(one, other)


def test_tokens_further_apart_than_32_bits_reach(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    qkv = torch.randn(2, 1 + 4 * 3, 3 * 16).bfloat16()
    step = 180_000_000  # of which but a page for each token is touched
    apart = torch.empty(12 * step + 96, dtype=torch.bfloat16)
    apart = apart.as_strided(qkv.shape, (48, step, 1)).copy_(qkv)
    grad_out = torch.empty(12 * step + 96, dtype=torch.bfloat16).as_strided((2, 13, 16), (16, step, 1))
    grad_out.copy_(cases.weights_of(grad_out))
    for axis, cls_mode in (
        ("time", "timesformer"),
        ("time", "global_cls"),
        ("space", "paper"),
        ("space", "global_cls"),
    ):
        options = {"num_frames": 3, "num_heads": 1, "axis": axis, "cls_mode": cls_mode}
        right = run(qkv, grad_out.contiguous(), **options)
        for one, other in zip(run(apart, grad_out, **options), right, strict=True):
            assert torch.equal(one, other)
        assert right[2].isfinite().all()


def test_the_reciprocal_is_exact():
    """For every length of a sequence and every index of a tile."""
    for items in range(1, 257):
        index = torch.arange(256)
        geometry, _, _ = triton_kernels.plan(
            layout_of(items, items, "time", "none", "nt"), 1, 64, configs.CONFIGS["gfx942"]["half", False][64]
        )
        assert torch.equal(index * geometry.reciprocal >> engine.RECIPROCAL_BITS.value, index // items)
    OP(torch.randn(1, 3, 48), num_frames=1, num_heads=1, axis="time", cls_mode="none", impl="triton")  # for guards


@triton.jit
def _place_kernel(out, program, num_heads, groups, blocks):
    clip, head, group, block = engine.place(program, num_heads, groups, blocks)
    tl.store(out, clip)
    tl.store(out + 1, head)
    tl.store(out + 2, group)
    tl.store(out + 3, block)


def test_more_sequences_than_a_grid_has_rows():
    """One dimension of programs, the last of which is the last block of the last sequence of the last clip."""
    clips, heads = 3, 12
    for layout, block, last in (
        (layout_of(8 * 70_000, 8, "time", "none", "nt"), 16, (2, 11, 34_999, 0)),
        (layout_of(1 + 8 * 70_000, 8, "space", "paper", "nt"), 32, (2, 11, 7, 70_001 // 32)),
        (layout_of(1 + 33 * 70_000, 70_000, "space", "paper", "tn"), 32, (2, 11, 69_999, 1)),
    ):
        config = configs.choose(torch.empty(0), 64, False)
        geometry, _, packed = triton_kernels.plan(layout, heads, 64, config)
        assert packed == (layout.length == 8)
        (programs,) = geometry.programs(clips, block)
        for program, expected in ((programs - 1, last), (0, (0, 0, 0, 0)), (heads - 1, (0, heads - 1, 0, 0))):
            found = torch.full((4,), -1)
            _place_kernel[(1,)](
                found, program, heads, geometry.groups, triton.cdiv(geometry.pack * geometry.items, block)
            )
            assert tuple(found.tolist()) == expected
    OP(torch.randn(1, 3, 48), num_frames=1, num_heads=1, axis="time", cls_mode="none", impl="triton")  # for guards


def test_the_budget_notices_what_it_must():
    case = Case(6, 4, "time", "paper")
    qkv = case.inputs(BF16)
    exact, eager = cases.run(qkv.double(), case, "reference"), cases.run_eager(qkv, case)
    shifted = cases.run(qkv.roll(1, 1), case, "triton")
    for wrong in ([torch.zeros_like(x) for x in eager], (eager[0], eager[1], shifted[2])):
        with pytest.raises(AssertionError, match="error"):
            cases.assert_results(tuple(wrong), eager, exact, qkv, case)
