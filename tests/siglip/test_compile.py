"""Every Triton kernel of siglip that info_nce does not have, compiled for GPUs that are not here."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import gpu_bounds
from benchmarks.siglip import gpu_bounds as gpu_bounds_siglip


def check(cases):
    assert cases
    found = gpu_bounds.all_faults(cases)
    assert not found, "\n".join(found)


def is_plain(case) -> bool:
    """bf16, the pass over the queries that makes all."""
    constants = dict(case.constants)
    return case.dtype == "bf16" and constants["LOSSES"] and constants["SUMS"] and constants["STORE"]


def test_plain_kernels():
    check([case for case in gpu_bounds_siglip.cases() if is_plain(case)])


@pytest.mark.slow
def test_every_configuration():
    check([case for case in gpu_bounds_siglip.cases() if not is_plain(case)])
