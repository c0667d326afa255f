"""The compiled forms of triplet's Triton kernels, for gpu_bounds."""

import functools
import itertools
from collections.abc import Iterable
from typing import Any

from benchmarks.harness.gpu_forms import GPUS, Argument, Case, Problem
from benchmarks.info_nce.gpu_bounds import case, steps_of
from mmkernels._tiles import launch, products
from mmkernels._tiles.configs import CONFIGS, tile_of
from mmkernels.triplet.triton_kernels import gradient_tile, kernels

GROWING = {"SYMMETRIC", "SEMI_HARD", "GRADIENT", "WEIGHTED"}
_MULTIPLES_OF_16 = {"D", "stride_q", "stride_k", "stride_x", "stride_y", "stride_strip", "num_features"}
_FEATURES = {"queries", "keys", "x", "y", "strip"}
_INDICES = {"row_index", "col_index", "worst", "starts", "columns", "peaks"}
_INTEGERS = {
    "N", "M", "first", "height", "width", "num_x", "num_y", "tiles_per_group", "tiles_per_split",
    "num_groups", "num_splits", "all_groups", "first_x", "first_y", "depth", "place",
    "splits", "num_other", "len_x", "other_depth", "other_splits",
}  # fmt: skip


def cases(gpus: Iterable[str] = GPUS) -> list[Case]:
    """Every form that a launcher can ask for on these GPUs."""
    return [case for gpu in gpus for precision in CONFIGS[gpu] for case in _cases(gpu, precision)]


def _cases(gpu: str, precision: str) -> Iterable[Case]:
    tile = tile_of("triplet", gpu, precision)
    merge = {"BLOCK_M": products.MERGE_ROWS, "BLOCK_N": products.MERGE_FEATURES}
    for dtype in ("bf16", "fp16") if precision == "half" else ("fp32",):
        make = functools.partial(case, "triplet", gpu, precision, dtype)
        of_gradient = gradient_tile(tile, dtype == "fp16")
        for one in dict.fromkeys((tile, of_gradient)):
            yield make("positives_kernel", one)
        for symmetric in (False, True):
            for gradient, weighted in ((False, False), (True, False), (True, True)):
                flags = {"SYMMETRIC": symmetric, "GRADIENT": gradient, "WEIGHTED": weighted}
                yield make("hinges_kernel", of_gradient if gradient else tile, **flags)
                if dtype != "fp16":
                    yield make("finish_hinges_kernel", None, BLOCK=launch.MERGE_BLOCK, **flags)
            for flag in (False, True):
                yield make("worst_kernel", tile, SYMMETRIC=symmetric, SEMI_HARD=flag)
        for transposed, of_both in ((False, False), (True, False), (False, True)):  # into float32
            product = CONFIGS[gpu][precision].product
            yield make("product_kernel", product, TRANSPOSED=transposed, BOTH=of_both, SPLIT=False, SHARE=False)
        for of_both in (False, True):
            yield make("merge_product_kernel", None, BOTH=of_both, SHARE=False, **merge)
        yield make("finish_gradients_kernel", None, **merge)
        sparse = {"BLOCK": products.MERGE_FEATURES, "STEP": launch.MERGE_STEP}
        yield make("sparse_product_kernel", None, **sparse)
    if precision == "ieee":  # it sees float32 alone
        for symmetric, semi_hard in itertools.product((False, True), repeat=2):
            block = {"BLOCK": launch.MERGE_BLOCK}
            flags = {"SYMMETRIC": symmetric, "SEMI_HARD": semi_hard}
            yield case("triplet", gpu, precision, "fp32", "finish_worst_kernel", None, **flags, **block)


def kernel(name: str) -> Any:
    return getattr(products, name, None) or getattr(kernels, name)


def argument(case: Case, name: str) -> Argument:
    if name in _INTEGERS or name in _MULTIPLES_OF_16:
        return Argument("i32", name in _MULTIPLES_OF_16)
    if name == "margin":
        return Argument("fp32")
    if name in _INDICES or (name == "parts" and case.kernel == "worst_kernel"):
        return Argument("*i32", True)
    of_features = name in _FEATURES or (name == "out" and case.kernel == "sparse_product_kernel")
    return Argument("*" + (case.dtype if of_features else "fp32"), True)


def problems(case: Case, rows: int = 32768, features: int = 512) -> list[Problem]:
    """One kernel over a whole [rows, rows] problem."""
    element = {"bf16": 2, "fp16": 2, "fp32": 4}[case.dtype]
    inputs, pairs = 2 * rows * features * element, float(rows) * rows
    constants = dict(case.constants)
    flops, traffic = {
        "positives_kernel": (2.0 * rows * features * constants.get("BLOCK_M", 0), inputs),
        "hinges_kernel": (2 * pairs * features, inputs + (pairs * element if constants.get("GRADIENT") else 0)),
        "worst_kernel": (2 * pairs * features, inputs),
        "product_kernel": (2 * pairs * features, pairs * element + inputs),
        "merge_product_kernel": (2.0 * rows * features, rows * features * 8),
        "finish_gradients_kernel": (2.0 * rows * features, rows * features * (8 + element)),
        "sparse_product_kernel": (6.0 * rows * features, rows * features * 4 * element),
        "finish_hinges_kernel": (128.0 * rows, 128 * 4.0 * rows),
        "finish_worst_kernel": (64.0 * rows, 64 * 8.0 * rows),
    }[case.kernel]
    return [Problem(f"{rows} x {features}", flops, traffic, steps_of(case, rows, features))]


def is_main(case: Case) -> bool:
    """The loss that users run most: symmetric, and its mean."""
    constants = dict(case.constants)
    left_out = constants.get("WEIGHTED") or constants.get("BOTH")
    return case.dtype != "fp16" and constants.get("SYMMETRIC", True) and not left_out
