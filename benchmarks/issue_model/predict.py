"""The tile of a kernel: what its main loop and the rest take of each pipe, and how long it lasts.

A tile is one trip through the loop around the main loop, which multiplies; a kernel without such a loop makes one tile.
Where one loop goes over tiles and the steps of their products, a tile is as many trips as it has steps, one of which
has the addresses and the epilogue, too.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.issue_model import gcn, model
from benchmarks.issue_model.flow import Flow, Loop, Part
from benchmarks.issue_model.pipes import SCHEDULERS, Chip, is_matrix, product_flops, use
from benchmarks.issue_model.sass import Code, Instruction

# From the end of a block of threads until the one that takes its place issues.
_TURNOVER = 600.0


class Shape(NamedTuple):
    """How a kernel is launched, and how often a tile goes through its main loop."""

    warps: int  # of a block
    blocks: int  # resident on a multiprocessor
    steps: int
    elements: int = 0  # of a tile, that a thread holds
    shapeless_flops: float = 0.0  # what a product whose name has no shape is to each warp


class Work(NamedTuple):
    """What a warp issues in a part of a tile."""

    instructions: int
    clocks: dict[str, float]  # of each pipe of its scheduler
    named: Counter[str]  # how many instructions of each name

    @classmethod
    def of(cls, path: Sequence[Instruction], chip: Chip, shapeless_flops: float = 0.0) -> "Work":
        clocks: dict[str, float] = {}
        for instruction in path:
            taken = use(instruction, chip, shapeless_flops)
            clocks[taken.pipe] = clocks.get(taken.pipe, 0.0) + taken.clocks
        return cls(len(path), clocks, Counter(gcn.label(i) if gcn.is_amd(i) else i.name for i in path))

    def all_clocks(self, warps: int) -> dict[str, float]:
        """Clocks of each pipe, and of issue, for all the warps of a scheduler."""
        return {name: warps * clocks for name, clocks in (self.clocks | {"issue": self.instructions}).items()}


class Tile(NamedTuple):
    """One tile of a kernel on a chip. Clocks are those of one scheduler and of all its warps of one block."""

    step: Work  # one trip through the main loop
    rest: Work  # before and after it: addresses, the first copies, the epilogue
    warps: int  # of a block, on one scheduler
    steps: int
    flops: float  # of the whole block
    cycles: float  # from one tile of a multiprocessor to the next, by the model

    @property
    def clocks(self) -> dict[str, float]:
        """Clocks of each pipe, and of issue, for a tile."""
        step, rest = self.step.all_clocks(self.warps), self.rest_clocks
        return {name: rest.get(name, 0.0) + self.steps * step.get(name, 0.0) for name in {*step, *rest}}

    @property
    def rest_clocks(self) -> dict[str, float]:
        """The same outside the main loop."""
        return self.rest.all_clocks(self.warps)

    def bound(self) -> tuple[float, str]:
        """Cycles at best: those of the busiest pipe, and its name."""
        return max((clocks, name) for name, clocks in self.clocks.items())


def tile_of(code: Code, chip: Chip, shape: Shape) -> Tile:
    """Read the tile out of a kernel's code and time it."""
    flow = Flow(code)
    main = flow.innermost_with_matrix()
    if flat := flow.flattened(main, shape.elements):
        return _flattened(flow, flat, chip, shape)
    # Of nests that exclude each other the largest product's is the likely one: the other works in smaller pieces.
    around = flow.enclosing(max(main, key=lambda loop: _flops(flow.code(loop.body), shape))) if main else None
    main = [loop for loop in main if around is None or loop.body < around.body]
    parts = flow.path(around, shape.elements)
    step = [i for loop in main for i in _straight(flow, flow.path(loop))]
    rest = _straight(flow, parts, leaving_out=main)
    trips = shape.steps - _peeled(step, rest)
    tile = _repeated(flow, parts, main, trips)
    return _timed(step, rest, tile, trips, chip, shape, loops=around is not None)


def _flattened(flow: Flow, loop: Loop, chip: Chip, shape: Shape) -> Tile:
    step = _straight(flow, flow.path(loop, must_store=False))
    last = _straight(flow, flow.path(loop, shape.elements, once_a_tile=True))
    rest, beside = [], list(step)
    for instruction in last:
        if instruction in beside:
            beside.remove(instruction)
        else:
            rest.append(instruction)
    return _timed(step, rest, step * (shape.steps - 1) + last, shape.steps, chip, shape, loops=True)


def _timed(
    step: Sequence[Instruction],
    rest: Sequence[Instruction],
    tile: Sequence[Instruction],
    trips: int,
    chip: Chip,
    shape: Shape,
    loops: bool,
) -> Tile:
    warps = max(1, shape.warps // SCHEDULERS)
    flops = _flops(tile, shape) * shape.warps
    steps = model.steps_of(tile, chip, shape.shapeless_flops)
    cycles = _cycles(steps, chip, warps, shape.blocks, loops)
    of_step, of_rest = (Work.of(path, chip, shape.shapeless_flops) for path in (step, rest))
    return Tile(of_step, of_rest, warps, trips, flops, cycles)


def _flops(path: Iterable[Instruction], shape: Shape) -> float:
    """Of the products that a warp makes."""
    return sum(product_flops(i) or shape.shapeless_flops for i in path if is_matrix(i))


def _peeled(step: Sequence[Instruction], rest: Sequence[Instruction]) -> int:
    """How many trips of the main loop stand before or after it. On sm_100 the first does, on AMD as many as the copies
    are ahead; elsewhere a product beside the loop is one of its own."""
    in_step, in_rest = (
        [i for i in path if is_matrix(i) and (i.name.startswith("UTC") or gcn.is_amd(i))] for path in (step, rest)
    )
    return len(in_rest) // len(in_step) if in_step else 0


def _cycles(steps: list[model.Step], chip: Chip, warps: int, blocks: int, loops: bool) -> float:
    """Cycles from one tile of a multiprocessor to the next, in a steady state: three tiles a block less the first."""
    if loops:
        alone = model.issue(steps, chip, warps)[0]
        first, all_three = (
            max(model.issue(steps * times, chip, warps, blocks, offset=alone / blocks)) for times in (1, 3)
        )
        return (all_three - first) / 2 / blocks
    ends = model.issue(steps, chip, warps, blocks, offset=0.0)
    if blocks == 1:
        return ends[0] + _TURNOVER
    alone = model.issue(steps, chip, warps)[0] + _TURNOVER
    first, all_three = (max(model.issue(steps * times, chip, warps, blocks, offset=alone / blocks)) for times in (1, 3))
    return max((all_three - first) / 2 / blocks, alone / blocks)


def _straight(flow: Flow, parts: list[Part], leaving_out: Sequence[Loop] = ()) -> list[Instruction]:
    return _repeated(flow, parts, leaving_out, 0)


def _repeated(flow: Flow, parts: list[Part], main: Sequence[Loop], steps: int) -> list[Instruction]:
    """The instructions of a path, the main loops as often as they are run and every other loop once."""
    path: list[Instruction] = []
    for part in parts:
        if part.loop is None:
            path += flow.instructions[part.first : part.end]
            continue
        inner = _repeated(flow, flow.path(part.loop), main, steps)
        path += inner * (steps if part.loop in main else 1)
    return path
