"""Every Triton kernel of linear_cross_entropy that info_nce does not have, compiled for GPUs that are not here."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import gpu_bounds
from benchmarks.linear_cross_entropy import gpu_bounds as gpu_bounds_linear_cross_entropy


def check(cases):
    assert cases
    found = gpu_bounds.all_faults(cases)
    assert not found, "\n".join(found)


def is_plain(case) -> bool:
    """bf16, without smoothing, the hidden rows' side."""
    constants = dict(case.constants)
    return case.dtype == "bf16" and case.has_dot and not constants.get("SMOOTHED") and not constants.get("OF_KEYS")


def test_plain_kernels():
    check([case for case in gpu_bounds_linear_cross_entropy.cases() if is_plain(case)])


@pytest.mark.slow
def test_every_configuration():
    heaviest = gpu_bounds.heaviest(gpu_bounds_linear_cross_entropy.cases())
    check([case for case in heaviest if not is_plain(case)])
