"""What each instruction takes of which unit of an NVIDIA multiprocessor: tables. gcn.py has AMD's.

A multiprocessor has four schedulers. Each issues one instruction of a warp a clock, and has its own ALU, FMA unit,
special function unit and tensor core; all four share the load/store unit. Clocks are those of one scheduler: a unit of
16 lanes takes 2 clocks for the 32 threads of a warp, and one that all four share and that takes a warp in a clock, 4.

Throughputs: CUDA C++ programming guide, "Arithmetic Instructions"; memory widths: NVIDIA's H100 and A100 white papers.
Latencies are published microbenchmarks, rounded; ptxas itself plans those that are fixed.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.issue_model import gcn
from benchmarks.issue_model.sass import Instruction

SCHEDULERS = 4


class Use(NamedTuple):
    """What one instruction of a warp takes."""

    pipe: str
    clocks: float  # until the pipe of this scheduler takes the next
    latency: int = 0  # until a scoreboard that it sets is cleared


@dataclasses.dataclass(frozen=True)
class Chip:
    """One GPU: the clocks of its units."""

    name: str
    multiprocessors: int
    clock: float  # Hz while its matrix units are idle for two thirds of the time or more
    throttled: float  # Hz under its power limit while they are never idle
    matrix: float  # FLOP a clock of a multiprocessor, bf16 with float32 sums
    bandwidth: float  # bytes/s of its memory
    l2_bytes: float  # bytes a clock that a multiprocessor gets from L2 while all the others ask, too
    l2_latency: int
    uses: Mapping[str, Use]

    def clock_at(self, matrix_share: float) -> float:
        """Hz while the matrix units are busy for this share of the time."""
        return self.clock - (self.clock - self.throttled) * max(0.0, matrix_share - 1 / 3) * 1.5


_ALU = (
    "IADD3 LEA LOP3 SHF ISETP IMNMX VIADD VIMNMX SEL PRMT PLOP3 P2R R2P MOV FMNMX FSEL FSETP FSET FCHK F2FP BMSK SGXT"
)
_ALU += (
    " HSETP2 HSET2 I2FP IABS LOP I2IP VABSDIFF IADD ISCADD FLO POPC BREV CS2R VIADDMNMX FMNMX3 VIMNMX3 HMNMX2 VHMNMX"
)
_UNIFORM = (
    "UIADD3 UISETP ULOP3 USHF ULEA UIMAD USEL UMOV UPRMT UPLOP3 UP2UR UFLO UPOPC UBMSK UBREV USGXT ULDC LDCU UR2UP "
)
_UNIFORM += "VOTEU R2UR UVIADD UVIMNMX UI2F UF2F UFSEL UFMUL UFADD UFFMA UVOTE UIADD3X UCGABAR_ARV UCGABAR_WAIT ELECT"
_CONTROL = (
    "BAR BRA EXIT BSSY BSYNC WARPSYNC WARPGROUP DEPBAR LDGDEPBAR MEMBAR NOP ERRBAR YIELD CCTL FENCE BREAK CALL RET"
)
_CONTROL += (
    " ENDCOLLECTIVE SYNCS ACQBULK UTMACMDFLUSH UTMACCTL PREEXIT NANOSLEEP BRX JMP WARPGROUPSET USETMAXREG PMTRIG"
)

_COMMON: dict[str, Use] = {
    **{name: Use("alu", 2) for name in _ALU.split()},
    **{name: Use("uniform", 2, 12) for name in _UNIFORM.split()},
    **{name: Use("control", 1, 14) for name in _CONTROL.split()},
    **{name: Use("fma", 1) for name in ("FFMA", "FADD", "FMUL", "HFMA2", "HADD2", "HMUL2", "FFMA2", "FADD2", "FMUL2")},
    "IMAD": Use("fma", 2),  # half of the lanes multiply integers
    "MUFU": Use("mufu", 8, 24),
    # Conversions between widths share the special function unit.
    **{name: Use("mufu", 8, 24) for name in ("F2F", "F2I", "I2F", "FRND", "I2I", "F2IP")},
    **{name: Use("double", 2, 24) for name in ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX")},
    **{name: Use("misc", 2, 20) for name in ("S2R", "S2UR", "VOTE", "MATCH", "REDUX", "CREDUX", "LEPC", "B2R", "R2B")},
    "SHFL": Use("lsu", 4, 24),
    "LDC": Use("lsu", 4, 30),
    **{name: Use("lsu", 4, 30) for name in ("LDS", "LDSM", "LDL")},
    **{
        name: Use("lsu", 4, 24) for name in ("STS", "STSM", "STG", "ST", "STL", "ATOM", "ATOMG", "ATOMS", "RED", "REDG")
    },
    **{name: Use("lsu", 4, 0) for name in ("LDG", "LD", "LDGSTS")},  # and the latency of L2
    **{name: Use("lsu", 4, 24) for name in ("UTMALDG", "UTMASTG", "UTMAPF", "UBLKCP", "UTMAREDG")},
    **{name: Use("lsu", 4, 40) for name in ("LDTM", "STTM", "UTCBAR", "UTCCP", "UTCATOMSWS", "UTCSHIFT")},
}
_HALF_FP32 = {name: Use("fma", 2) for name in ("FFMA", "FADD", "FMUL")}  # 64 lanes

# FLOP a clock: the datasheet's peak over multiprocessors and boost clock. L2: 5120 bytes a clock of the whole chip on
# A100 (white paper), taken for H100, too, and twice that for the two dies of B200; RTX 4090: 5 TB/s, as measured.
# An RTX 4090 makes half of Ada's products a clock when it sums them in float32, as the kernels here do: 512 FLOP, where
# an L40S makes 1,024. MI300X: 2,048 bytes a clock of an XCD's L2 for its 38 compute units; its clock under load is not
# known here, and its peak's is taken.
# H100 ran at 1.33 GHz where 92 % of the clocks were a product's, and has 1.755 GHz to itself (docs/gpu_predictions.md).
CHIPS: dict[str, Chip] = {
    "sm_80": Chip("A100", 108, 1.41e9, 1.41e9, 2048, 2.04e12, 47, 500, _COMMON | _HALF_FP32),
    "sm_89": Chip("RTX 4090", 128, 2.52e9, 2.52e9, 512, 1.01e12, 16, 600, _COMMON),
    "sm_90": Chip("H100", 132, 1.755e9, 1.28e9, 4096, 3.35e12, 39, 600, _COMMON),
    "sm_100": Chip("B200", 148, 1.85e9, 1.85e9, 8192, 8.0e12, 64, 700, _COMMON),
    "gfx942": Chip("MI300X", 304, 2.1e9, 2.1e9, 2048, 5.3e12, 54, 600, {}),
}

_MATRIX = re.compile(r"^(HGMMA|QGMMA|IGMMA|BGMMA|HMMA|IMMA|QMMA|OMMA|DMMA|UTC\w*MMA)$")
_WIDTH = {
    "LDG": 1,
    "LDGSTS": 1,
    "STG": 1,
    "LDS": 1,
    "STS": 1,
    "LD": 1,
    "ST": 1,
    "LDL": 1,
    "STL": 1,
    "LDTM": 1,
    "STTM": 1,
}


def is_matrix(instruction: Instruction) -> bool:
    return gcn.is_matrix(instruction) or _MATRIX.match(instruction.name) is not None


def is_asynchronous(instruction: Instruction) -> bool:
    """A product of a warp group (sm_90) or of one thread (sm_100), which goes on while the warp issues."""
    return (
        not gcn.is_amd(instruction)
        and is_matrix(instruction)
        and instruction.name not in ("HMMA", "IMMA", "QMMA", "DMMA", "OMMA")
    )


def product_flops(instruction: Instruction) -> float:
    """FLOP that one warp's instruction stands for, by the shape in its name; 0 where the name has none (UTCHMMA)."""
    if gcn.is_matrix(instruction):
        return gcn.product_flops(instruction)
    if match := re.search(r"\.64x(\d+)x(\d+)", instruction.opcode):  # a quarter of the warp group's
        return 2.0 * 64 * int(match[1]) * int(match[2]) / SCHEDULERS
    if match := re.search(r"\.(8|16)(8|16|32)(8|16|32|64|4)?\b", instruction.opcode):
        depth = int(match[3]) if match[3] else int(match[2])
        rows, cols = (int(match[1]), 8)
        return 2.0 * rows * cols * depth
    return 0.0


