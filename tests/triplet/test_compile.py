"""Every Triton kernel of triplet compiled for GPUs that are not here: no spill, no excess, matrix units in use."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import gpu_bounds
from benchmarks.triplet import gpu_bounds as gpu_bounds_triplet


def check(cases):
    assert cases
    found = gpu_bounds.all_faults(cases)
    assert not found, "\n".join(found)


def is_plain(case) -> bool:
    """bf16, both directions."""
    return case.dtype == "bf16" and case.has_dot and dict(case.constants).get("SYMMETRIC", True)


def test_plain_kernels():
    check([case for case in gpu_bounds.heaviest(gpu_bounds_triplet.cases()) if is_plain(case)])


@pytest.mark.slow
def test_every_configuration():
    check([case for case in gpu_bounds_triplet.cases() if not is_plain(case)])
