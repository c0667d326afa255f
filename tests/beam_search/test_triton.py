"""The Triton kernels of beam search in Triton's interpreter, on CPU tensors: the bits of the reference, guard bands.

tests/conftest.py runs this file in a process of its own, where the interpreter is chosen before Triton is imported.
Every tensor that the kernels read or write lies between guards, and every one they allocate starts as numbers that
would win.
"""

import pytest
import torch

import mmkernels
from mmkernels.beam_search import triton_kernels
from tests.beam_search.cases import CASES, NOT_FINITE, Case, assert_same, of
from tests.interpreting import DTYPES, FAST_IN_FP16, GUARD, guarded_allocations

FILL = 0x7F  # bytes of what nobody wrote: logits and tokens that would win
FP32 = torch.float32
STEP = mmkernels.beam_search_step

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    yield from guarded_allocations(monkeypatch, FILL, launches=False)


def guarded(x: torch.Tensor | None, stride: int | None = None) -> torch.Tensor | None:
    """The rows of x with guards around each: NaN, which poisons an item; True, which forbids or counts."""
    if x is None:
        return None
    shape, x = x.shape, x.reshape(-1, x.shape[-1])
    if stride is None:  # contiguous
        fill = torch.nan if x.is_floating_point() else True
        buffer = torch.full((x.numel() + 2 * GUARD,), fill, dtype=x.dtype)
        buffer[GUARD : GUARD + x.numel()] = x.flatten()
        return buffer[GUARD : GUARD + x.numel()].view(shape)
    buffer = torch.full((x.shape[0] + 2, stride), torch.nan if x.is_floating_point() else False, dtype=x.dtype)
    buffer[1:-1, : x.shape[1]] = x
    return buffer[1:-1, : x.shape[1]]


def run(logits, scores, options):
    """The step runs on guarded copies."""
    options = dict(options)
    if options.get("valid") is not None:
        options["valid"] = guarded(options["valid"])
    forbidden = options.get("forbidden")
    if forbidden is not None and forbidden.ndim == 2:
        options["forbidden"] = guarded(forbidden, forbidden.shape[1] + 600)
    return STEP(guarded(logits, logits.shape[1] + 600), guarded(scores), **options, impl="triton")


def check(case: Case, dtype: torch.dtype) -> None:
    logits, scores, options = case.inputs(dtype)
    assert_same(run(logits, scores, options), STEP(logits, scores, **options, impl="reference"))


# Each candidate of each part takes milliseconds here.
RUN = [case for case in CASES if case.K < 50]
FAST = [case for case in RUN if case.V <= 300 or (case.kind == "normal" and case.V == 530)][::4]
FAST += [case for case in NOT_FINITE if case.V <= 300 and case not in FAST]


@pytest.mark.parametrize("case", FAST, ids=str)
def test_fp32(case):
    check(case, FP32)


@pytest.mark.parametrize("dtype", FAST_IN_FP16)
def test_parts_steps_and_groups(dtype, monkeypatch):
    """Rows of several parts, parts of several steps, and launches of two rows."""
    monkeypatch.setattr(triton_kernels, "_GROUP_BYTES", 2 * 3000 * dtype.itemsize)
    monkeypatch.setitem(triton_kernels.TILES, "interpreter", triton_kernels.Tile(256, 4, 4, 1))
    check(Case(1, 3, 2900, candidates=3), dtype)  # the best are in the second launch
    check(Case(1, 3, 3000, "ties", candidates=3, options=of(forbidden="rows", mask_first=True)), dtype)


@pytest.mark.parametrize(
    "kind", ["ascending", "equal", "ties", "near", "comb", "nothing", "nan", "infinite", "nan score"]
)
def test_adversaries_in_parts(kind, monkeypatch):
    monkeypatch.setitem(triton_kernels.TILES, "interpreter", triton_kernels.Tile(128, 4, 4, 1))
    check(Case(2, 2, 900, kind, candidates=3), FP32)


def test_lists_that_nobody_wrote():
    check(Case(4, 3, 530, options=of(valid="some", normalize=False)), FP32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [case for case in RUN if case.V < 5000], ids=str)
def test_all(case, dtype):
    check(case, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in RUN if case.V >= 5000], ids=str)
def test_large(case):
    check(case, FP32)


def test_the_guards_are_seen():
    """A write one entry past a buffer."""
    scores = guarded(torch.zeros(1, 2))
    buffer = scores.new_empty(3)
    buffer.as_strided((1,), (1,), buffer.storage_offset() + 3).zero_()
    raw = torch.empty(0, dtype=torch.uint8).set_(buffer.untyped_storage())
    assert not (raw[-GUARD:] == FILL).all()
    raw[-GUARD:] = FILL
