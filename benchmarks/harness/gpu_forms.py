"""How an op describes its Triton kernels to gpu_bounds: GPUs, compiled forms (Case), arguments and problems."""

import dataclasses
from typing import Any, NamedTuple

from triton.backends.compiler import GPUTarget

from benchmarks.issue_model.pipes import Chip
from benchmarks.issue_model.predict import Tile
from mmkernels._tiles.triton import OLDER_TRITON


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One target of the compiler and the datasheet of its best-known chip."""

    chip: str
    target: GPUTarget
    shared_limit: int  # most bytes per block
    shared_unit: int  # bytes per multiprocessor
    max_warps: int  # most warps per multiprocessor
    peak: dict[str, float]  # FLOP/s by precision
    bandwidth: float  # bytes/s
    matrix: str  # instructions of the matrix units, as a regular expression
    small_matrix: str  # those for tiles of less than 64 rows


# NVIDIA A100 (80 GB SXM), H100 (SXM), B200 and AMD MI300X datasheets, without sparsity. A tf32x3 product takes three.
GPUS: dict[str, Gpu] = {
    "sm_80": Gpu(
        "A100", GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 64,
        {"half": 312e12, "tf32x3": 156e12 / 3, "ieee": 19.5e12}, 2.04e12, r"\bHMMA\.", r"\bHMMA\.",
    ),
    "sm_90": Gpu(
        "H100", GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 64,
        {"half": 989e12, "tf32x3": 494e12 / 3, "ieee": 67e12, "fp8": 1979e12}, 3.35e12, r"\b[HQ]GMMA\.", r"\bHMMA\.",
    ),
    "sm_100": Gpu(
        "B200", GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 64,
        {"half": 2250e12, "tf32x3": 1125e12 / 3, "ieee": 75e12}, 8.0e12, r"\bUTC\w*MMA\b", r"\bHMMA\.",
    ),
    "gfx942": Gpu(
        "MI300X", GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 32,
        {"half": 1307e12, "ieee": 163.4e12}, 5.3e12, r"\bv_mfma_", r"\bv_mfma_",
    ),
}  # fmt: skip
# Targets of the compiler that take another family's tables of tiles, and the family.
SERVED = {"sm_89": "sm_80"}
# NVIDIA RTX 4090, whose products are summed in float32 at half rate.
TARGETS: dict[str, Gpu] = GPUS | {
    "sm_89": Gpu(
        "RTX 4090", GPUTarget("cuda", 89, 32), 99 << 10, 100 << 10, 48,
        {"half": 165.2e12, "tf32x3": 82.6e12 / 3, "ieee": 82.6e12}, 1.01e12, r"\bHMMA\.", r"\bHMMA\.",
    ),
}  # fmt: skip
if OLDER_TRITON:
    del GPUS["sm_100"], TARGETS["sm_100"]  # mmkernels._backends refuses it


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled form of a kernel: everything that the compiler is told."""

    op: str
    kernel: str
    gpu: str
    precision: str  # half, tf32x3, ieee; fp8 for the calibration
    dtype: str  # bf16, fp16, fp32
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    options: tuple[tuple[str, Any], ...] = ()  # others that the launcher gives
    has_dot: bool = False
    may_spill: bool = False

    @property
    def name(self) -> str:
        flags = [key.lower() for key, value in self.constants if value is True]
        return "-".join([self.kernel.removesuffix("_kernel"), self.dtype, self.precision, self.gpu, *flags])


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiled code takes."""

    registers: int
    spilled: int  # bytes of local memory (stack, spills) of a thread
    shared: int  # bytes of a block
    tensor_memory: int  # columns, sm_100
    matrix_instructions: int
    tf32_instructions: int
    blocks: int  # resident on a multiprocessor
    occupancy: float


class Argument(NamedTuple):
    """How the compiler is told of an argument that is no constant."""

    type: str
    divisible: bool = False  # its value, or the address that it is, is a multiple of 16


class Problem(NamedTuple):
    """What one kernel does for a call of the op."""

    name: str
    flops: float
    bytes: float  # the least memory traffic
    steps: int = 1  # trips of a tile through the main loop
    tiles: float = 0.0  # how many tiles the launches make; 0: as many as the FLOPs fill

    def bound(self, case: Case) -> tuple[float, str]:
        """Seconds that the datasheet allows at best, and the limit that sets them: compute or memory."""
        gpu = TARGETS[case.gpu]
        compute = self.flops / gpu.peak[case.precision if case.has_dot else "ieee"]
        memory = self.bytes / gpu.bandwidth
        return max(compute, memory), "compute" if compute >= memory else "memory"

    def predicted(self, tile: Tile, chip: Chip) -> float:
        """Seconds by the issue model, in whole waves of tiles, and no less than the memory needs."""
        tiles = self.tiles or self.flops / tile.flops
        waves = -(-tiles // chip.multiprocessors)
        clock = chip.clock_at(tile.clocks.get("matrix", 0.0) / tile.cycles)
        return max(waves * tile.cycles / clock, self.bytes / chip.bandwidth)
