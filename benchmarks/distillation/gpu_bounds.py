"""The compiled forms of distillation's Triton kernels, for gpu_bounds; the products over strips are info_nce's."""

import functools
import itertools
from collections.abc import Iterable
from typing import Any

from benchmarks.harness.gpu_forms import GPUS, Argument, Case, Problem
from benchmarks.info_nce.gpu_bounds import argument as plain_argument
from benchmarks.info_nce.gpu_bounds import case, steps_of
from mmkernels._tiles.configs import DISTILLATION_CONFIGS, strip_flags
from mmkernels._tiles.launch import MERGE_BLOCK
from mmkernels.distillation import triton_kernels as distillation
from mmkernels.distillation.triton_kernels import forward, gradient

GROWING = {"SYMMETRIC"}
_MULTIPLES_OF_16 = {"TEACHER_D", "stride_tq", "stride_tk"}
_FEATURES = {"teacher_queries", "teacher_keys"}


def cases(gpus: Iterable[str] = GPUS) -> list[Case]:
    """Every form that a launcher can ask for on these GPUs."""
    found = []
    for gpu in gpus:
        for precision, config in DISTILLATION_CONFIGS[gpu].items():
            for dtype, symmetric in itertools.product(
                ("bf16", "fp16") if precision == "half" else ("fp32",), (False, True)
            ):
                make = functools.partial(case, "distillation", gpu, precision, dtype)
                flags = {"SYMMETRIC": symmetric, **distillation.forward_flags(config.forward, gpu)}
                found.append(make("distillation_forward_kernel", config.forward, **flags))
                flags = {"SYMMETRIC": symmetric, **strip_flags(gpu)}
                found.append(make("distillation_grad_kernel", config.grad_logits, **flags))
                if precision == "ieee":  # it sees float32 alone
                    flags = {"SYMMETRIC": symmetric, "BLOCK": MERGE_BLOCK}
                    found.append(make("finish_distillation_kernel", None, **flags))
                block = {"BLOCK_M": config.grad_logits.block_m, "BLOCK_N": config.grad_logits.block_n}
                if dtype != "fp16":  # it sees float32 alone
                    found.append(make("distillation_factors_kernel", None, SYMMETRIC=symmetric, **block))
    return found


def kernel(name: str) -> Any:
    return next(found for module in (forward, gradient) if (found := getattr(module, name, None)))


def argument(case: Case, name: str) -> Argument:
    if name in _MULTIPLES_OF_16:
        return Argument("i32", True)
    return Argument("*" + case.dtype, True) if name in _FEATURES else plain_argument(case, name)


def problems(case: Case, rows: int = 32768, features: int = 512) -> list[Problem]:
    """One kernel over a whole [rows, rows] problem, one side; the teacher's features as wide as the student's."""
    element = {"bf16": 2, "fp16": 2, "fp32": 4}[case.dtype]
    flops, inputs = 4.0 * rows * rows * features, 4.0 * rows * features * element
    if case.kernel == "finish_distillation_kernel":
        flops, inputs = 64.0 * 2 * rows, 32 * 5 * 4.0 * 2 * rows
    if case.kernel == "distillation_factors_kernel":
        flops, inputs = 32.0 * 2 * rows, 16 * 4.0 * rows
    if case.kernel == "distillation_grad_kernel":
        inputs += float(rows) * rows * element
    return [Problem(f"{rows} x {features}", flops, inputs, steps_of(case, rows, features))]


def is_main(case: Case) -> bool:
    """The loss that users run most: symmetric."""
    return case.dtype != "fp16" and dict(case.constants)["SYMMETRIC"]