def memory_bytes(instruction: Instruction) -> int:
    """Bytes that the threads of a warp load or store, if all do."""
    if gcn.is_amd(instruction):
        return gcn.memory_bytes(instruction)
    if instruction.name in ("LDSM", "STSM"):
        match = re.search(r"\.(4|2)\b", instruction.opcode.replace("M88", "").replace("MT88", ""))
        return 128 * (int(match[1]) if match else 1)
    if instruction.name not in _WIDTH:
        return 0
    modifiers = instruction.opcode.split(".")
    for bits in ("256", "128", "64"):
        if bits in modifiers:
            return int(bits) * 4
    if {"U8", "S8"} & set(modifiers):
        return 32
    return 64 if {"U16", "S16"} & set(modifiers) else 128


_FLOATS = {"FADD", "FMUL", "FFMA", "MUFU", "FMNMX", "FSETP", "FSEL", "FSET", "HFMA2"}


def float_operations(instruction: Instruction) -> int:
    """How many numbers of a thread it works on."""
    if gcn.is_amd(instruction):
        return gcn.float_operations(instruction)
    return 2 if instruction.name == "F2FP" else int(instruction.name in _FLOATS)


def is_store(instruction: Instruction) -> bool:
    """Whether it writes the GPU's memory."""
    return gcn.is_store(instruction) or instruction.name in ("STG", "ST", "RED", "REDG", "ATOM", "ATOMG")


def use(instruction: Instruction, chip: Chip, shapeless_flops: float = 0.0) -> Use:
    """What the instruction takes on the chip. One that the tables do not know is an error: a new chip needs a look.

    shapeless_flops: what a product whose name has no shape is to each warp.
    """
    if gcn.is_amd(instruction):
        return Use(*gcn.taken(instruction, chip.matrix / SCHEDULERS, chip.l2_latency))
    if instruction.name in ("BRA", "EXIT"):
        return _COMMON[instruction.name]
    if is_matrix(instruction):
        rate = chip.matrix / SCHEDULERS
        if any(part in instruction.opcode for part in (".TF32", ".1684", ".1688.F32.TF32")):
            rate /= 2
        elif instruction.name.startswith("Q"):
            rate *= 2
        return Use("matrix", (product_flops(instruction) or shapeless_flops) / rate)
    if instruction.name not in chip.uses:
        raise KeyError(f"no clocks for {instruction.opcode} on {chip.name}")
    found = chip.uses[instruction.name]
    if width := memory_bytes(instruction):
        clocks = max(1.0, width / 128) * SCHEDULERS
        latency = found.latency or chip.l2_latency
        return Use(found.pipe, clocks, latency)
    return found
