"""What follows the step: hypotheses, bounds, parents and the done flag, the same from the kernel and the reference."""

import pytest
import torch

from mmkernels.beam_search import ops
from mmkernels.beam_search.reference import beam_search_advance
from mmkernels.beam_search.specification import (
    BOUND,
    COUNT,
    COUNT_OR_TOP,
    DEAD,
    POISONED,
    BeamCandidates,
    Progress,
    Rule,
)
from tests.cpu_kernels import needs_library

INF = torch.inf


def candidates(scores, tokens, beams=None, poisoned=False):
    """One item's candidates; those that score None are not there."""
    valid = [score is not None for score in scores]
    return BeamCandidates(
        torch.tensor([[-INF if score is None else score for score in scores]]),
        torch.tensor([beams or [0] * len(tokens)]),
        torch.tensor([tokens]),
        torch.tensor([valid]),
        torch.tensor([poisoned]),
    )


def advance(found, progress, *, step=0, T=3, alpha=1.0, eos=(9,), **options):
    rule = Rule(**{"step": step, "max_length": T, "stop": COUNT, "bound_length": step + 1, "target": 2, "num_return": 1,
                   "cuts": True, "first_come": False} | options)  # fmt: skip
    penalties = torch.tensor([1.0, *(n**alpha for n in range(1, T + 1))])
    return beam_search_advance(found, progress, torch.tensor(eos, dtype=torch.int64), penalties, rule)


def nothing(k=2):
    return Progress.none(1, k, torch.zeros(1))


def test_an_end_among_the_first_k_is_a_hypothesis_and_the_rest_go_on():
    progress = nothing()
    beams = advance(candidates([-1.0, -2.0, -3.0, -4.0], [5, 9, 9, 6], [0, 1, 0, 1]), progress, step=1)
    assert beams.tokens.tolist() == [[5, 6]]
    assert beams.parents.tolist() == [[0, 1]]
    assert beams.scores.tolist() == [[-1.0, -4.0]]
    assert progress.scores.tolist() == [[-1.0, -INF]]  # -2 / 2; the one at rank 2 is lost
    assert [x.tolist() for x in progress[2:6]] == [[[1, 0]], [[1, 0]], [[9, 0]], [[True, False]]]
    assert (progress.counts.tolist(), progress.done.tolist()) == ([1], [False])


def test_a_beam_at_the_last_step_is_cut_or_lost():
    for cuts, count in ((True, 2), (False, 0)):
        progress = nothing()
        advance(candidates([-1.0, -2.0, -3.0], [5, 6, 7]), progress, step=2, cuts=cuts)
        assert (progress.counts.tolist(), progress.done.tolist()) == ([count], [True])


def test_of_equal_hypotheses_the_earlier_stays_ahead():
    progress = nothing(3)
    advance(candidates([-1.0, -1.0, -5.0], [9, 9, 4], [0, 1, 0]), progress, alpha=0.0, target=9)
    advance(candidates([-1.0, -0.5, -5.0], [9, 9, 4], [2, 2, 0]), progress, step=1, alpha=0.0, target=9)
    assert progress.scores.tolist() == [[-0.5, -1.0, -1.0]]
    assert progress.beams.tolist() == [[2, 0, 1]]
    assert progress.counts.tolist() == [4]


def test_first_come_first_served_reports_what_it_turned_away():
    progress = nothing(3)
    advance(candidates([-1.0, -2.0, -3.0, -10.0], [9, 9, 9, 4]), progress, first_come=True, target=2, T=5)
    assert progress.counts.tolist() == [2]
    assert progress.done.tolist() == [True]
    assert progress.missed.tolist() == [-2.0]  # the beam that still ran, over the longest length
    progress = nothing(3)
    advance(candidates([-1.0, -2.0, -3.0, -90.0], [9, 9, 9, 4]), progress, first_come=True, target=2, T=5)
    assert progress.missed.tolist() == [-3.0]


@pytest.mark.parametrize(("bound_length", "stops"), [(2, False), (1, True)])
def test_the_bound_stops_when_no_beam_can_beat_the_worst_hypothesis(bound_length, stops):
    progress = nothing(1)
    found = candidates([-2.0, -3.0], [9, 4])
    advance(found, progress, stop=BOUND, bound_length=bound_length)
    assert progress.done.tolist() == [stops]
    assert progress.missed.tolist() == [-1.0 if stops else -INF]


def test_the_best_candidates_end_is_remembered():
    progress = nothing()
    rule = {"stop": COUNT_OR_TOP, "target": 5, "num_return": 2, "T": 9}
    advance(candidates([-1.0, -2.0, -3.0], [9, 4, 5]), progress, **rule)
    assert progress.done.tolist() == [False]
    advance(candidates([-1.0, -2.0, -3.0], [4, 9, 5]), progress, step=1, **rule)
    assert progress.done.tolist() == [True]


def test_faults():
    progress = nothing()
    beams = advance(candidates([None, None], [0, 0], poisoned=True), progress)
    assert (progress.fault.tolist(), progress.done.tolist()) == ([POISONED], [True])
    assert not beams.valid.any()
    advance(candidates([None, None], [0, 0]), progress, step=1)
    assert progress.fault.tolist() == [POISONED]
    progress = nothing()
    advance(candidates([None, None], [0, 0]), progress)
    assert (progress.fault.tolist(), progress.done.tolist()) == ([DEAD], [True])


