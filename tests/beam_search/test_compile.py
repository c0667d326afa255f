"""The GPU kernels of beam search compiled for GPUs that are not here: no spill, no excess, no contraction.

Triton's by its own toolchain, CUDA's as the library was built with them.
"""

import dataclasses
import re
import subprocess
from pathlib import Path

import pytest
import torch

from tests.compiling import check, each_form, gpu_bounds, registry

ROOT = Path(__file__).parents[2]
import triton

import mmkernels
from mmkernels import _backends

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
OP = registry.gpu_bounds("beam_search")
FORMS = OP.cases()
HEAVIEST = set(gpu_bounds.heaviest(FORMS))


def is_plain(form) -> bool:
    """float32 without masks, in eight parts."""
    return form.dtype == "fp32" and OP.is_main(form)


@each_form([form for form in FORMS if form in HEAVIEST or is_plain(form)], is_plain)
def test_every_form(form):
    check(form)


def main_form(kernel: str):
    return next(form for form in FORMS if form.gpu == "sm_90" and form.kernel == kernel and is_plain(form))


def contractions(form) -> list[str]:
    """Fused multiply-adds of float32, and what takes subnormals for zero."""
    return re.findall(r"\b(?:fma\.rn\.f32|\w+\.ftz\S*)", gpu_bounds.assembly(form)["ptx"])


@pytest.mark.parametrize("kernel", ["scan", "sum", "merge"])
def test_triton_contracts_nothing(kernel):
    """Each operation is rounded by itself, or the bits differ from the reference's."""
    form = main_form(kernel)
    if kernel == "scan":
        form = dataclasses.replace(form, constants=tuple((dict(form.constants) | {"SUM": True}).items()))
    assert contractions(form) == []


def test_the_check_notices_a_contraction():
    assert contractions(dataclasses.replace(main_form("sum"), options=()))


# The CUDA kernels. ------------------------------------------------------------------------------------------------

needs_cuda = pytest.mark.skipif(
    "CUDA toolkit" in (_backends.unavailable("cuda") or "") or bool(_backends.unavailable("cpu")),
    reason=str(_backends.unavailable("cuda")),
)


def library() -> str:
    return str(next(Path(mmkernels.__file__).parent.glob("_C*.so")))


def tool(name: str, *arguments: str) -> str:
    return subprocess.run([TOOLS / name, *arguments], check=True, capture_output=True, text=True).stdout


def cuda_kernels() -> dict[tuple[str, str], dict[str, int]]:
    """{(architecture, kernel): registers and bytes} of all that the library holds."""
    found, architecture, kernel = {}, "", ""
    for line in tool("cuobjdump", "--dump-resource-usage", library()).splitlines():
        if match := re.search(r"arch = (sm_\d+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\S+):", line):
            kernel = match[1]
        elif "REG:" in line:
            found[architecture, kernel] = {key: int(value) for key, value in re.findall(r"(\w+)(?:\[0\])?:(\d+)", line)}
    return found


@needs_cuda
def test_the_library_has_every_cuda_kernel_without_spills():
    found = cuda_kernels()
    for architecture in ("sm_80", "sm_90", "sm_100"):
        names = [kernel for arch, kernel in found if arch == architecture and "BeamArguments" in kernel]
        assert any("advance_kernel" in kernel for arch, kernel in found if arch == architecture)
        # Three dtypes, masked or not; one merge.
        assert len([name for name in names if "scan_kernel" in name]) == 6
        assert len([name for name in names if "sum_kernel" in name]) == 6
        assert len([name for name in names if "merge_kernel" in name]) == 1
    for name, usage in found.items():
        assert usage["STACK"] == usage["LOCAL"] == 0, (name, usage)
        if "BeamArguments" in name[1]:  # four blocks of 256 threads on a multiprocessor
            assert usage["REG"] <= 64, (name, usage)


@needs_cuda
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_cuda_contracts_nothing(architecture, tmp_path):
    subprocess.run(
        [TOOLS / "cuobjdump", "--extract-elf", "all", library()], cwd=tmp_path, check=True, capture_output=True
    )
    files = [file for file in tmp_path.iterdir() if f".{architecture}." in file.name]
    assert files
    code = "".join(tool("nvdisasm", "-c", str(file)) for file in files)
    assert "REDUX" in code
    assert ("UCGABAR_ARV" in code) == (architecture != "sm_80")  # clusters
    # The exact quotient of advance_kernel's length penalty is made of them.
    exact = "".join(part for part in re.split(r"(?=\.section\s+\.text\.)", code) if "advance_kernel" not in part[:200])
    assert "scan_kernel" in exact
    # nvcc's exact quotients of whole numbers and of float64 look so too, and round nothing of ours.
    exact = re.sub(r"F2I\.FTZ\.U32\.TRUNC\.NTZ|FFMA \w+, RZ, ", "", exact)
    assert not re.findall(r"\bFFMA\S*|\bF\w+\.FTZ\S*", exact)
    assert not re.findall(r"\b(?:STL|LDL)\b", code)


@needs_cuda
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_library_loads_without_a_gpu_and_says_what_is_missing():
    assert _backends.unavailable("cuda") == "no GPU is visible to torch"
    with pytest.raises(RuntimeError, match="cuda: no GPU is visible to torch"):
        mmkernels.beam_search_step(torch.zeros(1, 4), torch.zeros(1, 1), impl="cuda")
