"""The compiled forms of linear_cross_entropy's Triton kernels, for gpu_bounds: info_nce's, with a bias.

Without a bias they are info_nce's of rows alone; the products over strips are the same ones.
"""

import functools
from collections.abc import Iterable

from benchmarks.harness.gpu_forms import GPUS, Case, Problem
from benchmarks.info_nce.gpu_bounds import GROWING, argument, case, kernel, steps_of, tiles_of_logits, work
from mmkernels._tiles.configs import CONFIGS

__all__ = ["GROWING", "argument", "cases", "is_main", "kernel", "problems"]


def cases(gpus: Iterable[str] = GPUS) -> list[Case]:
    """Every form that a launcher can ask for on these GPUs."""
    return [
        form
        for gpu in gpus
        for precision, config in CONFIGS[gpu].items()
        for dtype in (("bf16", "fp16") if precision == "half" else ("fp32",))
        for form in tiles_of_logits(
            functools.partial(case, "linear_cross_entropy", gpu, precision, dtype),
            config,
            SYMMETRIC=False,
            BIAS=True,
            GROUPS=False,
        )
    ]


def problems(case: Case, rows: int = 8192, classes: int = 50257, features: int = 512) -> list[Problem]:
    """One kernel over a whole [rows, classes] problem, one side."""
    return [
        Problem(
            f"{rows} x {classes} x {features}", *work(case, rows, classes, features), steps_of(case, classes, features)
        )
    ]


def is_main(case: Case) -> bool:
    """The loss that users run most: without smoothing."""
    return case.dtype != "fp16" and not dict(case.constants).get("SMOOTHED")
