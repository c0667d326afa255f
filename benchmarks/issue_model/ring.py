"""Warpgroups that share slices of operands in a ring of shared memory, which a producer fills by TMA: their clocks.

Beside what model.py knows, a warp waits for its slice at a barrier in memory (SYNCS...TRYWAIT) and frees it when its
product has been made (SYNCS.ARRIVE...RED, at the barrier of a cluster). The producer asks for a slice as soon as all
warpgroups have freed its place; the port to L2 hands out one after the other, and each comes `latency` later. The other
blocks of the cluster are taken to do the same at the same time.
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.issue_model import model
from benchmarks.issue_model.pipes import Chip
from benchmarks.issue_model.sass import NONE, Instruction

_ASKED = 100.0  # from the last arrival at a barrier until the producer's copy is issued
_WOKEN = 20.0  # until a barrier's waiters issue again


class Ring(NamedTuple):
    """How slices come."""

    places: int
    l2_clocks: float  # of the port to L2 for a block's share of a slice
    latency: float


def steps_of(path: Sequence[Instruction], chip: Chip) -> list[model.Step]:
    """The path of one warpgroup as `cycles` reads it. A named barrier joins the warps of one warpgroup, of which each
    scheduler has one: it takes its clocks and no more."""
    steps = []
    for step in model.steps_of(path, chip):
        opcode, kind = step.instruction.opcode, step.kind
        if "TRYWAIT" in opcode:
            kind = "wait for a slice"
        elif opcode.startswith("SYNCS.ARRIVE") and "RED" in opcode:
            kind = "free a slice"
        elif kind == "barrier":
            kind = ""
        steps.append(step._replace(kind=kind))
    return steps


class _Group:
    """The one warp of a warpgroup on a scheduler."""

    def __init__(self) -> None:
        self.at, self.ready, self.open = 0, 0.0, 0.0
        self.boards = [0.0] * NONE
        self.products: list[float] = []
        self.read = self.freed = 0
        self.ends: list[float] = []


def cycles(steps: Sequence[model.Step], chip: Chip, ring: Ring, groups: int = 2, times: int = 12) -> float:
    """Clocks of one trip along the path, in a steady state: the later half of `times` trips."""
    team = [_Group() for _ in range(groups)]
    pipes: defaultdict[str, float] = defaultdict(float)
    arrived: dict[int, float] = {}
    freed: defaultdict[int, list[float]] = defaultdict(list)
    port = clock = 0.0

    def produce() -> None:
        nonlocal port
        while (asked := len(arrived)) < ring.places or len(freed[asked - ring.places]) == groups:
            ready = 0.0 if asked < ring.places else max(freed.pop(asked - ring.places)) + _ASKED
            port = max(port, ready) + ring.l2_clocks
            arrived[asked] = port + ring.latency

    def when(group: _Group) -> float:
        step = steps[group.at % len(steps)]
        if step.kind == "wait for a slice" and group.read not in arrived:
            return float("inf")
        return max(group.ready, pipes[step.pipe], *(group.boards[board] for board in step.instruction.waits), 0.0)

    produce()
    last = team[-1]
    while running := [group for group in team if len(group.ends) < times]:
        # The warp that issued last goes on; else the one that has waited longest.
        group = last if last in running and when(last) <= clock else min(running, key=when)
        if when(group) == float("inf"):
            raise RuntimeError("every warpgroup waits for a slice that none frees")
        clock, last = max(clock, when(group)), group
        step = steps[group.at % len(steps)]
        i = step.instruction
        done, latency = clock + step.clocks, max(4, step.latency)
        group.ready = clock + max(1, i.stall)
        if step.pipe == "matrix":
            done = pipes["matrix queue"] = max(pipes["matrix queue"], clock) + step.clocks
            group.open = done + model._PRODUCT_CLOCKS
            if step.kind != "product":
                group.products.append(group.open)
        else:
            pipes[step.pipe] = done
        if step.kind == "load":
            done += chip.l2_latency
        elif step.kind == "wait for products":
            group.ready = max(group.ready, *model._finished(group.products, step.running))
        elif step.kind == "wait for a slice":
            if arrived[group.read] > clock:
                group.ready = done = arrived[group.read] + _WOKEN
            group.read += 1
        elif step.kind == "free a slice":
            freed[group.freed].append(clock + _WOKEN)
            group.freed += 1
            produce()
        if i.sets != NONE:
            group.boards[i.sets] = max(group.boards[i.sets], done + latency)
        if i.frees != NONE:
            group.boards[i.frees] = max(group.boards[i.frees], done + min(latency, 16))
        group.at += 1
        if group.at % len(steps) == 0:
            group.ends.append(clock)
        clock += 1
    half = times // 2
    first, end = (max(group.ends[trip] for group in team) for trip in (half, times - 1))
    return (end - first) / (times - 1 - half)
