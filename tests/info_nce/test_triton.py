"""The Triton kernels of info_nce in Triton's interpreter, on CPU tensors: parity, extremes, and guard bands.

tests/conftest.py runs this file in a process of its own, where the interpreter is chosen before Triton is imported.
Every tensor that the kernels read or write lies between guards of NaN, and every one they allocate starts as NaN.
"""

import pytest
import torch

import mmkernels
from mmkernels._tiles import configs, launch, products
from mmkernels.info_nce import reference, triton_kernels
from mmkernels.info_nce.groups import Groups
from mmkernels.info_nce.options import Options
from mmkernels.testing import assert_within_budget, features
from tests.info_nce.cases import arithmetic_of, check_block
from tests.interpreting import DTYPES, FAST_IN_FP16, guarded_allocations, guarded_rows, inexact_exp2
from tests.sums import sums_as_in

TILE = configs.CONFIGS["interpreter"]["half"].forward.block_m
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")


@pytest.fixture(autouse=True)
def guards(monkeypatch):
    number = triton_kernels.number_groups
    monkeypatch.setattr(
        triton_kernels, "number_groups", lambda *groups: Groups(*(guarded_rows(x) for x in number(*groups)))
    )
    yield from guarded_allocations(monkeypatch, launches=False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_block_of_several(symmetric, dtype):
    for label_smoothing in (0.0, 0.2):
        check_block("triton", dtype, symmetric, label_smoothing)


def batch(N, M, D, dtype, mean_cosine=0.5, seed=0):
    """Queries and keys, guarded; key i is drawn near query i."""
    queries = features(N, D, dtype, seed=seed)
    keys = features(M, D, dtype, seed=seed + 1, like=queries, mean_cosine=mean_cosine)
    return guarded_rows(queries), guarded_rows(keys)


def cross_entropies(logits, targets, query_groups, key_groups, symmetric, label_smoothing):
    F = torch.nn.functional
    own = torch.arange(len(logits))
    targets = own if targets is None else targets
    of_rows, of_columns = targets, own
    if query_groups is not None:
        same = query_groups[:, None] == F.pad(key_groups, (0, logits.shape[1] - len(key_groups)), value=-1)
        same = same.to(logits.dtype)
        of_rows, of_columns = same / same.sum(1, keepdim=True), (same / same.sum(0)).T[targets]
    rows = F.cross_entropy(logits, of_rows, label_smoothing=label_smoothing, reduction="none")
    if not symmetric:
        return rows
    columns = F.cross_entropy(logits.T[targets], of_columns, label_smoothing=label_smoothing, reduction="none")
    return (rows + columns) / 2


def eager(queries, keys, scale, *options):
    """What a user writes: the logits in the dtype of the features, the cross-entropies in float32."""
    return cross_entropies((scale.to(queries.dtype) * (queries @ keys.T)).float(), *options)


def exactly(queries, keys, scale, *options):
    options = Options(*options)
    grouped = len(keys) if options.key_groups is None else len(options.key_groups)
    return reference.info_nce(queries, keys[:grouped], keys[grouped:], scale, options)


def run_autograd(function, dtype, queries, keys, scale, *options):
    *options, grad_losses = options
    leaves = [queries.to(dtype).detach().requires_grad_(), keys.to(dtype).detach().requires_grad_()]
    leaves.append(scale.detach().to(torch.float64 if dtype == torch.float64 else torch.float32, copy=True))
    leaves[2].requires_grad_()
    losses = function(*leaves, *options)
    return [losses.detach(), *torch.autograd.grad(losses, leaves, grad_losses.to(losses.dtype))]


def run_kernels(
    queries,
    keys,
    scale,
    targets=None,
    query_groups=None,
    key_groups=None,
    symmetric=True,
    label_smoothing=0.0,
    grad_losses=None,
    mask=(True,) * 3,
):
    if grad_losses is None:
        grad_losses = torch.full((), 1.0 / len(queries)).expand(len(queries))
    inputs, options = (queries, keys, scale, targets, query_groups, key_groups), (symmetric, label_smoothing)
    losses, *kept = triton_kernels.info_nce_forward(*inputs, *options, False)
    grads = triton_kernels.info_nce_backward(grad_losses, *inputs, *kept, *options, len(keys), list(mask))
    return [losses, *grads]


def check(
    queries,
    keys,
    scale=20.0,
    targets=None,
    symmetric=True,
    label_smoothing=0.0,
    grad_losses=None,
    query_groups=None,
    key_groups=None,
):
    """The kernels against float64 on the same inputs, within the error of eager in their dtype."""
    scale = torch.tensor(scale)
    if grad_losses is None:
        grad_losses = torch.linspace(0.5, 1.5, len(queries))
    options = (targets, query_groups, key_groups, symmetric, label_smoothing)
    arguments = (queries, keys, scale, *options, grad_losses)
    exact = run_autograd(exactly, torch.float64, *arguments)
    with sums_as_in("triton"):
        peer = run_autograd(eager, queries.dtype, *arguments)
    names = ("losses", "grad_queries", "grad_keys", "grad_scale")
    results = run_kernels(*arguments)
    # The scale's gradient is a sum of terms of either sign: their size rounds it, not what is left of them.
    dots = queries.double() @ keys.double().T
    logits = (scale.double() * dots).detach().requires_grad_()
    (cross_entropies(logits, *options) * grad_losses.double()).sum().backward()
    terms = (logits.grad * dots).abs().sum()
    arithmetic = arithmetic_of(queries, keys, scale.item())
    for name, actual, rough, right, units in zip(names, results, peer, exact, arithmetic, strict=True):
        # The losses keep float32 throughout; a gradient passes through the dtype of the features.
        dtype = torch.float32 if name == "losses" else queries.dtype
        if name == "grad_scale":
            actual, rough, right = (torch.stack([x.double(), terms]) for x in (actual, rough, right))
        assert_within_budget(actual, rough, right, dtype=dtype, arithmetic=units, name=name)
    return results


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("N", [1, TILE - 1, TILE, TILE + 1, 77])
def test_sizes(N, dtype):
    check(*batch(N, N, 64, dtype))


@pytest.mark.parametrize("D", [1, 3, 100, 513])
def test_any_number_of_features(D):
    check(*batch(33, 40, D, FP32))
    check(*batch(33, 40, D, BF16))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
def test_targets_and_directions(dtype, symmetric, label_smoothing):
    queries, keys = batch(45, 70, 48, dtype)
    targets = guarded_rows(torch.randperm(70, generator=torch.Generator().manual_seed(0))[:45])
    grad_losses = torch.randn(45, generator=torch.Generator().manual_seed(1))
    check(queries, keys, 20.0, targets, symmetric, label_smoothing, grad_losses)


@pytest.mark.parametrize("dtype", DTYPES)
def test_duplicate_targets_and_fewer_keys_than_queries(dtype):
    targets = guarded_rows(torch.arange(70) % 3)
    check(*batch(70, 20, 48, dtype), 20.0, targets, label_smoothing=0.1)
    check(*batch(70, 20, 48, dtype), 20.0, torch.full((70,), 19))


@pytest.mark.parametrize("dtype", FAST_IN_FP16)
def test_several_groups_strips_and_splits(dtype, monkeypatch):
    """More tiles than one program takes: every loop runs more than once, the last time over less."""
    monkeypatch.setattr(launch, "MAX_PARTIALS", 2)
    monkeypatch.setattr(products, "_STRIP_BYTES", 1)
    monkeypatch.setattr(products, "_STRIP_ROWS", TILE)
    check(*batch(2 * TILE + 9, 9 * TILE + 1, 40, dtype), grad_losses=torch.linspace(-1, 1, 2 * TILE + 9))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mean_cosine", [-0.2, 0.3, 0.98])
def test_temperature_of_a_hundredth(dtype, mean_cosine):
    """The last tile is square: there all rows come near its maximum, as in the large tiles of a GPU."""
    check(*batch(TILE + 9, TILE + 9, 64, dtype, mean_cosine=mean_cosine), 100.0)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("scale", "mean_cosine"), [(20.0, 0.5), (100.0, 0.3), (100.0, 0.95)])
