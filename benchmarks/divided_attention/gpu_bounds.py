"""The compiled forms of divided attention's Triton kernels, for gpu_bounds."""

import functools
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from benchmarks.harness.gpu_forms import GPUS, Argument, Case, Problem
from mmkernels.divided_attention import triton_kernels
from mmkernels.divided_attention.layout import APART, AVERAGED, GLOBAL
from mmkernels.divided_attention.triton_kernels import backward, engine, forward, whole, whole_backward
from mmkernels.divided_attention.triton_kernels.configs import (
    CONFIGS,
    HEADS,
    MOST_KEYS,
    WHOLE,
    Config,
    launch_options,
    whole_options,
)

_KERNELS = {
    "packed_forward": forward.packed_forward_kernel,
    "whole_forward": whole.whole_forward_kernel,
    "forward": forward.forward_kernel,
    "packed_backward": backward.packed_backward_kernel,
    "grad_queries": backward.grad_queries_kernel,
    "grad_keys": backward.grad_keys_kernel,
    "whole_grad_queries": whole_backward.whole_grad_queries_kernel,
    "whole_grad_keys": whole_backward.whole_grad_keys_kernel,
    "cls_sums": backward.cls_sums_kernel,
    "merge": engine.merge_kernel,
}
# The lines of tiles of the kernels that hold one side of a sequence whole.
WHOLE_LINES = {
    "whole_forward": "whole_forward",
    "whole_grad_queries": "whole_backward",
    "whole_grad_keys": "whole_backward",
}
GROWING = {"MASKED", "CLS", "BLOCK_K", "HEAD"}
CLS = (APART, AVERAGED, GLOBAL)
_FEATURES = {"grad_out", "qkv", "out", "grad_qkv"}
_NUMBERS = {*engine.RUNTIME, "parts", "num_tokens", "rows", "weighted"} - {"cls_weight", "keep_scale"}
_FRACTIONS = {"scale", "scale2", "cls_weight", "keep_scale"}


class Clip(NamedTuple):
    """A call of 12 heads of 64 features, or as many features in other heads."""

    name: str
    batch: int
    frames: int
    positions: int
    width: int = 768

    def outputs(self, element: int) -> float:
        """Bytes of an output: X."""
        return float(self.batch * (1 + self.frames * self.positions) * self.width * element)


CLIPS = (
    Clip("B=8 T=8 224px", 8, 8, 196),
    Clip("B=1 T=96 224px", 1, 96, 196),
    Clip("B=1 T=16 448px", 1, 16, 784),
)
# Products of a tile; least traffic in outputs: what is read and what is written.
_PRODUCTS = {
    "packed_forward": 2,
    "whole_forward": 2,
    "forward": 2,
    "packed_backward": 5,
    "grad_queries": 3,
    "grad_keys": 4,
    "whole_grad_queries": 3,
    "whole_grad_keys": 4,
}
_TRAFFIC = {
    "packed_forward": 4,
    "whole_forward": 4,
    "forward": 4,
    "packed_backward": 7,
    "grad_queries": 6,
    "grad_keys": 6,
    "whole_grad_queries": 6,
    "whole_grad_keys": 6,
}


def cases(gpus: Iterable[str] = GPUS) -> list[Case]:
    """Every form that a launcher can ask for on these GPUs."""
    return [
        case
        for gpu in gpus
        for (precision, masked), configs in CONFIGS[gpu].items()
        for dtype in (("bf16", "fp16") if precision == "half" else ("fp32",))
        for case in _cases(gpu, precision, dtype, masked, configs)
    ]


def _cases(gpu: str, precision: str, dtype: str, masked: bool, configs: dict[int, Config]) -> Iterator[Case]:
    make = functools.partial(Case, "divided_attention")
    for config in configs.values():
        for name, tile in config._asdict().items():
            options = launch_options(tile)
            warps, stages = options.pop("num_warps"), options.pop("num_stages")
            # Wide heads in float32 and clips of 2^31 features are to be right; no model's speed hangs on them.
            large = tile.block_k > 128 and dtype == "fp32"
            for cls, wide in itertools.product(CLS, (False, True)):
                constants = {"CLS": cls, "MASKED": masked, "WIDE": wide} | options
                yield make(
                    name, gpu, precision, dtype, tuple(constants.items()), warps, stages, has_dot=True,
                    may_spill=large or wide,
                )  # fmt: skip
    if precision == "half" and not masked:
        yield from _whole_cases(gpu, dtype)
    for head, wide in itertools.product((8, 16, *HEADS), (False, True)):
        constants = {"MASKED": masked, "WIDE": wide, "BLOCK": triton_kernels.CLS_BLOCK, "HEAD": head}
        yield make("cls_sums", gpu, precision, dtype, tuple(constants.items()), triton_kernels.CLS_WARPS, 3)
        if wide:
            continue
        if not masked:
            constants = {"ROWS": triton_kernels.MERGE_ROWS, "HEAD": head}
            yield make("merge", gpu, precision, dtype, tuple(constants.items()), triton_kernels.MERGE_WARPS, 3)


