"""The chunked route of info_nce in Triton's interpreter: torch's products, and the kernels that pass over the strips.

tests/conftest.py runs this file in a process of its own, where the interpreter is chosen before Triton is imported.
"""

import pytest
import torch
from torch.testing import assert_close

import mmkernels
from mmkernels import _backends, info
from mmkernels.info_nce import chunked
from mmkernels.testing import features
from tests import contract
from tests.info_nce import cases
from tests.info_nce.spec import CALLS, INFO_NCE
from tests.interpreting import guarded_allocations

BF16, FP16 = torch.bfloat16, torch.float16
FAST = {
    "one of each", "more queries than keys", "rows alone, smoothing", "targets", "loss near zero", "negative scale",
    "groups, smoothing", "groups beside targets", "groups, both queues",
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture
def guards(monkeypatch):
    yield from guarded_allocations(monkeypatch, launches=False)


@pytest.fixture
def small_strips(monkeypatch):
    monkeypatch.setattr(chunked, "_STRIP_BYTES", 1)


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(case, dtype, id=f"{case}-{dtype}", marks=() if fast else pytest.mark.slow)
        for case in cases.CASES
        for dtype in (BF16, FP16)
        for fast in [case.regime in FAST and (dtype is BF16 or case.regime == "targets")]
    ],
)
def test_cases_in_small_strips(case, dtype, small_strips, guards):
    cases.check_case(case, dtype, "chunked")


@pytest.mark.parametrize("regime", ["targets", "groups"])
def test_cases_in_one_strip(regime, guards):
    (case,) = (case for case in cases.CASES if case.regime == regime)
    cases.check_case(case, BF16, "chunked")


def test_strips_are_bounded():
    tile = chunked.tile_of("sm_90")
    rows, cols, _ = tile
    for N, M in ((32768, 32768), (131072, 131072), (100, 1_000_000), (1_000_000, 100), (1, 1)):
        height, width = chunked._Strips.of(N, M, tile)
        assert M <= width < M + cols
        assert height * width * 4 <= max(chunked._STRIP_BYTES, 64 * 4 * width)
        assert height % rows == 0
        assert height < N + rows


def test_the_same_bits_again(small_strips):
    (case,) = (case for case in cases.CASES if case.regime == "targets")
    inputs = case.inputs(BF16)
    runs = [cases.run(*inputs, case.scale, "chunked", **case.options) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("mask", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_what_is_asked_for(mask, small_strips, guards):
    queries, keys = features(70, 33, BF16, seed=1), features(90, 33, BF16, seed=2)
    scale, own = torch.tensor(20.0), (None, None, None)
    kept = chunked.info_nce_forward(queries, keys, scale, *own, True, 0.0, False)[1:]

    def backward(*asked):
        return chunked.info_nce_backward(
            torch.full((70,), 0.01), queries, keys, scale, *own, *kept, True, 0.0, 80, list(asked)
        )

    for grad, alone, asked in zip(backward(True, True, True), backward(*mask), mask, strict=True):
        assert torch.equal(grad, alone) if asked else alone.numel() == 0


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_where_it_belongs(value, small_strips):
    call = CALLS["symmetric"]
    for where in (0, 1):
        own, others = call.make(BF16, 70)
        own[where][5, 7] = value
        of_chunked, of_reference = (
            call.outputs(impl, *own, *others)[0].isfinite() for impl in ("chunked", "reference")
        )
        assert torch.equal(of_chunked, of_reference)


@pytest.mark.parametrize("name", ["symmetric", "groups, both queues, weights"])
def test_contract(name):
    call = CALLS[name]
    contract.check_meta(INFO_NCE, call, "chunked", BF16)
    contract.check_autocast(INFO_NCE, call, "chunked", BF16)


def test_strides_do_not_matter(small_strips):
    own, _ = CALLS["symmetric"].make(BF16, 70)
    columns_first = [x.T.contiguous().T if x.ndim == 2 else x for x in own]
    runs = [cases.run(queries, keys, 20.0, "chunked") for queries, keys, _ in (own, columns_first)]
    for one, other in zip(*runs, strict=True):
        assert_close(one, other, rtol=0.02, atol=1e-4)


def test_opcheck_and_whole_graph():
    queries, keys = features(40, 24, BF16, seed=1), features(50, 24, BF16, seed=2)
    forward = (queries, keys, torch.tensor(20.0), None, None, None, True, 0.1, False)
    kept = torch.ops.mmkernels.info_nce_chunked_forward(*forward)[1:]
    torch.library.opcheck(torch.ops.mmkernels.info_nce_chunked_forward.default, forward)
    backward = (torch.full((40,), 0.1), *forward[:6], *kept, True, 0.1, 50, [True, True, True])
    torch.library.opcheck(torch.ops.mmkernels.info_nce_chunked_backward.default, backward)

    def loss(queries, keys, scale):
        return mmkernels.info_nce(queries, keys, scale, impl="chunked")

    whole = torch.compile(loss, fullgraph=True, dynamic=True, backend="aot_eager")
    leaves = [queries.clone().requires_grad_(), keys.clone().requires_grad_(), torch.tensor(20.0, requires_grad=True)]
    for function in (loss, whole):
        value = function(*leaves)
        grads = torch.autograd.grad(value, leaves)
        if function is loss:
            expected = (value, *grads)
    assert all(torch.equal(a, b) for a, b in zip((value, *grads), expected, strict=True))


def test_it_is_named_and_never_chosen_for_the_user():
    assert info.collect()["info_nce"]["chunked"] == "yes"
    assert _backends.choose("info_nce", "auto", "cpu", BF16) != "chunked"
    x = torch.zeros(4, 8)
    with pytest.raises(RuntimeError, match=r"impl='chunked' cannot run(.|\n)*chunked: it takes bfloat16 and float16"):
        mmkernels.info_nce(x, x, 1.0, impl="chunked")
