"""Runs the PTX of a Hopper kernel on the CPU: what CuTe kernels are tested with, which have no interpreter.

It knows the instructions that such kernels use, and no others. Warps take turns, a step at a time, in an order drawn
from a seed. What is asynchronous on the GPU comes as late as it may: a copy fills its target with NaN when it is issued
and with data when every warp waits for something, and a product of a warpgroup is made when it is waited for. A missing
wait, or a slice that is freed too early, then gives NaN or a wrong number, and a barrier that nobody reaches an error.
"""

import functools
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

_LINE = re.compile(r"^(?:@(!?)(%?\w+)\s+)?([a-z][\w.:]*)\s*(.*);$")
_OPERANDS = re.compile(r"\{[^{}]*\}|\[[^\]]*\]|[^,\s]+")
_SHARED = 1024  # where shared memory begins
_RANK = 24  # an address of a cluster's shared memory has the block's rank from this bit on


class Map(NamedTuple):
    """A tensor map: a matrix, and the box of it that one copy takes, into rows of 128 bytes, swizzled."""

    matrix: torch.Tensor  # [rows, features] of 2-byte numbers
    box_rows: int


class _Instruction(NamedTuple):
    negated: bool
    predicate: str
    opcode: str
    operands: tuple[str, ...]


class Kernel:
    """The instructions of the one kernel of a PTX text."""

    def __init__(self, text: str) -> None:
        self.code: list[_Instruction] = []
        self.labels: dict[str, int] = {}
        body = text[text.index("\n{") :]
        self.params = {name: index for index, name in enumerate(re.findall(r"\.param [^\n]*?(\w+_param_\d+)", text))}
        waits = 0
        for raw in body.splitlines():
            for statement in re.split(r"(?<=;)\s+", raw.split("//")[0].strip()):
                line = statement.strip()
                if line == "LAB_WAIT:":
                    waits += 1  # each wait of inline assembly has labels of its own
                line = line.replace("LAB_WAIT", f"LAB_WAIT{waits}").replace("DONE", f"DONE{waits}")
                if line.endswith(":"):
                    self.labels[line[:-1]] = len(self.code)
                elif line and not line.startswith((".", "{", "}")):
                    match = _LINE.match(line)
                    if match is None:
                        raise ValueError(f"not understood: {line}")
                    operands = tuple(part.rstrip(",") for part in _OPERANDS.findall(match[4]))
                    self.code.append(_Instruction(match[1] == "!", match[2] or "", match[3], operands))


