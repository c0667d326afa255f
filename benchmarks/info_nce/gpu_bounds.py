"""The compiled forms of info_nce's Triton kernels, for gpu_bounds."""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.harness.gpu_forms import GPUS, Argument, Case, Problem
from mmkernels._tiles import launch, products
from mmkernels._tiles.configs import CONFIGS, Config
from mmkernels._tiles.slots import slot_flags
from mmkernels._tiles.triton import Tile
from mmkernels.info_nce import chunked
from mmkernels.info_nce.triton_kernels import cross_entropy, grad_logits_flags

# Arguments that are strides or sizes of padded rows: multiples of 16, which the launcher sees to.
_MULTIPLES_OF_16 = {
    "D", "stride_q", "stride_k", "stride_x", "stride_y", "stride_strip", "height", "width", "num_features"
}  # fmt: skip
GROWING = {"SYMMETRIC", "SMOOTHED", "SHARE"}
_FEATURES = {"queries", "keys", "x", "y", "strip", "grad", "other_grad"}
_INTEGERS = {"N", "M", "num_x", "num_y", "tiles_per_group", "tiles_per_split", "num_groups", "num_splits"} | {
    "first", "first_x", "first_y", "first_row", "first_col", "depth", "place", "num_grouped", "num_rows",
    "rows_per_group", "tiles_per_band", "num_bands", "match_offset", "splits", "num_other", "len_x", "other_depth",
    "other_splits",
}  # fmt: skip
_INDICES = {"targets", "key_groups", "of_query", "of_key"}


def cases(gpus: Iterable[str] = GPUS) -> list[Case]:
    """Every form that a launcher can ask for on these GPUs."""
    return [
        case for gpu in gpus for precision, config in CONFIGS[gpu].items() for case in _cases(gpu, precision, config)
    ]


def _cases(gpu: str, precision: str, config: Config) -> Iterable[Case]:
    both = (False, True)
    for dtype in ("bf16", "fp16") if precision == "half" else ("fp32",):
        make = functools.partial(case, "info_nce", gpu, precision, dtype)
        for symmetric, groups in itertools.product(both, both):
            yield from tiles_of_logits(make, config, SYMMETRIC=symmetric, BIAS=False, GROUPS=groups)
        for transposed, of_both in ((False, False), (True, False), (False, True)):
            sides = {"TRANSPOSED": transposed, "BOTH": of_both}
            if not of_both:
                yield make("product_kernel", config.product, **sides, SPLIT=True, SHARE=False)
            for share in both:
                yield make("product_kernel", config.product, **sides, SPLIT=False, SHARE=share)
        for of_both, share in itertools.product(both, both):
            block = {"BLOCK_M": products.MERGE_ROWS, "BLOCK_N": products.MERGE_FEATURES}
            yield make("merge_product_kernel", None, BOTH=of_both, SHARE=share, **block)
        if precision == "half":
            tile = chunked.tile_of(gpu)
            block = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
            for symmetric, groups, smoothed in itertools.product(both, both, both):
                flags = {"SYMMETRIC": symmetric, "GROUPS": groups, **block}
                yield make("strip_grad_kernel", None, SMOOTHED=smoothed, **flags)
                if dtype == "bf16" and not smoothed:  # it sees float32 alone
                    yield case("info_nce", gpu, precision, "fp32", "strip_statistics_kernel", None, **flags)
    if precision == "ieee":  # it sees float32 and targets alone
        block = {"STEP": launch.MERGE_STEP, "BLOCK": launch.MERGE_BLOCK}
        yield case("info_nce", gpu, precision, "fp32", "column_weights_kernel", None, **block)


def tiles_of_logits(make: Callable[..., Case], config: Config, **flags: bool) -> Iterable[Case]:
    """The kernels that make tiles of logits, and what merges their statistics, in one kind of cross-entropy."""
    both = (False, True)
    yield make("forward_kernel", config.of_forward(flags["GROUPS"], flags["SYMMETRIC"]), **flags)
    for smoothed in both:
        block = {"STEP": launch.MERGE_STEP, "BLOCK": launch.MERGE_BLOCK}
        yield make("finish_forward_kernel", None, SMOOTHED=smoothed, **flags, **block)
    for smoothed in both:
        tile = config.of_grad_logits(flags["GROUPS"], smoothed)
        yield make("grad_logits_kernel", tile, SMOOTHED=smoothed, **flags)
    if not flags["GROUPS"]:
        tiles = (config.of_grad_logits(False, smoothed) for smoothed in both)
        for height, width in dict.fromkeys((tile.block_m, tile.block_n) for tile in tiles):
            block = {"BLOCK_M": height, "BLOCK_N": width}
            yield make("softmax_factors_kernel", None, SYMMETRIC=flags["SYMMETRIC"], **block)


