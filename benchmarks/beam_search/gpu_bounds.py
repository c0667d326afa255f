"""The compiled forms of beam search's Triton kernels, for gpu_bounds."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from benchmarks.harness.gpu_forms import GPUS, Argument, Case, Problem
from mmkernels.beam_search import triton_kernels
from mmkernels.beam_search.triton_kernels import TILES

_KERNELS = {
    "scan": triton_kernels.scan_kernel,
    "sum": triton_kernels.sum_kernel,
    "merge": triton_kernels.merge_kernel,
}
_POINTERS = {
    "logits": None, "scores": "fp32", "maxima": "fp32", "sums": "fp64", "kept_logits": "fp32", "kept_tokens": "i32",
    "out_scores": "fp32", "out_beams": "i64", "out_tokens": "i64", "out_valid": "u8", "out_poisoned": "u8",
}  # fmt: skip
# A tile of the merge has a place for each part of each beam.
BEAMS, PARTS = (1, 2, 4, 8, 16, 64), (1, 2, 8, 32)
# Operations on an entry: the largest, the best and where it stands; e^x and its sum in float64.
SCAN, SUM = 8, 20


# Constants that only ever add to a kernel: the compile check takes the heaviest form.
GROWING = {"BEAMS", "PARTS"}


class Step(NamedTuple):
    """A call of the step, 2 K candidates."""

    name: str
    items: int
    beams: int
    vocabulary: int

    def logits(self, element: int) -> float:
        return float(self.items * self.beams * self.vocabulary * element)


STEPS = (
    Step("B=1 K=5 V=50257", 1, 5, 50257),
    Step("B=16 K=5 V=50257", 16, 5, 50257),
    Step("B=32 K=5 V=9488", 32, 5, 9488),
    Step("B=8 K=4 V=128256", 8, 4, 128256),
)


def cases(gpus: Iterable[str] = GPUS) -> list[Case]:
    """Every form that the launcher can ask for on these GPUs; rows whose stride is a multiple of 16, and others."""
    return [case for gpu in gpus for case in _cases(gpu)]


def _cases(gpu: str) -> Iterator[Case]:
    tile = TILES[gpu]

    def make(kernel: str, dtype: str, warps: int = tile.num_warps, **constants: Any) -> Case:
        options = (("enable_fp_fusion", False),)
        return Case("beam_search", kernel, gpu, "ieee", dtype, tuple(constants.items()), warps, 3, options=options)

    for dtype in ("bf16", "fp16", "fp32"):
        for masked in (False, True):
            for aligned in (False, True):
                form: dict[str, Any] = {"MASKED": masked, "ALIGNED": aligned}
                for mask_first in (False, True):
                    form |= {"MASK_FIRST": mask_first, "BLOCK": tile.block}
                    for whole in (False, True):
                        yield make("scan", dtype, **form, SUM=whole, MAX_STEPS=tile.max_steps)
                    for parts in PARTS[1:]:
                        yield make("sum", dtype, **form, PARTS=parts)
    for masked in (False, True):
        for normalize in (False, True):
            for beams in BEAMS:
                for parts in PARTS:
                    warps = triton_kernels.merge_warps(tile, beams, parts)
                    yield make("merge", "fp32", warps, MASKED=masked, NORMALIZE=normalize, BEAMS=beams, PARTS=parts)


def kernel(name: str) -> Any:
    return _KERNELS[name]


def argument(case: Case, name: str) -> Argument:
    constants = dict(case.constants)
    if name in ("forbidden", "valid"):  # None, or masks
        return Argument("*u8" if constants["MASKED"] else "constexpr", True)
    if name in _POINTERS:
        return Argument(f"*{_POINTERS[name] or case.dtype}", True)
    if name == "shift":
        return Argument("fp32")
    return Argument("i32", name in ("row_stride", "forbidden_stride") and constants["ALIGNED"])


def problems(case: Case) -> list[Problem]:
    """The scan of all logits, with or without the sum; the sum of several parts, which reads them from L2.

    No operation is a fused multiply-add, which the datasheet's peak counts twice: each one here counts twice, too.
    """
    element = {"bf16": 2, "fp16": 2, "fp32": 4}[case.dtype]
    operations = {"scan": SCAN, "sum": SUM, "merge": 0}[case.kernel] + (SUM if dict(case.constants).get("SUM") else 0)
    return [
        Problem(
            step.name,
            2.0 * operations * step.logits(1),
            step.logits(element) if case.kernel == "scan" else 0.0,
        )
        for step in STEPS
        if operations
    ]


def is_main(case: Case) -> bool:
    """The table shows forms without masks and without aligned rows, eight parts of eight beams."""
    constants = dict(case.constants)
    if case.dtype == "fp16" or constants["MASKED"] or constants.get("ALIGNED") or constants.get("MASK_FIRST"):
        return False
    return constants.get("PARTS", 8) == 8 and constants.get("BEAMS", 8) == 8 and constants.get("NORMALIZE", True)
