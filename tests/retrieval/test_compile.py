"""Every Triton kernel of retrieval, compiled for GPUs that are not here."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import gpu_bounds
from benchmarks.retrieval import gpu_bounds as gpu_bounds_retrieval


def check(cases):
    assert cases
    found = gpu_bounds.all_faults(cases)
    assert not found, "\n".join(found)


def is_plain(case) -> bool:
    return case.dtype == "bf16" and case.kernel in ("ranks_kernel", "topk_kernel")


def test_plain_kernels():
    check([case for case in gpu_bounds.heaviest(gpu_bounds_retrieval.cases()) if is_plain(case)])


@pytest.mark.slow
def test_every_configuration():
    plain = {case for case in gpu_bounds.heaviest(gpu_bounds_retrieval.cases()) if is_plain(case)}
    check([case for case in gpu_bounds_retrieval.cases() if case not in plain])
