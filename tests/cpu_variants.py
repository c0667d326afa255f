"""What the tests of the CPU kernels share: the dtypes, the mark of tests that need the library, and its variants."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmkernels import _backends

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The variants that this machine would not choose by itself.
VARIANTS = ["avx512", "avx2", "portable"]
needs_library = pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason="no compiled library")


def run_in_variant(variant: str, code: str) -> None:
    """Run code in a process of its own whose kernels are those of one instruction set."""
    result = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport torch\nprint(torch.ops.mmkernels.cpu_variant())"],
        env={**os.environ, "MMKERNELS_CPU": variant, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    if "this machine has no" in result.stderr:
        pytest.skip(f"this machine has no {variant}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == variant


def check_cases_in_variant(variant: str, module: str, cases: str = "CASES", arguments: str = "'cpu'") -> None:
    """Hold `check_case(case, dtype, *arguments)` of a module of cases to every dtype under one instruction set."""
    run_in_variant(
        variant,
        f"import torch, {module} as c\n"
        f"for case in c.{cases}:\n"
        "    for dtype in (torch.float32, torch.bfloat16, torch.float16):\n"
        f"        c.check_case(case, dtype, {arguments})",
    )