def test_exponentials_as_inexact_as_a_gpu_may_take_them(scale, mean_cosine, symmetric, monkeypatch):
    inexact_exp2(monkeypatch)
    check(*batch(77, 77, 64, FP32, mean_cosine=mean_cosine), scale, symmetric=symmetric)
    if symmetric:
        check(*batch(77, 77, 64, FP32, mean_cosine=mean_cosine), scale, **dealt(77, 77, 41))


def test_all_logits_equal():
    queries, keys = batch(40, 40, 16, FP32)
    queries[:], keys[:] = queries[:1].clone(), keys[:1].clone()
    check(queries, keys, 10.0)
    check(queries, keys, 0.0)


@pytest.mark.parametrize("dtype", FAST_IN_FP16)
def test_logits_of_ten_thousand(dtype):
    queries, keys = batch(40, 40, 32, dtype, mean_cosine=0.1)
    losses, *_ = check(queries * 100, keys * 100, 1.0)
    assert losses.max() > 1000


def test_tiles_whose_rows_lie_far_apart():
    """No constant serves the exponentials of such a tile: the other branch runs, forward and backward."""
    queries, keys = batch(40, 40, 32, FP32)
    strength = torch.logspace(-1, 2.5, 40)[:, None]
    check(queries * strength, keys, 1.0)
    check(queries, keys * strength, 1.0)