def test_a_done_item_does_not_change():
    progress = nothing(1)
    advance(candidates([-1.0, -2.0], [9, 4]), progress, target=1)
    before = [x.clone() for x in progress]
    beams = advance(candidates([-0.1, -0.2], [9, 4]), progress, step=1, target=1)
    assert not beams.valid.any()
    for old, new in zip(before, progress, strict=True):
        assert torch.equal(old, new)


def random_search(seed):
    """Random rules, and candidates for each of their steps: scores of few values, so that there are ties."""
    g = torch.Generator().manual_seed(seed)

    def one(low, high):
        return int(torch.randint(low, high, (1,), generator=g))

    N, k, T = one(0, 5), one(1, 5), one(1, 6)
    C = k * one(2, 4)
    eos = torch.tensor([2, 3][: one(0, 3)], dtype=torch.int64)
    penalties = torch.tensor([1.0, *(float(n) ** one(-1, 3) for n in range(1, T + 1))])
    steps = []
    for t in range(T):
        poisoned = torch.rand(N, generator=g) < 0.08
        valid = torch.arange(C) < torch.randint(0, 4 * C, (N, 1), generator=g)
        valid = valid & ~poisoned[:, None]
        scores = -torch.randint(0, 8, (N, C), generator=g).float().sort(1).values
        scores = torch.where(scores < -6, -INF, scores)  # candidates that there are, though they score nothing
        beams, tokens = torch.randint(0, k, (N, C), generator=g), torch.randint(0, 8, (N, C), generator=g)
        found = BeamCandidates(torch.where(valid, scores, -INF), beams * valid, tokens * valid, valid, poisoned)
        rule = Rule(t, T, one(0, 3), one(1, T + 1), one(1, 2 * k + 1), one(1, k + 1), one(0, 2) == 1, one(0, 2) == 1)
        steps.append((found, rule))
    return N, k, eos, penalties, steps


@needs_library
@pytest.mark.parametrize("block", range(20))
def test_the_kernel_equals_the_reference(block):
    for seed in range(block * 20, block * 20 + 20):
        N, k, eos, penalties, steps = random_search(seed)
        expected, actual = (Progress.none(N, k, torch.zeros(1)) for _ in range(2))
        for found, rule in steps:
            e = beam_search_advance(found, expected, eos, penalties, rule)
            a = ops.beam_search_advance(found, actual, eos, penalties, rule, "cpu")
            names = (*e._fields, *expected._fields)
            for name, x, y in zip(names, (*a, *actual), (*e, *expected), strict=True):
                assert torch.equal(x, y), (seed, rule, name, x, y)


def test_a_hypothesis_of_minus_infinity_is_there():
    progress = nothing()
    advance(candidates([-INF, -INF, None], [9, 4, 0], [1, 0, 0]), progress)
    assert progress.valid.tolist() == [[True, False]]
    assert [progress.beams[0, 0].item(), progress.scores[0, 0].item()] == [1, -INF]
    advance(candidates([-3.0, -INF, None], [9, 9, 0], [0, 1, 0]), progress, step=1)
    assert progress.scores.tolist() == [[-1.5, -INF]]
    assert progress.times.tolist() == [[1, 0]]


@needs_library
@pytest.mark.parametrize("name", [*BeamCandidates._fields, *Progress._fields, "eos", "penalties"])
def test_the_registered_op_reads_nothing_past_its_arguments(name):
    found, progress = candidates([-1.0, -2.0, -3.0], [5, 9, 6]), nothing()
    arguments = {
        **{f"found {field}": x for field, x in found._asdict().items()},
        **progress._asdict(),
        "eos": torch.tensor([9]),
        "penalties": torch.ones(4),
    }
    rule = Rule(0, 3, COUNT, 1, 2, 1, True, False)
    name = f"found {name}" if f"found {name}" in arguments else name
    wrong = torch.empty(1, 9, dtype=arguments[name].dtype)  # as many items, and no more that fits
    with pytest.raises(ValueError, match="expected"):
        torch.ops.mmkernels.beam_search_advance_cpu(*(arguments | {name: wrong}).values(), *rule)


@needs_library
def test_opcheck():
    """At steps that change, taken together, all that the schema says is changed in place."""
    seen = set()
    for N, k, eos, penalties, steps in map(random_search, range(40)):
        progress = Progress.none(N, k, torch.zeros(1))
        for found, rule in steps:
            before = Progress(*(x.clone() for x in progress))
            ops.beam_search_advance(found, progress, eos, penalties, rule, "cpu")
            changed = {
                name for name, x, y in zip(before._fields, before, progress, strict=True) if not torch.equal(x, y)
            }
            if not changed <= seen:
                seen |= changed
                torch.library.opcheck(
                    torch.ops.mmkernels.beam_search_advance_cpu, (*found, *before, eos, penalties, *rule)
                )
    assert seen == set(Progress._fields)