def _whole_cases(gpu: str, dtype: str) -> Iterator[Case]:
    """The keys of a sequence in all sums of pieces: from the packed tile's items on, all multiples of 16."""
    for name, line in WHOLE_LINES.items():
        for tile, items in itertools.product(WHOLE[line].get(gpu, {}).values(), range(80, MOST_KEYS + 1, 16)):
            options = whole_options(tile, items)
            warps, stages = options.pop("num_warps"), options.pop("num_stages")
            for cls, wide in itertools.product(CLS, (False, True)):
                if cls == APART and name != "whole_forward":
                    continue  # streamed
                constants = {"CLS": cls, "WIDE": wide} | options
                yield Case(
                    "divided_attention", name, gpu, "half", dtype, tuple(constants.items()), warps, stages,
                    has_dot=True, may_spill=wide,
                )  # fmt: skip


def keys_of(case: Case) -> int:
    """The most keys of a form that holds a sequence whole; 0 for other kernels."""
    return int(dict(case.constants).get("KEYS", 0))


def kernel(name: str) -> Any:
    return _KERNELS[name]


def argument(case: Case, name: str) -> Argument:
    if name in _NUMBERS:
        return Argument("i32")
    if name in _FRACTIONS:
        return Argument("fp32")
    if name in ("frame_mask", "cls_weights", "seed"):
        kinds = {"frame_mask": "*u8", "cls_weights": "*fp32", "seed": "*i64"}
        # None, where the kernel knows of neither mask nor dropout.
        return Argument(kinds[name] if dict(case.constants)["MASKED"] else "constexpr", True)
    return Argument("*" + (case.dtype if name in _FEATURES else "fp32"), True)


def problems(case: Case) -> list[Problem]:
    """One kernel over the clips whose sequences it takes: packed ones in time, streamed ones in space or long time."""
    element = {"bf16": 2, "fp16": 2, "fp32": 4}[case.dtype]
    if case.kernel == "cls_sums":  # the keys of a global class token
        return [Problem(clip.name, 2 * clip.outputs(1), clip.outputs(element)) for clip in CLIPS]
    if case.kernel == "merge":  # a partial for each frame
        partials = [(clip.name, clip.batch * clip.frames * clip.width) for clip in CLIPS]
        return [Problem(f"space, {name}", 2.0 * size, 4.0 * size) for name, size in partials]
    constants = dict(case.constants)
    block, head = constants["BLOCK_M"], constants["BLOCK_K"]
    depth = constants.get("BLOCK_N", block)  # of a step: grad_keys holds BLOCK_N keys and goes over queries
    if case.kernel == "grad_keys":
        block, depth = depth, block
    packed = case.kernel.startswith("packed")
    found = []
    for clip in CLIPS:
        heads = clip.batch * (clip.width // head)
        if packed:  # the kernel multiplies whole tiles; only a block diagonal counts
            tiles = -(-clip.positions // max(1, block // clip.frames))
            pairs = {"time": (tiles * block**2, tiles, 1)} if clip.frames <= block else {}
        else:
            space, time = clip.positions + 1, clip.frames
            if case.kernel.startswith("whole"):
                lengths = {"space": (time, space), "time": (clip.positions, time)}
                fitting = {axis: x for axis, x in lengths.items() if x[1] > 64 and 0 <= keys_of(case) - x[1] < 16}
                pairs = {axis: (n * size**2, n, -(-size // block)) for axis, (n, size) in fitting.items()}
            else:
                pairs = {"space": (time * space**2, time * -(-space // block), -(-space // depth))}
            if time > 64 and not case.kernel.startswith("whole"):
                pairs["time"] = (clip.positions * time**2, clip.positions * -(-time // block), -(-time // depth))
        for axis, (count, tiles, steps) in pairs.items():
            flops = 2.0 * _PRODUCTS[case.kernel] * heads * count * head
            traffic = _TRAFFIC[case.kernel] * clip.outputs(element)
            found.append(Problem(f"{axis}, {clip.name}", flops, traffic, steps, heads * tiles))
    return found


def is_main(case: Case) -> bool:
    """Heads of 64 without mask or dropout; the class token as in TimeSformer."""
    constants = dict(case.constants)
    cls = APART if case.kernel.startswith("packed") else AVERAGED
    return (
        case.dtype != "fp16"
        and constants.get("BLOCK_K", constants.get("HEAD")) == 64
        and constants.get("CLS", cls) == cls
        and not constants.get("MASKED")
        and not constants.get("WIDE")
        and keys_of(case) in (0, MOST_KEYS)
    )