@pytest.mark.parametrize("of", ["rows", "columns", "one row", "one column", "negative scale"])
def test_rows_and_columns_far_below_others_of_their_block(of, monkeypatch):
    """Tiles without a positive keep one maximum for a slot of rows; what lies far below it is made again."""
    monkeypatch.setattr(launch, "MAX_PARTIALS", 2)
    queries, keys = batch(4 * TILE, 4 * TILE, 16, FP32)
    strength = torch.ones(len(queries), 1)
    if of == "one row" or of == "one column":
        strength *= 300
        strength[TILE + 3] = 0.3
    elif of != "negative scale":
        strength = torch.logspace(-1, 2.5, len(queries))[:, None]
    check(
        queries * (strength if "row" in of else 1),
        keys * (strength if "column" in of else 1),
        -1.0 if of == "negative scale" else 1.0,
    )


@pytest.mark.parametrize(("high", "flat"), [(0, False), (2, True)])
def test_other_slots_of_rows(high, flat, monkeypatch):
    """A slot of one row, and of four, and a loop over tiles around one over features: as some GPUs take them."""
    monkeypatch.setattr(launch, "MAX_PARTIALS", 2)
    monkeypatch.setattr(triton_kernels, "slot_flags", lambda tile, family: {"SLOT_HIGH": high, "FLAT": flat})
    monkeypatch.setattr(triton_kernels, "grad_logits_flags", lambda family: {"FLAT": flat})
    queries, keys = batch(4 * TILE, 4 * TILE, 16, FP32)
    check(queries, keys)
    strength = torch.ones(len(queries), 1)
    strength[::3] = 40  # rows that lie far below others of their slot are made again
    check(queries * strength, keys, 1.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_stay_where_they_belong_in_tiles_without_a_positive(value, monkeypatch):
    monkeypatch.setattr(launch, "MAX_PARTIALS", 2)
    queries, keys = batch(4 * TILE, 4 * TILE, 16, FP32)
    keys[3, 5] = value
    of_key = [value * x for x in queries[:, 5].sign()]
    rows = run_kernels(queries, keys, torch.tensor(10.0), symmetric=False)[0]
    both = run_kernels(queries, keys, torch.tensor(10.0))[0]
    for row, logit in enumerate(of_key):
        hidden = logit == -torch.inf and row != 3  # a key that no softmax sees
        assert rows[row].isfinite() == hidden
        assert both[row].isfinite() == hidden
    keys[2 * TILE : 3 * TILE] = torch.nan
    for symmetric in (True, False):
        assert run_kernels(queries, keys, torch.tensor(10.0), symmetric=symmetric)[0].isnan().all()


@pytest.mark.parametrize("dtype", FAST_IN_FP16)
def test_tiny_gradients_do_not_vanish(dtype):
    queries, keys = batch(40, 40, 32, dtype)
    grad_losses = torch.full((40,), 2.0**-30)
    scaled = run_kernels(queries, keys, torch.tensor(20.0), grad_losses=grad_losses * 2.0**30)
    tiny = run_kernels(queries, keys, torch.tensor(20.0), grad_losses=grad_losses)
    if dtype != FP16:  # whose result cannot hold them
        assert torch.equal(tiny[1] * 2.0**30, scaled[1])
    assert torch.equal(tiny[3] * 2.0**30, scaled[3])
    assert scaled[3] != 0
    nothing = run_kernels(queries, keys, torch.tensor(20.0), grad_losses=torch.zeros(40))
    assert all((grad == 0).all() for grad in nothing[1:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_are_not_hidden(dtype, value):
    queries, keys = batch(40, 40, 16, dtype)
    queries[3, 5] = value
    losses, grad_queries, grad_keys, grad_scale = run_kernels(queries, keys, torch.tensor(10.0))
    assert not losses.isfinite().any() or losses[3].isnan()
    if value != value:
        assert losses.isnan().all()
        assert grad_queries.isnan().all()
        assert grad_keys.isnan().all()
    assert grad_scale.isnan()
    losses, grad_queries, *_ = run_kernels(queries, keys, torch.tensor(10.0), symmetric=False)
    assert losses[3].isnan()
    assert losses[torch.arange(40) != 3].isfinite().all()
    assert grad_queries[3].isnan().all()
    assert grad_queries[torch.arange(40) != 3].isfinite().all()


def test_layouts_give_the_same():
    queries, keys = batch(40, 50, 48, FP32)
    right = run_kernels(queries, keys, torch.tensor(10.0))
    wide = torch.randn(80, 97)
    wide[::2, 1:97:2] = queries
    layouts = [wide[::2, 1:97:2], queries.T.contiguous().T, torch.cat([queries, queries])[:40]]
    for layout in layouts:
        for actual, expected in zip(run_kernels(layout, keys, torch.tensor(10.0)), right, strict=True):
            assert torch.equal(actual, expected)
    repeated = keys[:1].expand(50, 48)
    losses = run_kernels(queries, repeated, torch.tensor(10.0), symmetric=False)[0]
    torch.testing.assert_close(losses, torch.full((40,), 50.0).log())


def test_only_what_is_asked_for():
    queries, keys = batch(40, 50, 48, FP32)
    scale = torch.tensor(10.0)
    everything = run_kernels(queries, keys, scale)[1:]
    for bits in range(8):
        mask = [bool(bits & 1), bool(bits & 2), bool(bits & 4)]
        for index, grad in enumerate(run_kernels(queries, keys, scale, mask=mask)[1:]):
            if not mask[index]:
                assert grad.shape == (0,)
            elif index == 2 and mask == [False, True, True]:
                torch.testing.assert_close(grad, everything[2])  # <K, dK>: another order of the same sum
            else:
                assert torch.equal(grad, everything[index])


def dealt(N, M, count):
    return {
        "query_groups": torch.arange(N) * 5 % count * 10**12,
        "key_groups": torch.arange(M) * 3 % count * 10**12,
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups(dtype, symmetric):
    grad_losses = torch.randn(45, generator=torch.Generator().manual_seed(1))
    options = {"symmetric": symmetric, "grad_losses": grad_losses}
    check(*batch(45, 70, 48, dtype), **options, **dealt(45, 70, 1))
    check(*batch(45, 70, 48, dtype), **options, **dealt(45, 70, 41))
    # Ten keys at the end are of no group.
    targets = torch.arange(45) * 7 % 60
    check(*batch(45, 70, 48, dtype), 20.0, targets, label_smoothing=0.1, **options, **dealt(45, 60, 7))


def test_a_group_for_each_at_a_loss_near_zero():
    check(*batch(67, 67, 48, FP32, mean_cosine=0.98), 100.0, **dealt(67, 67, 67))


def test_groups_over_several_groups_of_tiles_strips_and_splits(monkeypatch):
    monkeypatch.setattr(launch, "MAX_PARTIALS", 2)
    monkeypatch.setattr(products, "_STRIP_BYTES", 1)
    monkeypatch.setattr(products, "_STRIP_ROWS", TILE)
    N, M = 3 * TILE + 9, 5 * TILE + 1
    check(*batch(N, M, 40, FP16), grad_losses=torch.linspace(-1, 1, N), **dealt(N, M, 13))


def test_groups_without_a_positive():
    queries, keys = batch(5, 7, 16, FP32)
    groups = torch.tensor([0, 1, 2, 3, 4])
    with pytest.raises(ValueError, match="query 3 is of group 3, and no key is"):
        run_kernels(queries, keys, torch.tensor(1.0), None, groups, torch.tensor([0, 1, 2, 2, 4, 4, 4]))
    with pytest.raises(ValueError, match="key 2 is matched by query 2, and its group is that of no query"):
        run_kernels(queries, keys, torch.tensor(1.0), None, groups, torch.tensor([0, 1, 9, 2, 4, 3, 4]))


@pytest.mark.parametrize("needed", [("keys",), ("keys", "key_queue"), ("key_queue",)])
def test_queues(needed):
    queries, keys = batch(40, 45, 48, FP32)
    queue = features(70, 48, seed=7)

    def grads(impl):
        leaves = {"keys": keys.clone(), "key_queue": queue.clone(), "scale": torch.tensor(10.0)}
        for name in (*needed, "scale"):
            leaves[name].requires_grad_()
        options = {"key_queue": leaves["key_queue"], "query_queue": queue} | dealt(40, 45, 7)
        loss = mmkernels.info_nce(queries, leaves["keys"], leaves["scale"], impl=impl, **options)
        one_queue = mmkernels.info_nce(
            queries, leaves["keys"], leaves["scale"], impl=impl, key_queue=options["key_queue"]
        )
        return torch.autograd.grad(loss + 2 * one_queue, [leaves[name] for name in (*needed, "scale")])

    for a, b in zip(grads("triton"), grads("reference"), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_targets_out_of_range():
    queries, keys = batch(5, 7, 16, FP32)
    for bad in (7, -1):
        targets = torch.tensor([0, 1, bad, 3, 4])
        with pytest.raises(ValueError, match=f"targets: expected indices of the 7 keys, 0 to 6, got {bad}"):
            run_kernels(queries, keys, torch.tensor(1.0), targets)


def test_the_public_call_and_a_second_backward():
    queries, keys = (x.detach().requires_grad_() for x in batch(40, 40, 48, FP32))
    scale = torch.tensor(10.0, requires_grad=True)
    loss = mmkernels.info_nce(queries, keys, scale, impl="triton")
    leaves = (queries, keys, scale)
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    exact = torch.autograd.grad(mmkernels.info_nce(queries, keys, scale, impl="reference"), leaves)
    for one, two, right in zip(first, second, exact, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, right)


def test_the_budget_notices_what_it_must():
    queries, keys = batch(40, 40, 48, BF16)
    arguments = (queries, keys, torch.tensor(20.0), None, None, None, True, 0.0, torch.full((40,), 1 / 40))
    exact = run_autograd(exactly, torch.float64, *arguments)
    peer = run_autograd(eager, BF16, *arguments)
    shifted = run_kernels(queries, keys, torch.tensor(20.0), torch.arange(40).roll(1))
    for wrong in (torch.zeros_like(exact[1]).bfloat16(), shifted[1]):
        with pytest.raises(AssertionError, match="error"):
            assert_within_budget(wrong, peer[1], exact[1])
