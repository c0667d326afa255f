"""Loops of a kernel, and the path that a warp takes through one tile.

The code alone does not say which way a branch goes. A path makes every product, enters every loop, stores something and
has an operation for each element of the tile; of the paths that do, it is the shortest, which is the one of inner tiles
and of the likely case, as the kernels are written: the unlikely case does more.
"""

import functools
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.issue_model.pipes import float_operations, is_matrix, is_store
from benchmarks.issue_model.sass import Code, Instruction


class Block(NamedTuple):
    """Instructions first, ..., end - 1: entered at the first, left after the last."""

    first: int
    end: int
    successors: tuple[int, ...]  # indices of blocks


class Loop(NamedTuple):
    """A natural loop: its header and its blocks."""

    header: int
    body: frozenset[int]
    latches: frozenset[int]  # the blocks that jump back


class Part(NamedTuple):
    """A piece of a path: instructions first, ..., end - 1, or a loop inside it, whose trips the caller knows."""

    first: int
    end: int
    loop: Loop | None = None


class Flow:
    """The control flow of one kernel."""

    def __init__(self, code: Code) -> None:
        self.instructions = code.instructions
        self.blocks = _blocks(code)
        self.loops = self._find_loops()

    def innermost_with_matrix(self) -> list[Loop]:
        """The loops that multiply and hold no other loop that does, in the order of the code."""
        multiplying = [loop for loop in self.loops if self._multiplies(loop.body)]
        found = [loop for loop in multiplying if not any(other.body < loop.body for other in multiplying)]
        return sorted(found, key=lambda loop: loop.header)

    def enclosing(self, loop: Loop) -> Loop | None:
        """The smallest loop around this one."""
        around = [other for other in self.loops if loop.body < other.body]
        return min(around, key=lambda other: len(other.body), default=None)

    def flattened(self, loops: Iterable[Loop], elements: int) -> Loop | None:
        """The loop over tiles and over the steps of their products in one: some of its trips store a tile of so many
        elements, and some store nothing."""
        for loop in loops:
            last = self._code(self.path(loop, elements, once_a_tile=True))
            stores = any(is_store(i) for i in last) and sum(float_operations(i) for i in last) >= elements > 0
            if stores and not any(is_store(i) for i in self._code(self.path(loop, must_store=False))):
                return loop
        return None

    def path(
        self, loop: Loop | None, elements: int = 0, must_store: bool = True, once_a_tile: bool = False
    ) -> list[Part]:
        """One trip through a loop, from its header to the jump back; None: the whole kernel. elements: how many
        floating-point operations it needs outside of inner loops, if any path has so many. once_a_tile: before its
        products it takes the longest way, which has the addresses of another tile."""
        within = loop.body if loop else self.reachable
        inner = self._children(loop)
        owner = {block: child for child in inner for block in child.body}
        ends = loop.latches if loop else {b for b in within if self._may_end(b)}
        start = loop.header if loop else 0

        @functools.cache
        def best(block: int, has_stored: bool, floats: int) -> tuple[tuple[int, ...], tuple[Part, ...]]:
            """The work and the parts of the best way from a block to an end, _NOWHERE if no way ends. The other
            arguments: what was done before the block."""
            child = owner.get(block)
            blocks = child.body if child else frozenset([block])
            part = Part(self.blocks[block].first, self.blocks[block].end, child)
            exits = {s for b in blocks for s in self.blocks[b].successors} - blocks
            code = self.code(blocks)
            has_stored |= any(is_store(i) for i in code)
            floats = min(elements, floats + sum(float_operations(i) for i in code if child is None))
            ways = [best(s, has_stored, floats) for s in exits if s in within and s != start]
            if blocks & set(ends):
                ways.append(((0, 0, int(has_stored), floats, 0), ()))
            if not ways:
                return _NOWHERE, ()
            (products, loops, stored, done, short), parts = max(ways, key=lambda way: way[0])
            waits = any(i.name == "SYNCS" for i in code) and len(code) < 16  # a wait that spins is no work
            length = len(code) if once_a_tile and products else -len(code)
            products += sum(is_matrix(i) for i in code)
            loops += child is not None and not waits
            return (products, loops, stored, done, short + length), (part, *parts)

        return _joined(best(start, not must_store, 0)[1])

    def _code(self, parts: Iterable[Part]) -> list[Instruction]:
        return [i for part in parts for i in self.instructions[part.first : part.end]]

    def _may_end(self, block: int) -> bool:
        """Whether the kernel may end there: an exit may have a condition, such as a loop's."""
        return not self.blocks[block].successors or self.instructions[self.blocks[block].end - 1].name == "EXIT"

    def code(self, blocks: Iterable[int]) -> list[Instruction]:
        return [i for b in blocks for i in self.instructions[self.blocks[b].first : self.blocks[b].end]]

    def _multiplies(self, blocks: Iterable[int]) -> bool:
        return any(is_matrix(i) for i in self.code(blocks))

    def _children(self, loop: Loop | None) -> list[Loop]:
        """The largest loops inside a loop."""
        inner = [other for other in self.loops if loop is None or other.body < loop.body]
        return [one for one in inner if not any(one.body < other.body for other in inner)]

    def _find_loops(self) -> list[Loop]:
        """Every jump back to a block on the way from the entry closes a loop: the blocks from which the jump is reached
        without the block that it goes to."""
        latches: dict[int, set[int]] = {}
        predecessors: dict[int, set[int]] = {}
        state = {0: "open"}
        way = [(0, iter(self.blocks[0].successors))]
        while way:
            block, successors = way[-1]
            for successor in successors:
                predecessors.setdefault(successor, set()).add(block)
                if successor not in state:
                    state[successor] = "open"
                    way.append((successor, iter(self.blocks[successor].successors)))
                    break
                if state[successor] == "open":
                    latches.setdefault(successor, set()).add(block)
            else:
                state[block] = "done"
                way.pop()
        self.reachable = frozenset(state)
        loops = []
        for header, sources in latches.items():
            body, todo = {header, *sources}, [source for source in sources if source != header]
            while todo:
                new = predecessors.get(todo.pop(), set()) - body
                body |= new
                todo.extend(new)
            loops.append(Loop(header, frozenset(body), frozenset(sources)))
        return loops


