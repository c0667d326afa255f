"""The Triton kernels of divided_attention compiled for GPUs that are not here: no spill, no excess, matrix units."""

import dataclasses
import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import gpu_bounds
from benchmarks.divided_attention import gpu_bounds as gpu_bounds_divided_attention


def check(cases):
    assert cases
    found = gpu_bounds.all_faults(cases)
    assert not found, "\n".join(found)


def head_of(case) -> int:
    constants = dict(case.constants)
    return constants.get("BLOCK_K", constants.get("HEAD"))


def is_plain(case) -> bool:
    """What TimeSformer runs: bf16, heads of 64, neither mask nor dropout."""
    return gpu_bounds_divided_attention.is_main(case) and case.dtype == "bf16" and case.has_dot


def test_plain_kernels():
    check([case for case in gpu_bounds_divided_attention.cases() if is_plain(case)])


@pytest.mark.slow
def test_every_configuration():
    """The heaviest form of each tile. fp16 takes what bf16 does, with instructions of other names: a sample of it."""
    cases = gpu_bounds_divided_attention.cases()
    heaviest = [case for case in gpu_bounds.heaviest(cases) if case.dtype != "fp16" and not is_plain(case)]
    sample = [
        case
        for case in cases
        if case.dtype == "fp16" and case.kernel in ("packed_backward", "grad_keys", "merge") and head_of(case) == 128
    ]
    check(heaviest + [case for case in sample if dict(case.constants).get("MASKED", True)])


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
    assert kernels == {*configs.Config._fields, "cls_sums", "merge"}


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