def case(op: str, gpu: str, precision: str, dtype: str, kernel: str, tile: Tile | None, **constants: Any) -> Case:
    """One form of a kernel as the launcher asks for it."""
    warps, stages = 4, 3  # Triton's defaults
    if tile is not None:
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
        constants["PRECISION"] = "ieee" if precision == "half" else precision
        warps, stages = tile.num_warps, tile.num_stages
        if kernel == "forward_kernel":
            constants |= slot_flags(tile, gpu)
        if kernel == "grad_logits_kernel":
            constants |= grad_logits_flags(gpu)
    options = tuple(launch.compiler_options(tile).items())
    return Case(op, kernel, gpu, precision, dtype, tuple(constants.items()), warps, stages, options, tile is not None)


def kernel(name: str) -> Any:
    return next(found for module in (products, cross_entropy, chunked) if (found := getattr(module, name, None)))


def argument(case: Case, name: str) -> Argument:
    if name in _INTEGERS or name in _MULTIPLES_OF_16:
        return Argument("i32", name in _MULTIPLES_OF_16)
    if name == "label_smoothing":
        return Argument("fp32")
    if name == "positives_in":
        return Argument("*i32", True)
    if name in _INDICES:
        # The kernels that make tiles take groups by numbers.
        of_pairs = case.has_dot or case.kernel.startswith("strip_")
        numbered = of_pairs and dict(case.constants).get("GROUPS")
        return Argument("*i32" if numbered else "*i64", True)
    return Argument("*" + (case.dtype if name in _FEATURES else "fp32"), True)


def problems(case: Case, rows: int = 32768, features: int = 512) -> list[Problem]:
    """One kernel over a whole [rows, rows] problem, one side."""
    return [Problem(f"{rows} x {features}", *work(case, rows, rows, features), steps_of(case, rows, features))]


def steps_of(case: Case, cols: int, features: int) -> int:
    """How often a tile goes through the main loop of its product."""
    depth = dict(case.constants).get("BLOCK_K", features)
    if case.kernel != "product_kernel":
        return -(-features // depth)
    # A strip has 2,048 rows. Its product is split into four along the columns; that of the strip transposed is not.
    return max(1, (2048 if dict(case.constants)["TRANSPOSED"] else cols // 4) // depth)


def work(case: Case, rows: int, cols: int, features: int) -> tuple[float, float]:
    """FLOPs and least bytes of one kernel over [rows, cols] logits."""
    element = {"bf16": 2, "fp16": 2, "fp32": 4}[case.dtype]
    inputs = (rows + cols) * features * element
    logits = float(rows) * cols
    if case.kernel == "forward_kernel":
        return 2 * logits * features, inputs
    if case.kernel == "grad_logits_kernel":
        return 2 * logits * features, inputs + logits * element
    if case.kernel == "product_kernel":
        return 2 * logits * features, logits * element + inputs
    if case.kernel == "strip_statistics_kernel":
        return 4 * logits, 4 * logits
    if case.kernel == "strip_grad_kernel":
        return 4 * logits, logits * (4 + element)
    if case.kernel == "merge_product_kernel":
        return 2.0 * rows * features, rows * features * (4 + 2 * element)
    if case.kernel == "column_weights_kernel":
        return 2 * logits, 8.0 * (rows + cols)
    return 32.0 * (rows + cols), 32 * 8.0 * (rows + cols)


def is_main(case: Case) -> bool:
    """The loss that users run most: symmetric, without smoothing or groups."""
    constants = dict(case.constants)
    return (
        case.dtype != "fp16"
        and not constants.get("SMOOTHED")
        and not constants.get("GROUPS")
        and not constants.get("BOTH")
        and constants.get("SYMMETRIC", True)
        and (constants.get("SHARE", True) or constants.get("SPLIT", False))
    )
