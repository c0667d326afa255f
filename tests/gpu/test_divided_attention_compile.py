"""The Triton kernels of divided_attention compiled for GPUs that are not here: no spill, no excess, matrix units."""

import dataclasses
import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks import gpu_bounds, gpu_bounds_divided_attention


def check(cases):
    assert cases
    found = gpu_bounds.all_faults(cases)
    assert not found, "\n".join(found)


def head_of(case) -> int:
    constants = dict(case.constants)
    return constants.get("BLOCK_K", constants.get("HEAD"))


@pytest.mark.parametrize("gpu", gpu_bounds.GPUS)
def test_plain_kernels(gpu):
    """What TimeSformer runs: bf16, heads of 64, neither mask nor dropout."""
    cases = gpu_bounds_divided_attention.cases([gpu])
    check([case for case in cases if gpu_bounds_divided_attention.is_main(case) and case.dtype == "bf16"])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("gpu", gpu_bounds.GPUS)
def test_every_configuration(gpu, dtype):
    check([case for case in gpu_bounds_divided_attention.cases([gpu]) if case.dtype == dtype])


def test_forms_follow_the_launchers():
    """A form that the launchers ask for and the list lacks would ship unseen."""
    from mmkernels.divided_attention.triton_kernels import configs

    cases = gpu_bounds_divided_attention.cases(["sm_90"])
    for (precision, masked), table in configs.CONFIGS["sm_90"].items():
        for tiles in table.values():
            for name, tile in tiles._asdict().items():
                asked = configs.launch_options(tile) | {"MASKED": masked}
                listed = [
                    dict(case.constants) | {"num_warps": case.num_warps, "num_stages": case.num_stages}
                    for case in cases
                    if (case.kernel, case.precision) == (name, precision)
                ]
                assert any(asked.items() <= form.items() for form in listed), (name, asked)
    kernels = {case.kernel for case in cases}
    assert kernels == {*configs.Config._fields, "merge"}


def test_packed_tiles_fit_together():
    """A packed tile is square, and both passes split sequences into the same groups."""
    from mmkernels.divided_attention.triton_kernels import configs

    for tables in configs.CONFIGS.values():
        for table in tables.values():
            for tiles in table.values():
                forward, backward = tiles.packed_forward, tiles.packed_backward
                assert forward.block_m == forward.block_n == backward.block_m == backward.block_n


def case_of(kernel: str, gpu: str, dtype: str = "bf16"):
    return next(
        case
        for case in gpu_bounds_divided_attention.cases([gpu])
        if (case.kernel, case.dtype) == (kernel, dtype) and head_of(case) == 64
    )


def test_the_check_notices_a_spill():
    case = dataclasses.replace(case_of("grad_keys", "sm_80"), num_warps=1)
    assert any("spills" in fault for fault in gpu_bounds.faults(case, gpu_bounds.compile_case(case)))


def test_the_check_notices_idle_matrix_units():
    """float32 as IEEE asks runs on none of NVIDIA's; the same kernel said to need them is at fault."""
    case = case_of("packed_forward", "sm_90", "fp32")
    compiled = gpu_bounds.compile_case(case)
    assert gpu_bounds.faults(case, compiled) == []
    asked = dataclasses.replace(case, precision="half")
    assert any("matrix units" in fault for fault in gpu_bounds.faults(asked, compiled))
