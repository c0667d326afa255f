"""info_nce over ranks: the numbers of the joint batch, whatever the ranks' rows, and the same error on all of them."""

import itertools
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import mmkernels
from mmkernels.testing import features, peak_allocated
from tests.cpu_kernels import needs_library
from tests.distributed.spawn import Lost, on_ranks, results
from tests.info_nce.cases import assert_results, grouped, run, run_eager

SHAPES = [(2,), (3,), (4, 1), (2, 2), (1, 4)]
QUERIES = (37, 1, 96, 5)  # of each rank
FURTHER_KEYS = (0, 3, 0, 10)
SCALES = (10.0, 100.0)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"symmetric": False, "label_smoothing": 0.2},
    {"groups": 31, "label_smoothing": 0.1},
    {"groups": 5, "symmetric": False},
]


class Joint:
    """A batch in parts: what each rank brings, and the whole as one process would take it."""

    def __init__(self, world: int, dtype: torch.dtype, size: int = 48, shuffled: bool = False) -> None:
        self.counts, further = QUERIES[:world], FURTHER_KEYS[:world]
        total = sum(self.counts)
        self.queries = features(total, size, dtype, seed=1)
        matched = features(total, size, dtype, seed=2, like=self.queries, mean_cosine=0.5)
        more = features(sum(further) + 1, size, dtype, seed=3)[: sum(further)]
        self.parts = [torch.cat(parts) for parts in zip(matched.split(self.counts), more.split(further), strict=True)]
        self.keys = torch.cat(self.parts)
        first = 0
        self.own_targets, targets = [], []
        for count, part in zip(self.counts, self.parts, strict=True):
            own = torch.arange(count)
            self.own_targets.append(own * 7 // 3 % len(part) if shuffled else own)
            targets.append(self.own_targets[-1] + first)
            first += len(part)
        self.targets = torch.cat(targets)
        self.weights = torch.linspace(0.5, 1.5, total)  # as in tests/info_nce/cases.py
        self.shuffled = shuffled

    def given(self, options: dict[str, Any], rank: int | None = None) -> dict[str, Any]:
        """The options with the groups of the whole batch, or of a rank, in the place of their number."""
        if "groups" not in options:
            return options
        groups = grouped(len(self.queries), len(self.keys), options["groups"])
        counts = {"query_groups": self.counts, "key_groups": [len(part) for part in self.parts]}
        if rank is not None:
            groups = {name: ids.split(counts[name])[rank] for name, ids in groups.items()}
        return {**groups, **{name: value for name, value in options.items() if name != "groups"}}

    def of_rank(self, rank: int) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
        options = {"targets": self.own_targets[rank]} if self.shuffled else {}
        return self.queries.split(self.counts)[rank], self.parts[rank], options, self.weights.split(self.counts)[rank]


def differentiated(loss: Tensor, leaves: list[Tensor]) -> tuple[Tensor, ...]:
    return loss.detach(), *torch.autograd.grad(loss.sum(), leaves)


def leaves_of(queries: Tensor, keys: Tensor, scale: float) -> list[Tensor]:
    return [queries.clone().requires_grad_(), keys.clone().requires_grad_(), torch.tensor(scale, requires_grad=True)]


def call(group: Any, rank: int, joint: Joint, scale: float, impl: str, options: dict[str, Any]) -> tuple[Tensor, ...]:
    """The own losses and gradients under weights that differ from row to row."""
    queries, keys, targets, weights = joint.of_rank(rank)
    leaves = leaves_of(queries, keys, scale)
    given = {**targets, **joint.given(options, rank)}
    losses = mmkernels.info_nce(*leaves, reduction="none", process_group=group, impl=impl, **given)
    return losses.detach(), *torch.autograd.grad((losses * weights).sum(), leaves)


def cases() -> Iterator[tuple[bool, float, dict[str, Any]]]:
    """Whether targets are given, the scale, the options."""
    return itertools.product((False, True), SCALES, OPTIONS)


def every_case(group: Any, rank: int, dtypes: list[torch.dtype], impl: str) -> list[tuple[Tensor, ...]]:
    world = torch.distributed.get_world_size()
    return [
        call(group, rank, Joint(world, dtype, shuffled=shuffled), scale, impl, options)
        for dtype in dtypes
        for shuffled, scale, options in cases()
    ]


def joined(of_ranks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Losses and gradients of the joint batch; the scale's is the sum of all shares."""
    losses, queries, keys, scales = zip(*of_ranks, strict=True)
    return torch.cat(losses), torch.cat(queries), torch.cat(keys), torch.stack(scales).sum()


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_numbers_of_the_joint_batch(shape):
    of_ranks = results(shape, every_case, DTYPES, "cpu")
    found = iter(zip(*of_ranks, strict=True))
    for dtype in DTYPES:
        for shuffled, scale, options in cases():
            joint = Joint(len(of_ranks), dtype, shuffled=shuffled)
            given = {"targets": joint.targets, **joint.given(options)}
            exact = run(joint.queries.double(), joint.keys.double(), scale, "reference", **given)
            eager = run_eager(joint.queries, joint.keys, scale, **given)
            assert_results(joined(list(next(found))), eager, exact, joint.queries, joint.keys, scale)


IN_TRITON: list[dict[str, Any]] = [{"label_smoothing": 0.1}, {"symmetric": False}]


def in_triton(group: Any, rank: int) -> list[tuple[Tensor, ...]]:
    return [call(group, rank, Joint(2, torch.float32), 10.0, "triton", options) for options in IN_TRITON]


def test_numbers_of_the_joint_batch_in_triton(monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    of_ranks = results((2,), in_triton, context=multiprocessing.get_context("spawn"))
    joint = Joint(2, torch.float32)
    for options, parts in zip(IN_TRITON, zip(*of_ranks, strict=True), strict=True):
        given = {"targets": joint.targets, **options}
        exact = run(joint.queries.double(), joint.keys.double(), 10.0, "reference", **given)
        eager = run_eager(joint.queries, joint.keys, 10.0, **given)
        assert_results(joined(list(parts)), eager, exact, joint.queries, joint.keys, 10.0)


@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=str)
def test_the_reference_is_that_of_one_process(shape):
    of_ranks = results(shape, every_case, [torch.float64], "reference")
    found = iter(zip(*of_ranks, strict=True))
    for shuffled, scale, options in cases():
        joint = Joint(len(of_ranks), torch.float64, shuffled=shuffled)
        exact = run(joint.queries, joint.keys, scale, "reference", targets=joint.targets, **joint.given(options))
        for a, b in zip(joined(list(next(found))), exact, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=2e-6)  # the scale is float32


def reductions(group: Any, rank: int, impl: str) -> list[tuple[Tensor, ...]]:
    joint = Joint(torch.distributed.get_world_size(), torch.float32)
    queries, keys, _, weights = joint.of_rank(rank)
    found = []
    for options in ({"reduction": "sum"}, {"reduction": "mean"}, {"reduction": "mean", "weights": weights}):
        leaves = [*leaves_of(queries, keys, 10.0)]
        if "weights" in options:
            leaves.append(weights.clone().requires_grad_())
            options = {**options, "weights": leaves[-1]}
        found.append(differentiated(mmkernels.info_nce(*leaves[:3], process_group=group, impl=impl, **options), leaves))
    return found


@needs_library
@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_the_mean_over_ranks_is_the_joint_mean(impl):
    """What DDP makes of the shares: losses and gradients are averaged over ranks, those of a sum are added."""
    of_ranks = results((3,), reductions, impl)
    joint = Joint(3, torch.float64)
    options = ({"reduction": "sum"}, {"reduction": "mean"}, {"reduction": "mean", "weights": joint.weights.double()})
    for given, parts in zip(options, zip(*of_ranks, strict=True), strict=True):
        leaves = [joint.queries.clone().requires_grad_(), joint.keys.clone().requires_grad_()]
        leaves.append(torch.tensor(10.0, dtype=torch.float64, requires_grad=True))
        if "weights" in given:
            leaves.append(given["weights"].clone().requires_grad_())
            given = {**given, "weights": leaves[-1]}
        exact = differentiated(
            mmkernels.info_nce(*leaves[:3], targets=joint.targets, impl="reference", **given), leaves
        )
        share = 1 if given["reduction"] == "sum" else 3
        loss, queries, keys, scale, *weights = zip(*parts, strict=True)
        found = [torch.stack(loss).sum(), torch.cat(queries), torch.cat(keys), torch.stack(scale).sum()]
        found += [torch.cat(weight) for weight in weights]
        for a, b in zip(found, exact, strict=True):
            torch.testing.assert_close(a.double() / share, b, rtol=2e-5, atol=1e-6)


def queues(group: Any, rank: int) -> list[tuple[Tensor, ...]]:
    joint = Joint(torch.distributed.get_world_size(), torch.float32)
    queries, keys, _, _ = joint.of_rank(rank)
    key_queue, query_queue = (features(rank + 3, 48, torch.float32, seed=seed + rank) for seed in (20, 30))
    found = []
    both = {"key_queue": key_queue, "query_queue": query_queue}
    for given in ({"key_queue": key_queue}, both, {**both, **joint.given({"groups": 7}, rank)}):
        leaves = leaves_of(queries, keys, 10.0)
        loss = mmkernels.info_nce(*leaves, reduction="none", process_group=group, impl="cpu", **given)
        found.append(differentiated(loss, leaves))
    return found


@needs_library
def test_queues_of_each_rank_serve_all():
    of_ranks = results((3,), queues)
    joint = Joint(3, torch.float64)
    key_queue, query_queue = (
        torch.cat([features(rank + 3, 48, torch.float32, seed=seed + rank) for rank in range(3)]).double()
        for seed in (20, 30)
    )
    both = {"key_queue": key_queue, "query_queue": query_queue}
    of_groups = {**both, **joint.given({"groups": 7})}
    for given, parts in zip(({"key_queue": key_queue}, both, of_groups), zip(*of_ranks, strict=True), strict=True):
        leaves = [joint.queries.clone().requires_grad_(), joint.keys.clone().requires_grad_()]
        leaves.append(torch.tensor(10.0, dtype=torch.float64, requires_grad=True))
        loss = mmkernels.info_nce(*leaves, targets=joint.targets, reduction="none", impl="reference", **given)
        for a, b in zip(joined(list(parts)), differentiated(loss, leaves), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-5)


def twice(group: Any, rank: int) -> bool:
    joint = Joint(torch.distributed.get_world_size(), torch.bfloat16)
    one, two = (call(group, rank, joint, 100.0, "cpu", {"groups": 7, "label_smoothing": 0.1}) for _ in range(2))
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@needs_library
@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=str)
def test_the_same_bits_twice(shape):
    assert all(results(shape, twice))


def wrong(group: Any, rank: int) -> list[str]:
    """The errors of calls that are wrong on one rank, or not the same on all."""
    queries, keys = torch.zeros(4, 8), torch.zeros(6, 8)
    bad = rank == 1
    calls: list[tuple[Tensor, Tensor, dict[str, Any]]] = [
        (queries, keys[:, :5] if bad else keys, {}),
        (queries[:0] if bad else queries, keys, {}),
        (queries, keys, {"targets": torch.tensor([0, 6, 1, 2]) if bad else None}),
        (queries[:, :7] if bad else queries, keys[:, :7] if bad else keys, {}),
        (queries.half() if bad else queries, keys.half() if bad else keys, {}),
        (queries, keys, {"symmetric": not bad}),
        (queries, keys, {"label_smoothing": 0.1 if bad else 0.2}),
        (queries, keys, {"weights": torch.ones(4) if bad else None}),
        (queries, keys, {"impl": "reference" if bad else "cpu"}),
        (queries.clone().requires_grad_() if bad else queries, keys, {}),
        (queries, keys, {"query_groups": torch.arange(4), "key_groups": torch.arange(6)} if bad else {}),
        (queries, keys, {"query_groups": torch.arange(4) + 3 * bad, "key_groups": torch.arange(6)}),
        (queries, keys, {"query_groups": torch.zeros(4).long(), "key_groups": torch.arange(6) // 3}),
    ]
    texts = []
    for q, k, options in calls:
        with pytest.raises((ValueError, TypeError)) as error:
            mmkernels.info_nce(q, k, 10.0, process_group=group, **{"impl": "cpu", **options})
        texts.append(f"{type(error.value).__name__}: {error.value}")
    return texts


@needs_library
@pytest.mark.parametrize("shape", [(3,), (2, 2)], ids=str)
def test_an_error_is_the_same_on_all_ranks(shape):
    first, second, *rest = results(shape, wrong)
    expected = [
        "ValueError: rank 1: keys: expected D = 8",
        "ValueError: rank 1: queries: expected at least one row",
        "ValueError: rank 1: targets: expected indices of the 6 keys",
        "ValueError: process_group: expected D to be the same on all ranks, got 8 on rank 0 and 7 on rank 1",
        "ValueError: process_group: expected the dtype of the features to be the same on all ranks, got torch.float32",
        "ValueError: process_group: expected symmetric to be the same",
        "ValueError: process_group: expected label_smoothing to be the same on all ranks, got 0.2 on rank 0 and 0.1",
        "ValueError: process_group: expected weights to be the same",
        "ValueError: process_group: expected the implementation to be the same on all ranks, got cpu on rank 0 and ref",
        "ValueError: process_group: expected whether queries need a gradient to be the same",
        "ValueError: process_group: expected groups to be the same",
        "ValueError: rank 1: query_groups: expected groups of key_groups, query 3 is of group 6, and no key is",
        "ValueError: key_groups: key 3 is matched by query 3, and its group is that of no query",
    ]
    for text, *others in zip(expected, first, *rest, strict=True):
        assert all(other.replace("rank 0: ", "").startswith(text) for other in others), others
    for text, own in zip(expected[:3], second, strict=False):
        assert own.startswith(text.replace("rank 1: ", "")), own


def one_process_of_its_own(group: Any, rank: int) -> tuple[Tensor, ...]:
    """Ranks 1 and 3 of four: a group that is not the world."""
    pair = torch.distributed.new_group([1, 3])
    if rank not in (1, 3):
        return ()
    return call(pair, rank // 2, Joint(2, torch.float32), 10.0, "cpu", {})


@needs_library
def test_a_part_of_the_ranks():
    _, one, _, two = results((4,), one_process_of_its_own)
    joint = Joint(2, torch.float32)
    exact = run(joint.queries.double(), joint.keys.double(), 10.0, "reference", targets=joint.targets)
    eager = run_eager(joint.queries, joint.keys, 10.0, targets=joint.targets)
    assert_results(joined([one, two]), eager, exact, joint.queries, joint.keys, 10.0)


def peak(group: Any, rank: int, rows: int) -> int:
    leaves = leaves_of(features(rows, 64, seed=rank), features(rows, 64, seed=rank + 9), 10.0)

    def step() -> None:
        mmkernels.info_nce(*leaves, process_group=group, impl="cpu").backward()
        for leaf in leaves:
            leaf.grad = None

    step()
    return peak_allocated(step)


@needs_library
def test_memory_does_not_grow_with_the_ranks():
    """At as many rows a rank. The matrix of own rows against all keys would take 4 MiB a rank and grow."""
    rows = 1024
    five, six = (max(results((world,), peak, rows)) for world in (5, 6))  # from 5 on all buffers are there
    assert six <= 1.001 * five
    block = rows * 64 * 4
    assert six < 14 * block


def killed(group: Any, rank: int, how: str) -> None:
    leaves = leaves_of(*(features(64, 16, seed=seed) for seed in (rank, 9)), 10.0)
    if rank == 1 and how == "forward":
        os.kill(os.getpid(), signal.SIGKILL)
    loss = mmkernels.info_nce(*leaves, process_group=group, impl="cpu")
    if rank == 1 and how == "backward":
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 1 and how == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    loss.backward()


@needs_library
@pytest.mark.parametrize("how", ["forward", "backward", "stopped"])
def test_a_lost_rank_is_named(how):
    found = on_ranks((3,), killed, how, seconds=15, timeout=5)
    assert isinstance(found[1], Lost)
    for rank in (0, 2):
        assert isinstance(found[rank], RuntimeError), found[rank]
        assert f"mmkernels: rank {rank} lost rank" in str(found[rank])
        assert "start all ranks again from the last checkpoint" in str(found[rank])


def slow(group: Any, rank: int) -> tuple[Tensor, ...]:
    if rank == 1:
        time.sleep(2)
    return call(group, rank, Joint(2, torch.float32), 10.0, "cpu", {})


@needs_library
def test_a_slow_rank_is_waited_for():
    assert len(results((2,), slow, timeout=20)) == 2


def with_nan(group: Any, rank: int) -> tuple[Tensor, ...]:
    joint = Joint(3, torch.float32)
    if rank == 1:
        joint.parts[1][0, 5] = torch.nan
    return call(group, rank, joint, 10.0, "cpu", {})


@needs_library
def test_nan_on_one_rank_is_nan_on_all():
    for losses, queries, *_ in results((3,), with_nan):
        assert losses.isnan().all()
        assert queries.isnan().any()


def compiled(group: Any, rank: int) -> tuple[bool, bool]:
    joint = Joint(torch.distributed.get_world_size(), torch.float32)
    queries, keys, _, weights = joint.of_rank(rank)

    def loss(q: Tensor, k: Tensor, s: Tensor) -> Tensor:
        options = {"label_smoothing": 0.1, "weights": weights, **joint.given({"groups": 7}, rank)}
        return mmkernels.info_nce(2 * q, k, s, process_group=group, impl="cpu", **options)

    def pairs(q: Tensor, k: Tensor, s: Tensor) -> Tensor:
        return mmkernels.siglip(2 * q, k, s, -3.0, process_group=group, impl="cpu")

    same = []
    for function in (loss, pairs):
        eager, one_graph = (
            differentiated(call(*leaves), leaves)
            for call, leaves in (
                (function, leaves_of(queries, keys, 10.0)),
                (torch.compile(function, fullgraph=True, backend="aot_eager"), leaves_of(queries, keys, 10.0)),
            )
        )
        same.append(all(torch.equal(a, b) for a, b in zip(eager, one_graph, strict=True)))
    return tuple(same)


@needs_library
def test_one_graph_of_torch_compile():
    assert results((2,), compiled) == [(True, True)] * 2


def sent(group: Any, rank: int, rows: int) -> tuple[int, int]:
    """Bytes that this rank sends forward, and backward."""
    leaves = leaves_of(features(rows, 64, seed=rank), features(rows, 64, seed=rank + 9), 10.0)
    send, counts = torch.distributed.batch_isend_irecv, [0]

    def counted(operations: list[Any]) -> Any:
        counts[-1] += sum(one.tensor.nbytes for one in operations if one.op is torch.distributed.isend)
        return send(operations)

    torch.distributed.batch_isend_irecv = counted
    loss = mmkernels.info_nce(*leaves, process_group=group, impl="cpu")
    counts.append(0)
    loss.backward()
    return tuple(counts)


@needs_library
def test_bytes_sent_are_those_of_the_page():
    """Keys and 8 bytes for each forward; keys, their gradients and 12 bytes for each backward (docs/distributed.md)."""
    rows, keys = 100, 100 * 64 * 4
    assert set(results((3,), sent, rows)) == {(2 * (keys + 8 * rows), 2 * (2 * keys + 12 * rows))}
