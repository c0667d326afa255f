"""Shared by the Triton kernels of all ops: how a kernel is compiled, which GPU it is for, and the dot product."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import contextlib
import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from mmkernels._backends import is_older_triton

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where a running maximum starts: finite, so that the first rescaling is 2^(LOWEST - m) = 0 and never inf - inf.
LOWEST = tl.constexpr(-3.0e38)
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# The tables of tiles have smaller ones for it.
OLDER_TRITON = is_older_triton(triton.__version__)
NEWER_TRITON = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9)


class Tile(NamedTuple):
    """How one kernel is compiled: the tile, the depth of a step of its dot products, and the launch."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # of a thread, on NVIDIA: so that two blocks share a multiprocessor


class Chip(NamedTuple):
    """What the launchers fit their work to."""

    multiprocessors: int
    l2_bytes: int


@triton.jit
def dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y, accumulated in float32; PRECISION says how float32 is multiplied."""
    if _INTERPRETED:  # the interpreter multiplies the bits of bfloat16 as integers
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision=PRECISION)


@triton.jit
def ordered(x):
    """int32 numbers in the order of the float32 numbers; both zeros map to one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@functools.cache
def family_of(device: torch.device) -> str:
    """The key of an op's table of tiles that serves the device."""
    if device.type == "cpu":
        return "interpreter"
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise RuntimeError(f"mmkernels: impl='triton' needs compute capability 8.0, this GPU has {major}.{minor}")
    return {9: "sm_90", 10: "sm_100"}.get(major, "sm_80")


@functools.cache
def chip_of(device: torch.device) -> Chip:
    """The device's; the interpreter passes for a small chip."""
    if device.type == "cpu":
        return Chip(4, 32 << 20)
    properties = torch.cuda.get_device_properties(device)
    return Chip(properties.multi_processor_count, properties.L2_cache_size)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[None]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def cdiv(value: int, divisor: int) -> int:
    """value / divisor, rounded up. triton.cdiv is for kernels, too, and takes microseconds outside of them."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
