"""The compiled forms of siglip's Triton kernels, for gpu_bounds; the products over strips are info_nce's."""

from collections.abc import Iterable
from typing import Any

from benchmarks.harness.gpu_forms import GPUS, Argument, Case, Problem
from benchmarks.info_nce.gpu_bounds import argument as argument_of_info_nce
from benchmarks.info_nce.gpu_bounds import case, steps_of
from mmkernels._tiles.configs import CONFIGS, strip_flags, tile_of
from mmkernels.siglip import triton_kernels

GROWING: set[str] = set()  # a form that does less may well take more registers
_POINTERS = {"losses", "sums", "totals"}
_FLAGS = ("LOSSES", "SUMS", "STORE")
_FORMS = {
    "losses": (True, False, False),
    "losses, the scale and the bias": (True, True, False),
    "all": (True, True, True),
    "losses and features": (True, False, True),
    "all, one loss per row": (False, True, True),
    "features, one loss per row": (False, False, True),
}


def cases(gpus: Iterable[str] = GPUS) -> list[Case]:
    """Every form that a launcher can ask for on these GPUs."""
    pairs = []
    for gpu in gpus:
        for precision in CONFIGS[gpu]:
            for dtype in ("bf16", "fp16") if precision == "half" else ("fp32",):
                tile = triton_kernels.pairs_tile(tile_of("siglip", gpu, precision), dtype == "fp16")
                for flags in _FORMS.values():
                    constants = dict(zip(_FLAGS, flags, strict=True)) | strip_flags(gpu)
                    pairs.append(case("siglip", gpu, precision, dtype, "pairs_kernel", tile, **constants))
    block = {"BLOCK": triton_kernels.SUM_ROWS, "STEP": triton_kernels.SUM_STEP}
    finish = [
        case("siglip", gpu, "ieee", "fp32", "finish_pairs_kernel", None, LOSSES=losses, SUMS=sums, **block)
        for gpu in gpus
        for losses, sums in sorted({flags[:2] for flags in _FORMS.values() if any(flags[:2])})
    ]
    return pairs + finish


def kernel(name: str) -> Any:
    return getattr(triton_kernels, name)


def argument(case: Case, name: str) -> Argument:
    if case.kernel == "finish_pairs_kernel":
        return Argument({"losses": "*fp32", "sums": "*fp32", "totals": "*fp64"}.get(name, "i32"), name in _POINTERS)
    return argument_of_info_nce(case, name)


def problems(case: Case, rows: int = 32768, features: int = 512) -> list[Problem]:
    """The kernel over a whole [rows, rows] problem."""
    element = 4 if case.dtype == "fp32" else 2
    pairs = float(rows) * rows
    if case.kernel == "finish_pairs_kernel":
        sums = 3 * pairs / 512  # of programs with four tiles of 128 columns
        return [Problem(f"{rows}", sums, 4 * sums)]
    stored = pairs * element if dict(case.constants)["STORE"] else 0.0
    traffic = 2.0 * rows * features * element + stored
    return [Problem(f"{rows} x {features}", 2 * pairs * features, traffic, steps_of(case, rows, features))]


def is_main(case: Case) -> bool:
    """Training with a mean or a sum."""
    constants = dict(case.constants)
    return case.dtype != "fp16" and constants["LOSSES"] and constants["SUMS"] and constants.get("STORE", True)
