"""The compile check itself: it notices what it must, and the check of a GPU passes where there is none."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compiling import gpu_bounds, registry

ROOT = Path(__file__).parents[2]


def plain_form(kernel: str, gpu: str, precision: str, **constants):
    """Symmetric and without groups, with other constants if any are given."""
    form = next(
        form
        for form in registry.gpu_bounds("info_nce").cases([gpu])
        if form.kernel == kernel
        and form.precision == precision
        and dict(form.constants).get("SYMMETRIC", True)
        and not dict(form.constants).get("GROUPS", False)
    )
    return dataclasses.replace(form, constants=tuple((dict(form.constants) | constants).items()))


def assert_noticed(form, fault: str) -> None:
    assert any(fault in found for found in gpu_bounds.faults(form, gpu_bounds.compile_case(form)))


@pytest.mark.parametrize("gpu", [gpu for gpu in gpu_bounds.GPUS if gpu.startswith("sm_")])
def test_tf32(gpu):
    assert_noticed(plain_form("product_kernel", gpu, "ieee", PRECISION="tf32"), "TF32")


def test_a_spill():
    form = plain_form("product_kernel", "sm_80", "ieee")
    assert_noticed(dataclasses.replace(form, options=(*form.options, ("maxnreg", 32))), "spills")


def test_shared_memory():
    form = plain_form("product_kernel", "sm_90", "half", BLOCK_K=128)
    assert_noticed(dataclasses.replace(form, num_stages=8), "shared memory")


def test_idle_matrix_units():
    """float32 as IEEE asks runs on none of NVIDIA's; the same kernel said to need them is at fault."""
    form = plain_form("product_kernel", "sm_80", "ieee")
    compiled = gpu_bounds.compile_case(form)
    assert gpu_bounds.faults(form, compiled) == []
    asked = dataclasses.replace(form, precision="tf32x3")
    assert any("matrix units" in fault for fault in gpu_bounds.faults(asked, compiled))


def test_no_gpu_is_no_error():
    """Where there is no GPU the check of one says so and passes."""
    command = [sys.executable, "-m", "benchmarks.gpu_check"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert "no GPU" in run.stdout
