"""Every Triton kernel of distillation compiled for GPUs that are not here: no spill, no excess, matrix units in use."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import gpu_bounds
from benchmarks.distillation import gpu_bounds as gpu_bounds_distillation


def check(cases):
    assert cases
    found = gpu_bounds.all_faults(cases)
    assert not found, "\n".join(found)


def is_plain(case) -> bool:
    return case.dtype == "bf16" and gpu_bounds_distillation.is_main(case)


def test_plain_kernels():
    check([case for case in gpu_bounds_distillation.cases() if is_plain(case)])


@pytest.mark.slow
def test_every_configuration():
    check([case for case in gpu_bounds.heaviest(gpu_bounds_distillation.cases()) if not is_plain(case)])
