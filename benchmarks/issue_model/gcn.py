"""The instructions of an AMD kernel as the compiler writes them, and what each takes of a compute unit of CDNA 3.

A compute unit has four SIMDs, each with a vector unit of 16 lanes, a matrix unit, and the waves of 64 threads that it
was given. A vector instruction takes 4 clocks, one of the transcendental unit and a product of 32-bit integers 16. The
scalar unit, the local data share (128 bytes a clock) and the vector memory (64 bytes a clock from L1) serve all four.
The compiler plans no stalls: a wave issues at most one instruction in 4 clocks, s_nop waits, and s_waitcnt waits until
no more than so many loads are under way.

Rates: AMD's CDNA 3 white paper and instruction set guide; LLVM's scheduler has the same passes for the products, of 4
clocks each: 8 for 32x32x8 and 4 for 16x16x16 in bf16, 16 for 32x32x2 and 8 for 16x16x4 in float32. Latencies are
published microbenchmarks, rounded. Nothing here is calibrated: no published speed of a Triton kernel on an MI300X was
held against it.
"""

import re

from benchmarks.issue_model.sass import NONE, Code, Instruction

WAVE = 64
_CYCLE = 4  # clocks between two instructions of a wave
_JUMP = 16  # clocks until the instruction after a jump that is taken
_LOCAL_LATENCY, _SCALAR_LATENCY = 120, 200
_ALL = 63  # a count that s_waitcnt does not name

_LABEL = re.compile(r"^(\.LBB\w+):")
_INSTRUCTION = re.compile(r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)\s*(.*?)\s*(?:;.*)?$")
_CONDITIONAL = re.compile(r"s_cbranch_(scc\d|vcc\w+)")
_SLOW = re.compile(
    r"v_(?:exp|log|rcp|rsq|sqrt|sin|cos)_f|v_mul_(?:lo|hi)_[ui]32|v_mad_[ui]64_|v_div_(?:scale|fmas|fixup)_f64"
)
_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "short": 2, "ushort": 2, "ubyte": 1, "byte": 1}
_MATRIX = re.compile(r"v_s?mfmac?_\w+?_(\d+)x(\d+)x(\d+)(?:_(\d+)b)?_(\w+)$")


def parse(text: str) -> Code:
    """The kernel of the compiler's assembly. A jump past what no lane does is none: in an inner tile all lanes work."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            instructions.append(_instruction(match[1], match[2]))
        elif instructions and line.lstrip().startswith(".section"):
            break
    return Code(instructions, labels)


def _instruction(name: str, operands: str) -> Instruction:
    predicate, opcode, target, stall = "", name, "", _CYCLE
    if name == "s_endpgm":
        opcode = "EXIT"
    elif name == "s_branch" or name == "s_cbranch_execnz" or _CONDITIONAL.match(name):
        opcode, target, stall = "BRA", operands, _JUMP
        predicate = name.removeprefix("s_cbranch_") if _CONDITIONAL.match(name) else ""
    elif name == "s_nop":
        stall = _CYCLE * (1 + int(operands, 0))
    return Instruction(predicate, opcode, f"{name} {operands}".strip(), target, stall, NONE, NONE, ())


def is_amd(instruction: Instruction) -> bool:
    return instruction.opcode.islower()


def is_matrix(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(("v_mfma_", "v_smfmac_"))


def product_flops(instruction: Instruction) -> float:
    """FLOP of one wave's product."""
    match = _MATRIX.match(instruction.opcode)
    if match is None:
        raise KeyError(f"no shape in {instruction.opcode}")
    rows, cols, depth = (int(match[i]) for i in (1, 2, 3))
    return 2.0 * rows * cols * depth * int(match[4] or 1)


def memory_bytes(instruction: Instruction) -> int:
    """Bytes of the GPU's memory that a wave loads or stores, if all lanes do."""
    match = re.match(r"(?:global|buffer|flat|scratch)_(?:load|store)_(\w+)", instruction.opcode)
    return 0 if match is None else WAVE * _BYTES.get(match[1].split("_")[0], 4)


def local_bytes(instruction: Instruction) -> int:
    """Bytes of the local data share."""
    match = re.match(r"ds_\w+?(2?)(?:st64)?_[bui](\d+)", instruction.opcode)
    return 0 if match is None else WAVE * int(match[2]) // 8 * (2 if match[1] else 1)


def float_operations(instruction: Instruction) -> int:
    """How many numbers of a lane it works on."""
    if is_matrix(instruction) or not re.match(r"v_\w*_f(32|16)", instruction.opcode):
        return 0
    return 2 if instruction.opcode.startswith("v_pk_") else 1


def is_store(instruction: Instruction) -> bool:
    return re.match(r"(global|buffer|flat)_(store|atomic)", instruction.opcode) is not None


def taken(instruction: Instruction, flops: float, l2_latency: int) -> tuple[str, float, int]:
    """The pipe, its clocks on one SIMD, and the latency. flops: of a SIMD's matrix unit in a clock, bf16."""
    name = instruction.opcode
    if is_matrix(instruction):
        kind = name.rpartition("_")[2]
        share = {"f32": 1 / 8, "xf32": 1 / 2, "f64": 1 / 16}.get(kind, 2.0 if "8" in kind else 1.0)
        return "matrix", product_flops(instruction) / (flops * share), 0
    if width := memory_bytes(instruction):
        return "memory", max(16.0, width / 64 * 4), 0 if is_store(instruction) else l2_latency
    if name.startswith("ds_"):
        return "lsu", max(4.0, local_bytes(instruction) / 128 * 4), _LOCAL_LATENCY
    if name.startswith(("s_load", "s_buffer_load")):
        return "scalar memory", 4.0, _SCALAR_LATENCY
    if name in ("s_waitcnt", "s_nop", "s_barrier") or name.startswith(("s_sleep", "s_setprio", "s_sethalt")):
        return "control", 1.0, 0
    if name.startswith("s_"):
        return "scalar", 4.0, 0
    if name.startswith("v_"):
        return "alu", 16.0 if _SLOW.match(name) else 4.0, 0
    raise KeyError(f"no clocks for {name} on an AMD GPU")


def counts(instruction: Instruction) -> tuple[int, int]:
    """How many loads of memory, and of the data share and scalars, an s_waitcnt leaves under way."""
    found = dict(re.findall(r"(vmcnt|lgkmcnt)\((\d+)\)", instruction.text))
    return int(found.get("vmcnt", _ALL)), int(found.get("lgkmcnt", _ALL))


def kind(instruction: Instruction) -> str:
    """What the model does with an instruction beyond taking its pipe."""
    name = instruction.opcode
    if name == "s_barrier":
        return "barrier"
    if name == "s_waitcnt":
        return "wait for counts"
    if memory_bytes(instruction) and not is_store(instruction):
        return "counted load"
    if name.startswith(("ds_", "s_load", "s_buffer_load")):
        return "counted local"
    return ""


def label(instruction: Instruction) -> str:
    """What NVIDIA's instruction of the kind is called, for tables that have both."""
    name = instruction.opcode
    if name.startswith(("v_exp_", "v_log_", "v_rcp_", "v_rsq_", "v_sqrt_")):
        return "MUFU"
    if "_dpp" in name or name.startswith(("ds_bpermute", "ds_permute", "ds_swizzle", "v_readlane")):
        return "SHFL"
    if name == "s_barrier":
        return "BAR"
    return "LDG" if kind(instruction) == "counted load" else name
