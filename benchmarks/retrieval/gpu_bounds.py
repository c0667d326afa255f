"""The compiled forms of retrieval's Triton kernels, for gpu_bounds."""

import functools
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.harness.gpu_forms import GPUS, Argument, Case, Problem
from benchmarks.info_nce.gpu_bounds import case
from mmkernels._tiles.configs import tile_of
from mmkernels.retrieval import triton_kernels

# Constants that only ever add to a kernel: the compile check takes the heaviest form.
GROWING = {"KEPT"}
_POINTERS = {"targets": "i64", "positives": "fp32", "counts": "i32", "entries": "i64"}
_MULTIPLES_OF_16 = {"D", "stride_q", "stride_k"}
_LISTS = [1 << power for power in range(triton_kernels._MOST_KEPT.bit_length())]


def cases(gpus: Iterable[str] = GPUS) -> list[Case]:
    """Every form that a launcher can ask for on these GPUs."""
    return [case for gpu in gpus for precision in ("half", "ieee") for case in _cases(gpu, precision)]


def _cases(gpu: str, precision: str) -> Iterator[Case]:
    tile = tile_of("retrieval", gpu, precision)
    for dtype in ("bf16", "fp16") if precision == "half" else ("fp32",):
        make = functools.partial(case, "retrieval", gpu, precision, dtype)
        for name in ("positives_kernel", "ranks_kernel", "entries_kernel"):
            yield make(name, tile)
        for kept in _LISTS:
            yield make("topk_kernel", triton_kernels.topk_tile(gpu, precision, kept)[1], KEPT=kept)


def kernel(name: str) -> Any:
    return getattr(triton_kernels, name)


def argument(case: Case, name: str) -> Argument:
    if name in ("queries", "keys") or name in _POINTERS:
        return Argument("*" + _POINTERS.get(name, case.dtype), True)
    return Argument("i32", name in _MULTIPLES_OF_16)


def problems(case: Case, rows: int = 32768, features: int = 512) -> list[Problem]:
    """One kernel over a whole [rows, rows] problem."""
    element = {"bf16": 2, "fp16": 2, "fp32": 4}[case.dtype]
    inputs = 2.0 * rows * features * element
    flops = 2.0 * rows * rows * features
    name = f"{rows} x {features}"
    steps = -(-features // dict(case.constants).get("BLOCK_K", features))
    if case.kernel == "positives_kernel":
        return [Problem(name, 2.0 * rows * features, inputs, steps)]
    if case.kernel == "entries_kernel":
        return [Problem(name, flops, inputs + 8.0 * rows * rows, steps)]
    return [Problem(name, flops, inputs + 8.0 * rows * dict(case.constants).get("KEPT", 1), steps)]


def is_main(case: Case) -> bool:
    """Ranks, and the 10 best."""
    return case.dtype != "fp16" and dict(case.constants).get("KEPT", 16) == 16
