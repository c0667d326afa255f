"""The compiled forms of siglip's Triton kernel, for gpu_bounds; the products over strips are info_nce's."""

from collections.abc import Iterable
from typing import Any

from benchmarks.harness.gpu_forms import GPUS, Argument, Case, Problem
from benchmarks.info_nce.gpu_bounds import argument as argument_of_info_nce
from benchmarks.info_nce.gpu_bounds import case, steps_of
from mmkernels._tiles.configs import CONFIGS, tile_of
from mmkernels.siglip import triton_kernels

GROWING: set[str] = set()  # a form that does less may well take more registers
_FLAGS = ("LOSSES", "SUMS", "STORE", "OF_KEYS")
_FORMS = {
    "losses": (True, False, False, False),
    "the scale and the bias alone": (False, True, False, False),
    "all of the queries": (True, True, True, False),
    "losses and queries": (True, False, True, False),
    "queries, one loss per row": (False, True, True, False),
    "queries alone, one loss per row": (False, False, True, False),
    "keys": (False, False, True, True),
    "keys, scale and bias": (False, True, True, True),
}


def cases(gpus: Iterable[str] = GPUS) -> list[Case]:
    """Every form that a launcher can ask for on these GPUs."""
    return [
        case("siglip", gpu, precision, dtype, "pairs_kernel", tile, **dict(zip(_FLAGS, flags, strict=True)))
        for gpu in gpus
        for precision in CONFIGS[gpu]
        for tile in [tile_of("siglip", gpu, precision)]
        for dtype in (("bf16", "fp16") if precision == "half" else ("fp32",))
        for flags in _FORMS.values()
    ]


def kernel(name: str) -> Any:
    return getattr(triton_kernels, name)


def argument(case: Case, name: str) -> Argument:
    if name in ("width", "stride_sums"):
        return Argument("i32", name == "width")
    return argument_of_info_nce(case, name)


def problems(case: Case, rows: int = 32768, features: int = 512) -> list[Problem]:
    """The kernel over a whole [rows, rows] problem, one side."""
    element = 4 if case.dtype == "fp32" else 2
    pairs = float(rows) * rows
    stored = pairs * element if dict(case.constants)["STORE"] else 0.0
    traffic = 2.0 * rows * features * element + stored
    return [Problem(f"{rows} x {features}", 2 * pairs * features, traffic, steps_of(case, rows, features))]


def is_main(case: Case) -> bool:
    """Training with a mean or a sum."""
    constants = dict(case.constants)
    return (
        case.dtype != "fp16" and constants["STORE"] and constants["SUMS"] == constants["LOSSES"] != constants["OF_KEYS"]
    )