class _Barrier:
    """An mbarrier: its phase ends when all have arrived and all bytes have come."""

    def __init__(self, count: int) -> None:
        self.count, self.pending, self.bytes, self.phase = count, count, 0, 0

    def settle(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.pending, self.phase = self.count, self.phase ^ 1


class _Block:
    def __init__(self, size: int) -> None:
        self.memory = np.full(size, 0xFF, np.uint8)  # NaN in every format
        self.barriers: dict[int, _Barrier] = {}
        self.named: dict[int, list[int]] = {}


def _bits(values: Any, dtype: Any) -> np.ndarray:
    return np.asarray(values).astype(dtype, copy=False)


class _Warp:
    """32 threads. `run` is a generator that yields where others may come first: True where it waits for something."""

    def __init__(self, cluster: "Cluster", block: _Block, rank: int, index: int) -> None:
        self.cluster, self.block, self.rank, self.index = cluster, block, rank, index
        self.registers: dict[str, np.ndarray] = {}
        self.at, self.together = 0, True  # all threads stand at one instruction,
        self.pc = np.zeros(32, np.int64)  # or each at its own, and the first goes on
        self.live = np.ones(32, bool)
        self.products: list[list[Callable[[], None]]] = []
        self.open: list[Callable[[], None]] = []
        self.arrived = 0  # how often the warp has arrived at its cluster's barrier

    # Operands

    def read(self, name: str, dtype: Any) -> np.ndarray:
        if name.startswith("%") or name in self.registers:
            if name in self.registers:
                value = self.registers[name]
            else:
                value = self.special(name)
            return value.view(dtype) if value.dtype.itemsize == np.dtype(dtype).itemsize else value.astype(dtype)
        if name.startswith("0f"):
            return np.full(32, int(name[2:], 16), np.uint32).view(dtype)
        if name in self.cluster.kernel.params:
            return np.full(32, self.cluster.kernel.params[name], dtype)
        if name == "__dynamic_shmem__0":
            return np.full(32, _SHARED, dtype)
        number = int(name, 0)
        return np.full(32, number & (1 << 8 * np.dtype(dtype).itemsize) - 1, f"u{np.dtype(dtype).itemsize}").view(dtype)

    def special(self, name: str) -> np.ndarray:
        lane = np.arange(32, dtype=np.uint32)
        values = {
            "%tid.x": 32 * self.index + lane,
            "%laneid": lane,
            "%ctaid.x": self.cluster.number * len(self.cluster.blocks) + self.rank,
            "%cluster_ctarank": self.rank,
        }
        return np.broadcast_to(_bits(values[name], np.uint32), 32).copy()

    def write(self, name: str, value: Any, mask: np.ndarray) -> None:
        if name == "_":
            return
        if np.shape(value) != (32,):
            value = np.broadcast_to(value, 32).copy()
        old = self.registers.get(name)
        if old is not None and not mask.all():
            value = np.where(mask, value, old.view(value.dtype) if old.dtype != value.dtype else old)
        self.registers[name] = value

    def address(self, operand: str) -> np.ndarray:
        name, _, offset = operand.strip("[]").partition("+")
        return self.read(name, np.uint64 if name.startswith("%rd") else np.uint32).astype(np.int64) + int(offset or 0)

    # Control

    def run(self) -> Iterator[bool]:
        code, labels = self.cluster.kernel.code, self.cluster.kernel.labels
        while self.live.any():
            if self.together:
                pc, here = self.at, self.live
                self.at += 1
            else:
                pc = int(self.pc[self.live].min())
                here = self.live & (self.pc == pc)
                self.pc[here] += 1
                self.together = bool((self.pc[self.live] == pc + 1).all())
                self.at = pc + 1
            negated, predicate, opcode, operands = code[pc]
            mask = here & (self.read(predicate, bool) ^ negated) if predicate else here
            if predicate and not mask.any():
                continue
            if opcode in ("bra", "bra.uni"):
                target = labels[operands[0]]
                if self.together and bool((mask == self.live).all()):
                    self.at = target
                else:
                    if self.together:
                        self.pc[:] = self.at
                    self.pc[mask] = target
                    self.together = False
            elif opcode == "ret":
                self.live &= ~mask
            elif opcode.startswith("mbarrier.try_wait"):
                barrier = self.block.barriers[int(self.address(operands[1])[mask][0])]
                parity = int(self.read(operands[2], np.uint32)[mask][0])
                while barrier.phase == parity:
                    yield True
                self.write(operands[0], np.ones(32, bool), mask)
            elif opcode == "bar.sync":
                name, count = (int(self.read(x, np.uint32)[0]) for x in operands)
                assert mask.all(), "a warp arrives at a barrier in parts"
                arrived = self.block.named.setdefault(name, [0, 0])
                arrived[0] += 32
                turn = arrived[1]
                if arrived[0] == count:
                    arrived[:] = [0, turn + 1]
                while arrived[1] == turn:
                    yield True
            elif opcode.startswith("barrier.cluster.arrive"):
                self.arrived += 1
            elif opcode.startswith("barrier.cluster.wait"):
                while min(warp.arrived for warp in self.cluster.warps) < self.arrived:
                    yield True
            else:
                self.execute(opcode, operands, mask)
                if opcode.startswith(("mbarrier", "st.shared", "wgmma")):
                    yield False

    def execute(self, opcode: str, operands: Sequence[str], mask: np.ndarray) -> None:
        kind, *rest = opcode.split(".")
        if opcode.startswith("wgmma"):
            self.product(opcode, operands)
        elif kind == "mbarrier":
            self.barrier(opcode, operands, mask)
        elif opcode.startswith("cp.async.bulk.tensor"):
            self.copy(opcode, operands, mask)
        elif kind in ("ld", "st"):
            self.move(kind, rest, operands, mask)
        elif kind in ("shfl", "vote", "elect", "mapa"):
            self.exchange(opcode, operands, mask)
        elif kind not in ("prefetch", "fence", "setmaxnreg"):
            self.compute(opcode, operands, mask)

    # Instructions

    def compute(self, opcode: str, operands: Sequence[str], mask: np.ndarray) -> None:
        parts = opcode.split(".")
        kind, form = parts[0], parts[-1]
        dtype = _dtype(form)
        if opcode == "mov.b64" and operands[0].startswith("{"):
            value = self.read(operands[1], np.uint64)
            for half, name in enumerate(operands[0].strip("{}").split(", ")):
                self.write(name, (value >> np.uint64(32 * half)).astype(np.uint32), mask)
        elif opcode == "mov.b64" and operands[1].startswith("{"):
            low, high = (self.read(x, np.uint32).astype(np.uint64) for x in operands[1].strip("{}").split(", "))
            self.write(operands[0], low | high << np.uint64(32), mask)
        elif kind == "cvta":
            self.write(operands[0], self.read(operands[1], np.uint64), mask)
        elif kind == "cvt":
            to, source = parts[-2:]
            self.write(operands[0], self.read(operands[1], _dtype(source)).astype(_dtype(to)), mask)
        elif kind == "setp":
            a, b = (self.read(x, dtype) for x in operands[1:3])
            compare = {"eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater}
            self.write(operands[0], {**compare, "ge": np.greater_equal}[parts[1]](a, b), mask)
        elif kind == "selp":
            a, b = (self.read(x, dtype) for x in operands[1:3])
            self.write(operands[0], np.where(self.read(operands[3], bool), a, b), mask)
        elif kind in ("shl", "shr"):
            by = self.read(operands[2], np.uint32).astype(dtype)
            value = self.read(operands[1], dtype)
            self.write(operands[0], value << by if kind == "shl" else value >> by, mask)
        elif opcode == "mul.wide.s32":
            a, b = (self.read(x, np.int32).astype(np.int64) for x in operands[1:])
            self.write(operands[0], a * b, mask)
        else:
            args = [self.read(x, dtype) for x in operands[1:]]
            with np.errstate(all="ignore"):
                self.write(operands[0], _ARITHMETIC[kind](*args).astype(dtype), mask)

    def exchange(self, opcode: str, operands: Sequence[str], mask: np.ndarray) -> None:
        if opcode.startswith("elect"):
            chosen = np.arange(32) == int(np.flatnonzero(mask)[0])
            self.write(operands[0].split("|")[1], chosen, mask)
        elif opcode.startswith("vote"):
            assert mask.all(), "a warp votes in parts"
            self.write(operands[0], np.full(32, self.read(operands[1], bool).any()), mask)
        elif opcode.startswith("mapa"):
            rank = self.read(operands[2], np.uint32)
            self.write(operands[0], self.read(operands[1], np.uint32) | rank << np.uint32(_RANK), mask)
        else:
            assert mask.all(), "a warp shuffles in parts"
            value, by = self.read(operands[1], np.uint32), int(self.read(operands[2], np.uint32)[0])
            lanes = np.arange(32) ^ by if "bfly" in opcode else np.full(32, by)
            self.write(operands[0], value[lanes], mask)

    def move(self, kind: str, modifiers: Sequence[str], operands: Sequence[str], mask: np.ndarray) -> None:
        if modifiers[0] == "param":
            name, _, offset = operands[1].strip("[]").partition("+")
            size = int(modifiers[-1][1:]) // 8
            raw = self.cluster.params[self.cluster.kernel.params[name]][int(offset or 0) :][:size]
            self.write(operands[0], np.full(32, int.from_bytes(raw, "little"), f"u{size}"), mask)
            return
        size = int(modifiers[-1][1:]) // 8
        where, names = (operands[1], operands[0]) if kind == "ld" else (operands[0], operands[1])
        addresses = self.address(where)
        for part, name in enumerate(names.strip("{}").replace(",", " ").split()):
            values = self.read(name, f"u{size}").copy() if kind == "st" else np.zeros(32, f"u{size}")
            for lane in np.flatnonzero(mask):
                at = int(addresses[lane]) + part * size
                memory = self.block.memory if modifiers[0] == "shared" else self.cluster.memory
                view = memory[at : at + size] if modifiers[0] == "shared" else memory.at(at, size)
                if kind == "st":
                    view[:] = np.frombuffer(values[lane].tobytes(), np.uint8)
                else:
                    values[lane] = view.view(f"u{size}")[0]
            if kind == "ld":
                self.write(name, values, mask)

    def barrier(self, opcode: str, operands: Sequence[str], mask: np.ndarray) -> None:
        where = operands[0] if "init" in opcode else operands[1]
        for lane in np.flatnonzero(mask):
            at = int(self.address(where)[lane])
            block = self.cluster.blocks[at >> _RANK] if "cluster" in opcode else self.block
            at &= (1 << _RANK) - 1
            if "init" in opcode:
                block.barriers[at] = _Barrier(int(self.read(operands[1], np.uint32)[lane]))
                continue
            if "expect_tx" in opcode:
                block.barriers[at].bytes += int(self.read(operands[2], np.uint32)[lane])
            block.barriers[at].pending -= 1
            assert block.barriers[at].pending >= 0, "more arrive at a barrier than it counts"
            block.barriers[at].settle()

    def copy(self, opcode: str, operands: Sequence[str], mask: np.ndarray) -> None:
        (lane,) = np.flatnonzero(mask)
        handle, coordinates = operands[1].strip("[]").split(", ", 1)
        column, row = (int(self.read(x, np.int32)[lane]) for x in coordinates.strip("{}").split(", "))
        matrix, rows = self.cluster.maps[int(self.read(handle, np.uint64)[lane])]
        to, bar = int(self.address(operands[0])[lane]), int(self.address(operands[2])[lane])
        ranks = [self.rank]
        if "multicast" in opcode:
            bits = int(self.read(operands[3], np.uint16)[lane])
            ranks = [rank for rank in range(len(self.cluster.blocks)) if bits >> rank & 1]
        box = torch.zeros(rows, 64, dtype=matrix.dtype)  # zeros past the ends
        part = matrix[row : row + rows, column : column + 64]
        box[: part.shape[0], : part.shape[1]] = part
        data = box.view(torch.uint8).numpy()
        at = to + np.arange(rows)[:, None] * 128 + (np.arange(128)[None, :] ^ ((np.arange(rows)[:, None] & 7) << 4))
        assert to % 1024 == 0
        for rank in ranks:
            block = self.cluster.blocks[rank]
            block.memory[at] = 0xFF

            def arrive(block: _Block = block) -> None:
                block.memory[at] = data
                block.barriers[bar].bytes -= data.size
                block.barriers[bar].settle()

            self.cluster.copies.append(arrive)

    def product(self, opcode: str, operands: Sequence[str]) -> None:
        if "commit" in opcode:
            self.products.append(self.open)
            self.open = []
        elif "wait_group" in opcode:
            while len(self.products) > int(operands[0]):
                for make in self.products.pop(0):
                    make()
        elif "mma_async" in opcode:
            names = operands[0].strip("{}").split(", ")
            a, b = (int(self.read(x, np.uint64)[0]) for x in operands[1:3])
            adds = bool(self.read(operands[3], bool)[0])
            width = int(re.search(r"m64n(\d+)k16", opcode)[1])  # type: ignore[index]
            dtype = torch.float16 if opcode.endswith("f16.f16") and "bf16" not in opcode else torch.bfloat16
            self.open.append(lambda: self.multiply(names, a, b, adds, width, dtype))

    def multiply(self, names: Sequence[str], a: int, b: int, adds: bool, width: int, dtype: torch.dtype) -> None:
        """The 16 rows of this warp of the product of 64 rows."""
        x = self.operand(a, 16 * (self.index % 4), 16, dtype)
        y = self.operand(b, 0, width, dtype)
        result = x @ y.T  # [16, width]
        lane = np.arange(32)
        for i, name in enumerate(names):
            values = result[lane // 4 + i % 4 // 2 * 8, 8 * (i // 4) + 2 * (lane % 4) + i % 2]
            if adds:
                values = values + self.read(name, np.float32)
            self.registers[name] = values.astype(np.float32)

    def operand(self, descriptor: int, first: int, rows: int, dtype: torch.dtype) -> np.ndarray:
        """16 features of rows in shared memory, by a descriptor: 128-byte rows, swizzled, 8 rows after each other."""
        start, stride = (descriptor & 0x3FFF) << 4, (descriptor >> 32 & 0x3FFF) << 4
        assert descriptor >> 62 == 1, "a swizzle of 128 bytes"
        assert stride == 1024
        row = first + np.arange(rows)[:, None]
        at = start + row // 8 * stride + row % 8 * 128 + np.arange(32)[None, :]
        at ^= (at >> 7 & 7) << 4
        return torch.from_numpy(self.block.memory[at]).view(dtype).float().numpy()


@functools.cache
def _dtype(form: str) -> np.dtype:
    """The numbers of a type of PTX: s32, b64, f32, pred."""
    if form == "pred":
        return np.dtype(bool)
    if form == "sync" or not form[1:].isdigit():
        raise ValueError(f"not a type: {form}")
    return np.dtype({"s": "i", "u": "u", "b": "u", "f": "f"}[form[0]] + str(int(form[1:]) // 8))


def _fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return (a.astype(np.float64) * b + c).astype(np.float32) if a.dtype == np.float32 else a * b + c


def _quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.trunc(a / np.where(b == 0, 1, b))


_ARITHMETIC: dict[str, Callable[..., np.ndarray]] = {
    "mov": lambda a: a,
    "not": np.logical_not,
    "neg": np.negative,
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": _quotient,
    "min": np.fmin,  # a NaN gives way
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "fma": _fma,
    "mad": _fma,
    "ex2": np.exp2,
}


class _Memory:
    """Tensors under addresses; anything else is out of bounds."""

    def __init__(self) -> None:
        self.spans: list[tuple[int, np.ndarray]] = []

    def add(self, tensor: torch.Tensor) -> int:
        start = 1 << 32 if not self.spans else self.spans[-1][0] + len(self.spans[-1][1]) + (1 << 20)
        self.spans.append((start, tensor.view(-1).view(torch.uint8).numpy()))
        return start

    def at(self, address: int, size: int) -> np.ndarray:
        for start, data in self.spans:
            if start <= address and address + size <= start + len(data):
                return data[address - start :][:size]
        raise IndexError(f"no tensor holds the {size} bytes at {address:#x}")


class Cluster:
    """The blocks of one cluster of a launch.

    params: bytes of each parameter; maps: the tensor map of each parameter that is one; memory: what pointers name.
    """

    def __init__(
        self, kernel: Kernel, number: int, size: int, warps: int, params: dict[int, bytes], maps: dict[int, Map],
        memory: _Memory, shared: int = 232448,
    ) -> None:  # fmt: skip
        self.kernel, self.number, self.params, self.maps, self.memory = kernel, number, params, maps, memory
        self.blocks = [_Block(shared + _SHARED) for _ in range(size)]
        self.copies: list[Callable[[], None]] = []
        self.warps = [_Warp(self, block, rank, w) for rank, block in enumerate(self.blocks) for w in range(warps)]

    def run(self, seed: int = 0) -> None:
        generator = np.random.default_rng(seed)
        running = {id(warp): warp.run() for warp in self.warps}
        while running:
            moved = False
            for key in generator.permutation(list(running)):
                for _ in range(int(generator.integers(1, 16))):
                    waits = next(running[key], None)
                    moved |= not waits
                    if waits is None:
                        del running[key]
                    if waits is not False:
                        break
            if running and not moved:
                if not self.copies:
                    raise RuntimeError("every warp waits, and no copy is on its way")
                self.copies.pop(int(generator.integers(len(self.copies))))()
        assert not self.copies, "a copy arrives after the end"


Memory = _Memory
