"""The forms of the calibration's kernels, their problems, and what was published of their speed."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.calibration import kernels
from benchmarks.harness.gpu_forms import Argument, Case, Problem

GROWING: set[str] = set()


class Published(NamedTuple):
    """A measured speed that somebody published."""

    kernel: str
    dtype: str
    head: int  # or 0
    tflops: float  # TFLOP/s on an H100 SXM
    source: str


PUBLISHED = (
    Published("attention_kernel", "fp16", 64, 403, "FlashAttention-3 paper, figure 5: Triton at 16k tokens"),
    Published("attention_kernel", "fp16", 128, 395, "FlashAttention-3 paper, figure 5: Triton at 16k tokens"),
    Published("attention_kernel", "fp16", 128, 477, "pytorch/benchmark #2391: Triton's tutorial at 16k tokens"),
    Published("attention_kernel", "fp16", 128, 487, "facebookexperimental/triton #206: the tutorial at 16k tokens"),
    Published("product_kernel", "fp8e4nv", 0, 1209, "triton #5461: matmul_kernel, 8192 x 8192 x 4096"),
    Published("product_kernel", "fp16", 0, 217.5, "triton #5726: matmul_kernel, 8192 x 8192 x 512, cuBLAS 285"),
)
# Of the published kernels, Triton's autotuner chose the tile: the fastest of these stands for it.
_TILES = ((128, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 3))
_LENGTH, _TOKENS, _WIDTH = 16384, 16384, 2048
_ROWS = 8192
_DEPTHS = {"fp8e4nv": 4096, "fp16": 512}


def cases(gpus: Iterable[str] = ("sm_90",)) -> list[Case]:
    """Attention in heads of 64 and 128, in several tiles; the product in the tutorial's tile."""
    if "sm_90" not in gpus:
        return []
    found = []
    for head in (64, 128):
        for block_m, block_n, warps, stages in _TILES:
            tile = (("HEAD", head), ("BLOCK_M", block_m), ("BLOCK_N", block_n))
            found.append(
                Case("calibration", "attention_kernel", "sm_90", "half", "fp16", tile, warps, stages, has_dot=True)
            )
    for precision, dtype, depth, stages in (("fp8", "fp8e4nv", 128, 4), ("half", "fp16", 64, 3)):  # the tutorial's
        block = (("BLOCK_M", 128), ("BLOCK_N", 256), ("BLOCK_K", depth), ("BAND", 8))
        found.append(Case("calibration", "product_kernel", "sm_90", precision, dtype, block, 8, stages, has_dot=True))
    return found


def kernel(name: str) -> Any:
    return getattr(kernels, name)


def argument(case: Case, name: str) -> Argument:
    if name in ("length", "rows", "columns", "depth"):
        return Argument("i32", True)
    return Argument("fp32") if name == "scale2" else Argument("*" + case.dtype, True)


def problems(case: Case) -> list[Problem]:
    constants = dict(case.constants)
    if case.kernel == "product_kernel":
        depth, element = _DEPTHS[case.dtype], 1 if case.dtype == "fp8e4nv" else 2
        traffic = float(element * (2 * _ROWS * depth + _ROWS * _ROWS))
        return [Problem(f"8192 x 8192 x {depth}", 2.0 * _ROWS**2 * depth, traffic, depth // constants["BLOCK_K"])]
    flops = 4.0 * _TOKENS * _LENGTH * _WIDTH
    return [Problem("16384 tokens", flops, 8.0 * _TOKENS * _WIDTH, _LENGTH // constants["BLOCK_N"])]


def is_main(case: Case) -> bool:
    return True
