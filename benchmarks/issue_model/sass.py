"""The instructions of an NVIDIA kernel as nvdisasm prints them, with the control bits that ptxas set."""

import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton

_LABEL = re.compile(r"^(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(.*?)\s*;\s*/\*\s*0x[0-9a-f]{16}")
_SECOND_HALF = re.compile(r"^\s+/\*\s*0x([0-9a-f]{16})\s*\*/")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
NONE = 7  # the scoreboard of an instruction that sets none


class Instruction(NamedTuple):
    """One instruction of a warp. ptxas plans the issue: fixed latencies are stalls, variable ones scoreboards."""

    predicate: str  # P0, !P0, UP1; empty: always
    opcode: str  # with its modifiers: LDG.E.128
    text: str  # the opcode and its operands
    target: str  # the label that a branch goes to, or empty
    stall: int  # clocks until the warp may issue its next instruction
    sets: int  # the scoreboard that is cleared when the result is there; NONE
    frees: int  # the scoreboard that is cleared when the operands were read; NONE
    waits: tuple[int, ...]  # the scoreboards that must be clear before

    @property
    def name(self) -> str:
        return self.opcode.split(".", 1)[0]


class Code(NamedTuple):
    """A kernel: its instructions, and the index that each label stands for."""

    instructions: list[Instruction]
    labels: dict[str, int]


def tool(name: str, *arguments: str) -> str:
    """What a program of the toolkit in Triton's wheel prints."""
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def read(cubin: bytes) -> Code:
    """Disassemble a kernel. Every chip from Volta on has these 16-byte instructions and control bits."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return parse(tool("nvdisasm", "-c", "-hex", file.name))


def parse(text: str) -> Code:
    """The listing of `nvdisasm -c -hex`: an instruction, its text, and two words of 64 bits on two lines."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    first: re.Match[str] | None = None
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif match := _INSTRUCTION.match(line):
            first = match
        elif first and (word := _SECOND_HALF.match(line)):
            instructions.append(_instruction(first[1] or "", first[2], int(word[1], 16) >> 41))
            first = None
    return Code(instructions, labels)


def _instruction(predicate: str, text: str, control: int) -> Instruction:
    target = _TARGET.search(text)
    waits = control >> 11 & 63
    return Instruction(
        predicate=predicate,
        opcode=text.split()[0],
        text=text,
        target=target[1] if target else "",
        stall=control & 15,
        sets=control >> 5 & 7,
        frees=control >> 8 & 7,
        waits=tuple(board for board in range(6) if waits >> board & 1),
    )