_NOWHERE = (-(10**9), 0, 0, 0, 0)  # worse than any path


def _joined(parts: Iterable[Part]) -> list[Part]:
    """Neighbouring pieces of straight code as one."""
    joined: list[Part] = []
    for part in parts:
        if joined and not part.loop and not joined[-1].loop and joined[-1].end == part.first:
            joined[-1] = Part(joined[-1].first, part.end)
        else:
            joined.append(part)
    return joined


def _blocks(code: Code) -> list[Block]:
    instructions, labels = code
    starts = {0, *labels.values()} | {i + 1 for i, x in enumerate(instructions) if _ends_block(x)}
    ordered = sorted(start for start in starts if start < len(instructions))
    index = {start: number for number, start in enumerate(ordered)}
    blocks = []
    for number, first in enumerate(ordered):
        end = ordered[number + 1] if number + 1 < len(ordered) else len(instructions)
        last = instructions[end - 1]
        successors = []
        if last.name == "BRA" and ".DIV" not in last.opcode and last.target in labels:
            successors.append(index[labels[last.target]])
        leaves = last.name in ("BRA", "EXIT", "RET", "BRX", "JMP") and ".DIV" not in last.opcode
        conditional = bool(last.predicate) or ("UP" in last.text.split("`")[0] and last.name == "BRA")
        if (not leaves or conditional) and end in index:
            successors.append(index[end])
        blocks.append(Block(first, end, tuple(dict.fromkeys(successors))))
    return blocks


def _ends_block(instruction: Instruction) -> bool:
    return instruction.name in ("BRA", "EXIT", "RET", "BRX", "JMP")
