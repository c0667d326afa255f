"""The instructions of the warps that share one scheduler, issued one a clock.

A warp issues in order. It waits for the clocks that ptxas set (stall), for the scoreboards that ptxas told it to wait
for, for the pipe that its instruction needs, for barriers of its block, for groups of copies (cp.async) and of products
of a warp group. All warps take the same path; the four schedulers do the same, so one stands for all.

Not modelled: which lines of L2 are there, bank conflicts, misses of the instruction cache, throttling.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.issue_model import gcn
from benchmarks.issue_model.pipes import Chip, is_asynchronous, memory_bytes, use
from benchmarks.issue_model.sass import NONE, Instruction

_BARRIER_CLOCKS = 14  # from the last warp's arrival until the others issue again
_PRODUCT_CLOCKS = 32  # from the end of a warp group's product until its registers may be read
_COPY_CLOCKS = 20  # until a copy has read its address


class Step(NamedTuple):
    """An instruction and what it takes, looked up once."""

    instruction: Instruction
    pipe: str
    clocks: float
    latency: int
    kind: str  # what the model does with it beyond taking its pipe
    running: int  # how many groups a wait leaves running
    counts: tuple[int, int] = (0, 0)  # the same of an AMD wait: loads of memory, of the data share and scalars


def steps_of(path: Sequence[Instruction], chip: Chip, shapeless_flops: float = 0.0) -> list[Step]:
    """The path as the model reads it. shapeless_flops: what a product whose name has no shape is to each warp."""
    # sm_100 waits for its products at memory barriers. The first wait after a product leaves that one running, because
    # the loop waits for the one before; the second is for the last.
    copies = any(i.name.startswith("UTMA") for i in path)  # by tensor maps, which wait at such barriers, too
    steps, waits = [], 0
    for instruction in path:
        kind, running = _kind(instruction)
        if kind == "wait at a barrier in memory":
            waits += 1
            kind, running = ("", 0) if copies else ("wait for products", int(waits == 1))
        elif kind.startswith("product"):
            waits = 0
        taken = use(instruction, chip, shapeless_flops)
        counts = gcn.counts(instruction) if kind == "wait for counts" else (0, 0)
        steps.append(Step(instruction, taken.pipe, taken.clocks, taken.latency, kind, running, counts))
    return steps


def _kind(instruction: Instruction) -> tuple[str, int]:
    """What the model does with an instruction, and how many groups a wait leaves running."""
    if gcn.is_amd(instruction):
        return gcn.kind(instruction), 0
    name, opcode, text = instruction.name, instruction.opcode, instruction.text
    if name == "BAR" and ".ARV" not in opcode:
        return "barrier", 0
    if is_asynchronous(instruction):
        return ("product, last of its group" if "gsb0" in text else "product"), 0
    if name == "UTCBAR":
        return "end of products", 0
    if opcode.startswith("WARPGROUP.DEPBAR"):
        return "wait for products", _number(text)
    if "TRYWAIT" in opcode:
        return "wait at a barrier in memory", 0
    if name in ("LDG", "LD"):
        return "load", 0
    if name == "LDGSTS":
        return "copy", 0
    if name == "LDGDEPBAR":
        return "end of copies", 0
    if name == "DEPBAR" and "SB0" in text:
        return "wait for copies", _number(text)
    return "", 0


def _number(text: str) -> int:
    """The last number of a wait: how many groups may still run."""
    match = re.search(r"0x([0-9a-f]+)\s*$", text.split("{")[0].rstrip(" ,"))
    return int(match[1], 16) if match else 0


class _Warp:
    def __init__(self, block: int, start: float) -> None:
        self.block = block
        self.at = 0  # the index of its next instruction
        self.ready = start  # when it may issue again
        self.boards = [0.0] * NONE  # when each scoreboard is clear
        self.products: list[float] = []  # when each group of products is done
        self.open_products = 0.0
        self.copies: list[float] = []  # when each group of copies has arrived
        self.open_copies = 0.0
        self.local: list[float] = []  # when each access of the data share or load of a scalar is done
        self.waiting = False  # at a barrier


def issue(steps: Sequence[Step], chip: Chip, warps: int, blocks: int = 1, offset: float = 0.0) -> list[float]:
    """When each resident block has issued its last instruction, in clocks.

    warps: of a block, on one scheduler; blocks: resident ones; offset: how much later each of them begins.
    """
    team = [_Warp(block, block * offset) for block in range(blocks) for _ in range(warps)]
    pipes: defaultdict[str, float] = defaultdict(float)
    memory = 0.0  # when the port to L2 is free
    clock, last = 0.0, 0
    ends = [0.0] * blocks
    running = list(team)
    # From all four schedulers at once.
    l2_clocks = {i: 4 * memory_bytes(i) / chip.l2_bytes for i in {s.instruction for s in steps}}
    while running:
        chosen, soonest = None, float("inf")
        for warp in running[last:] + running[:last]:
            if warp.waiting:
                continue
            step = steps[warp.at]
            when = max(warp.ready, pipes[step.pipe])
            for board in step.instruction.waits:
                when = max(when, warp.boards[board])
            if when < soonest:
                chosen, soonest = warp, when
            if when <= clock:
                break  # the warp that issued last goes on; else the next in turn
        if chosen is None:
            raise RuntimeError("every warp waits at a barrier")
        warp, clock = chosen, max(clock, soonest)
        last = running.index(warp)
        step = steps[warp.at]
        i = step.instruction
        done = clock + step.clocks
        warp.ready = clock + max(1, i.stall)
        latency = max(4, step.latency)
        if step.pipe == "matrix" and step.kind:
            done = max(pipes["matrix queue"], clock) + step.clocks
            pipes["matrix queue"] = done
            warp.open_products = done + _PRODUCT_CLOCKS
            if step.kind != "product":
                warp.products.append(warp.open_products)
        elif step.kind == "counted load":
            pipes[step.pipe] = done
            memory = max(memory, clock) + l2_clocks[i]
            warp.copies.append(max(memory, done) + latency)
        elif step.kind in ("copy", "load"):
            pipes[step.pipe] = done
            memory = max(memory, clock) + l2_clocks[i]
            arrived = memory + latency
            if step.kind == "copy":
                warp.open_copies = max(warp.open_copies, arrived)
                done, latency = clock, _COPY_CLOCKS
            else:
                done, latency = memory, latency
        else:
            pipes[step.pipe] = done
            if step.kind == "wait for products":
                warp.ready = max(warp.ready, *_finished(warp.products, step.running))
            elif step.kind == "end of products":
                warp.products.append(warp.open_products)
            elif step.kind == "end of copies":
                warp.copies.append(warp.open_copies)
            elif step.kind == "wait for copies":
                warp.ready = max(warp.ready, *_finished(warp.copies, step.running))
            elif step.kind == "counted local":
                warp.local.append(done + latency)
            elif step.kind == "wait for counts":
                memory_left, local_left = step.counts
                warp.ready = max(warp.ready, *_finished(warp.copies, memory_left), *_finished(warp.local, local_left))
            elif step.kind == "barrier":
                warp.waiting = True
        if i.sets != NONE:
            warp.boards[i.sets] = max(warp.boards[i.sets], done + latency)
        if i.frees != NONE:
            warp.boards[i.frees] = max(warp.boards[i.frees], done + min(latency, 16))
        warp.at += 1
        if warp.at == len(steps):
            ends[warp.block] = clock
            running.remove(warp)
            last = 0
        if warp.waiting or warp.at == len(steps):
            mates = [other for other in running if other.block == warp.block]
            if all(mate.waiting for mate in mates):
                for mate in mates:
                    mate.waiting, mate.ready = False, max(mate.ready, clock + _BARRIER_CLOCKS)
        clock += 1
    return ends


def _finished(groups: list[float], running: int) -> list[float]:
    """Take from the groups, oldest first, all but those that may still run; when these are done, and 0."""
    number = max(0, len(groups) - running)
    done, groups[:] = groups[:number], groups[number:]
    return [0.0, *done]
