"""retrieval_ranks and retrieval_topk on the CPU: numbers, ties and memory; tests/contract.py has the rest."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mmkernels
from mmkernels.retrieval import reference
from mmkernels.testing import assert_within_budget, features, peak_allocated
from tests.cpu_kernels import DTYPES, assert_same_bits, each_case, needs_library, strided_pairs
from tests.retrieval.cases import CASES, TILE, Case, check_case, check_order, in_order, whole_numbers

IMPLS = [pytest.param("cpu", marks=needs_library), "reference"]


@each_case(CASES)
def test_cpu(case, dtype):
    check_case(case, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_reference(case, dtype):
    check_case(case, dtype, "reference")


@pytest.mark.parametrize("impl", ["triton", "cpu", "reference"])
def test_flops_are_those_of_the_scores(impl):
    """The reference is an op, too, and not counted by its lines."""
    queries, keys = torch.empty(7, 5, device="meta"), torch.empty(9, 5, device="meta")
    calls = (mmkernels.retrieval_ranks, ()), (mmkernels.retrieval_topk, (3,))
    for call, options in calls:
        with FlopCounterMode(display=False) as counter:
            call(queries, keys, *options, impl=impl)
        with FlopCounterMode(display=False) as eager:
            queries @ keys.T
        assert counter.get_total_flops() == eager.get_total_flops() == 2 * 7 * 9 * 5


@pytest.mark.parametrize("d", [8, 256, 257, 600])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_a_copy_scores_the_same_bits_wherever_it_stands(dtype, d):
    """One query and one key, all others of the gallery copies of it but one: every place of tiles and panels."""
    queries = features(40, d, dtype, seed=1).repeat_interleave(33, 0)
    for m in (TILE + 8, 2 * TILE + 5):  # the last tile is read in place, or packed
        keys = features(1, d, dtype).expand(m, d).contiguous()
        scores, indices = mmkernels.retrieval_topk(queries, keys, m, impl="cpu")
        assert torch.equal(scores, scores[:, :1].expand_as(scores))
        assert torch.equal(indices, torch.arange(m).expand_as(indices))
        assert torch.equal(scores[::33].repeat_interleave(33, 0), scores)  # nor where its query stands
        targets = torch.arange(len(queries)) * 5 % m
        assert torch.equal(mmkernels.retrieval_ranks(queries, keys, targets, impl="cpu"), targets)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_strides_are_honoured(dtype):
    wide = features(600, 200, dtype)
    for queries, keys in strided_pairs(wide):
        targets = (torch.arange(2 * len(queries)) % len(keys))[::2]
        copies = queries.contiguous(), keys.contiguous()
        for a, b in zip(
            (
                mmkernels.retrieval_ranks(queries, keys, targets, impl="cpu"),
                *mmkernels.retrieval_topk(queries, keys, 7),
            ),
            (mmkernels.retrieval_ranks(*copies, targets.clone(), impl="cpu"), *mmkernels.retrieval_topk(*copies, 7)),
            strict=True,
        ):
            assert torch.equal(a, b)


@pytest.mark.parametrize("n", [1, 3, 500, 3000])
@needs_library
def test_same_bits_whatever_the_number_of_threads(n):
    """Few queries: the threads share out the keys."""
    queries, distinct, place, targets = Case(n, 4001, 40).inputs(torch.bfloat16)
    # Of a share of the keys there are fewer than 4001.
    lengths = (5, 4001 if n < 10 else 900)

    def run():
        few, many = (mmkernels.retrieval_topk(queries, distinct[place], k, impl="cpu") for k in lengths)
        assert all(torch.equal(a, b[:, :5]) for a, b in zip(few, many, strict=True))
        return *many, mmkernels.retrieval_ranks(queries, distinct[place], targets, impl="cpu")

    assert_same_bits(run)


@pytest.mark.parametrize("k", [1, 25, 1000, 5000])
@needs_library
def test_long_lists(k):
    """The panels are lower, and the lists are cut or hold all."""
    queries, keys = features(300, 16, seed=1), features(5000, 16)
    exact = (queries.double() @ keys.double().T).sort(dim=1, descending=True).values[:, :k]
    scores, indices = mmkernels.retrieval_topk(queries, keys, k, impl="cpu")
    eager = (queries @ keys.T).sort(dim=1, descending=True).values[:, :k]
    assert_within_budget(scores, eager, exact, name="scores")
    again = (queries.double() @ keys.double().T).gather(1, indices)
    assert_within_budget(scores, eager, again, name="scores of the indices")
    assert (indices.sort(1).values.diff(dim=1) > 0).all()


# Shapes at which the contract's bound says nothing: the matrix of scores would be smaller.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@needs_library
def test_few_queries_take_the_scratch_of_a_thread(dtype, threads):
    threads(1)
    few = features(2, 64, dtype), features(8192, 64, dtype, seed=1)
    assert peak_allocated(lambda: mmkernels.retrieval_topk(*few, 10, impl="cpu")) <= 2 << 20


@needs_library
def test_lists_too_long_for_a_whole_panel(threads):
    """The panels are lower: 8 MiB of lists a thread."""
    threads(1)
    queries, keys, scores = whole_numbers(100, 20_000, 3, torch.float32)
    found = []
    peak = peak_allocated(lambda: found.extend(mmkernels.retrieval_topk(queries, keys, 20_000, impl="cpu")))
    assert all(torch.equal(a, b) for a, b in zip(found, in_order(scores), strict=True))
    assert peak <= 100 * 20_000 * 12 + (9 << 20)


@needs_library
def test_many_threads_for_few_queries_share_64_mib(threads):
    queries, keys = torch.zeros(2, 1024).half(), torch.zeros(64 * TILE, 1024).half()
    threads(64)  # a tile for each, of 1.6 MiB
    assert peak_allocated(lambda: mmkernels.retrieval_topk(queries, keys, 10, impl="cpu")) <= 64 << 20


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("shape", [(50, 333, 7), (300, 301, 16), (3, 2000, 3)], ids=str)
def test_whole_numbers_are_exact(shape, impl, dtype):
    """Most scores are ties, of keys that are equal and of keys that are not."""
    queries, keys, scores = whole_numbers(*shape, dtype)
    targets = torch.arange(shape[0]) * 7 % shape[1]
    check_order(queries, keys, scores.double() if dtype == torch.float64 else scores, targets, impl)


def test_the_docstrings_lines():
    queries, keys, _ = whole_numbers(40, 70, 5, torch.float32)
    targets = torch.arange(40) + 13
    order = (queries @ keys.T).argsort(dim=1, descending=True, stable=True)
    ranks = (order == targets[:, None]).int().argmax(dim=1)
    assert torch.equal(mmkernels.retrieval_ranks(queries, keys, targets), ranks)
    best = (queries @ keys.T).topk(3, dim=1).values
    assert torch.equal(mmkernels.retrieval_topk(queries, keys, 3)[0], best)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_and_infinity(impl):
    """A NaN never counts as a success, and is seen."""
    queries, keys, _ = whole_numbers(30, 300, 8, torch.float32)
    queries, keys = queries + 0.5, keys + 0.25
    queries[3, 5] = torch.nan
    keys[[40, 41, 299], 2] = torch.nan
    keys[100:105, 1] = torch.inf
    keys[105:110, 1] = -torch.inf
    queries[7] = 0.0  # times infinity
    scores = (queries.double() @ keys.double().T).float()
    assert scores.isnan().any(1).all()
    for targets in (torch.full((30,), 40), torch.full((30,), 102), torch.full((30,), 107), torch.arange(30) * 9):
        check_order(queries, keys, scores, targets, impl)
    ranks = mmkernels.retrieval_ranks(queries, keys, impl=impl)
    assert ranks[3] == 300
    assert (ranks >= 3).all()
    assert (mmkernels.retrieval_ranks(torch.full((1, 1), torch.nan), torch.ones(1, 1), impl=impl) == 1).all()
    values, indices = mmkernels.retrieval_topk(queries, keys, 4, impl=impl)
    assert values[:, :3].isnan().all()
    assert (indices[:, :3] == -1).all()
    assert (indices[3] == -1).all()


def test_the_reference_goes_in_chunks(monkeypatch):
    queries, keys, scores = whole_numbers(33, 50, 4, torch.float32)
    targets = torch.arange(33) + 5
    monkeypatch.setattr(reference, "_CHUNK", 350)  # of 7 rows
    check_order(queries, keys, scores, targets, "reference")


def test_nothing_carries_a_gradient():
    queries, keys = features(20, 8).requires_grad_(), features(30, 8).requires_grad_()
    for impl in ("auto", "reference"):
        assert not mmkernels.retrieval_topk(queries, keys, 3, impl=impl)[0].requires_grad


def test_opcheck_of_the_reference():
    ops = torch.ops.mmkernels
    for dtype in (torch.float32, torch.float64):
        queries, distinct, place, targets = Case(40, 70, 33).inputs(dtype)
        for given in (targets, None):
            torch.library.opcheck(ops.retrieval_ranks_reference, (queries, distinct[place], given))
        torch.library.opcheck(ops.retrieval_topk_reference, (queries, distinct[place], 5))


@pytest.mark.parametrize("impl", IMPLS)
def test_compile_whole_graph_with_dynamic_shapes(impl):
    def search(queries, keys, targets, k):
        ranks = mmkernels.retrieval_ranks(2 * queries, keys, targets, impl=impl)
        return ranks + 1, *mmkernels.retrieval_topk(2 * queries, keys, k, impl=impl)

    compiled = torch.compile(search, fullgraph=True, dynamic=True)
    for n, k in ((33, 5), (64, 17), (130, 40)):
        queries, distinct, place, targets = Case(n, n + 17, 24).inputs(torch.float32)
        given = (queries, distinct[place], targets, k)
        for a, b in zip(compiled(*given), search(*given), strict=True):
            assert torch.equal(a, b)
