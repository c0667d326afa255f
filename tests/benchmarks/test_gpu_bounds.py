"""Which compiled forms may ship."""

import dataclasses

import pytest

pytest.importorskip("triton")

from benchmarks import gpu_bounds, gpu_sweep, registry
from benchmarks.harness.gpu_forms import Case, Compiled


def a_case(gpu: str, precision: str, has_dot: bool = True) -> Case:
    return Case("info_nce", "forward_kernel", gpu, precision, "fp32", (("BLOCK_M", 64),), 8, 2, has_dot=has_dot)


def compiled(spilled: int) -> Compiled:
    return Compiled(
        registers=128, spilled=spilled, shared=1 << 14, tensor_memory=0, matrix_instructions=1, tf32_instructions=0,
        blocks=2, occupancy=0.25,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "most"),
    [
        (a_case("sm_90", "half"), 0),
        (a_case("sm_90", "tf32x3"), 0),
        (a_case("sm_90", "ieee"), 96),
        (a_case("sm_90", "ieee", has_dot=False), 0),
        (a_case("gfx942", "ieee"), 0),  # its matrix cores multiply float32
    ],
)
def test_how_much_a_form_may_spill(case, most):
    """Only products without matrix units may, and little."""
    assert not gpu_bounds.faults(case, compiled(most))
    assert "spills" in gpu_bounds.faults(case, compiled(most + 4))[0]


def test_a_target_without_tables_takes_those_of_the_family_that_serves_it():
    found = registry.forms("siglip", ["sm_89", "gfx942"])
    served = [case for case in found if case.gpu == "sm_89"]
    assert [dataclasses.replace(case, gpu="sm_80") for case in served] == registry.forms("siglip", ["sm_80"])
    assert {case.gpu for case in found} == {"sm_89", "gfx942"}
    small = dataclasses.replace(compiled(0), shared=100 << 10)
    assert "the limit is 101376" in gpu_bounds.faults(served[0], small)[0]


@pytest.mark.slow
@pytest.mark.parametrize("op", registry.FOLDERS)
def test_the_main_forms_run_on_an_rtx_4090(op):
    """ptxas gives registers anew for each chip, so that sm_80's tiles may spill on sm_89: one does, little."""
    main = registry.gpu_bounds(op).is_main
    for case in registry.forms(op, ["sm_89"]):
        if main(dataclasses.replace(case, gpu="sm_80")) and case.dtype == "bf16":
            found = gpu_bounds.faults(case, gpu_bounds.compile_case(case))
            found = [fault for fault in found if case.kernel != "distillation_forward_kernel" or "spills" not in fault]
            assert not found, f"{case.name}: {found}"


def test_a_sweep_varies_what_a_form_has_and_keeps_its_sums_in_registers():
    case = Case("info_nce", "forward_kernel", "sm_90", "half", "bf16", (("BLOCK_M", 64), ("BLOCK_N", 128)), 8, 3)
    changes = gpu_sweep.values(["BLOCK_M=64,128", "BLOCK_N=256", "num_warps=4,8", "BLOCK_K=32", "num_stages=4"])
    found = [
        (dict(v.constants)["BLOCK_M"], dict(v.constants)["BLOCK_N"], v.num_warps, v.num_stages)
        for v in gpu_sweep.variants(case, changes)
    ]
    # 128 x 256 would be 256 sums a thread of four warps, and the form has no BLOCK_K.
    assert found == [(64, 256, 4, 4), (64, 256, 8, 4), (128, 256, 8, 4)]
    assert list(gpu_sweep.variants(case, {})) == [case]
