"""Every Triton kernel of info_nce compiled for GPUs that are not here: no spill, no excess, matrix units in use."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

ROOT = Path(__file__).parents[2]
from benchmarks import gpu_bounds
from benchmarks.info_nce import gpu_bounds as gpu_bounds_info_nce


def check(cases):
    assert cases
    found = gpu_bounds.all_faults(cases)
    assert not found, "\n".join(found)


def is_plain(case) -> bool:
    """The loss that users run most: symmetric, without smoothing or groups, bf16."""
    constants = dict(case.constants)
    return (
        case.dtype == "bf16"
        and case.has_dot
        and constants.get("SYMMETRIC", True)
        and not constants.get("SMOOTHED", False)
        and not constants.get("GROUPS", False)
        and not constants.get("OF_KEYS", False)
    )


def test_plain_kernels():
    check([case for case in gpu_bounds_info_nce.cases() if is_plain(case)])


def test_kernels_of_groups():
    check(
        [
            case
            for case in gpu_bounds.heaviest(gpu_bounds_info_nce.cases(["sm_90"]))
            if case.dtype == "bf16" and case.has_dot and dict(case.constants).get("GROUPS", False)
        ]
    )


@pytest.mark.slow
def test_every_configuration():
    check([case for case in gpu_bounds.heaviest(gpu_bounds_info_nce.cases()) if not is_plain(case)])


def case_of(kernel: str, gpu: str, precision: str):
    return next(
        case
        for case in gpu_bounds_info_nce.cases([gpu])
        if case.kernel == kernel
        and case.precision == precision
        and dict(case.constants).get("SYMMETRIC", True)
        and not dict(case.constants).get("GROUPS", False)
    )


def with_constants(case, **constants):
    return dataclasses.replace(case, constants=tuple((dict(case.constants) | constants).items()))


@pytest.mark.parametrize("gpu", ["sm_80", "sm_90", "sm_100"])
def test_the_check_notices_tf32(gpu):
    case = with_constants(case_of("product_kernel", gpu, "ieee"), PRECISION="tf32")
    assert any("TF32" in fault for fault in gpu_bounds.faults(case, gpu_bounds.compile_case(case)))


def test_the_check_notices_a_spill():
    case = dataclasses.replace(case_of("forward_kernel", "sm_80", "half"), num_warps=2)
    assert any("spills" in fault for fault in gpu_bounds.faults(case, gpu_bounds.compile_case(case)))


def test_the_check_notices_shared_memory():
    case = with_constants(dataclasses.replace(case_of("product_kernel", "sm_90", "half"), num_stages=8), BLOCK_K=128)
    assert any("shared memory" in fault for fault in gpu_bounds.faults(case, gpu_bounds.compile_case(case)))


def test_the_check_notices_idle_matrix_units():
    case = case_of("product_kernel", "sm_80", "ieee")
    compiled = gpu_bounds.compile_case(case)
    assert gpu_bounds.faults(case, compiled) == []
    asked = dataclasses.replace(case, precision="tf32x3")
    assert any("matrix units" in fault for fault in gpu_bounds.faults(asked, compiled))


def test_no_gpu_is_no_error():
    """Where there is no GPU the check of one says so and passes."""
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "no GPU" in run.stdout
