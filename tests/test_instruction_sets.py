"""Every op's cases, and what is not finite, under every instruction set that this machine has, on two threads.

The other tests run under the one that the machine chooses, and under `make test` on one thread.
"""

import importlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests import contract
from tests.cpu_kernels import DTYPES, needs_library
from tests.specs import CALLS

# One of so many of an op's cases is taken: under AVX, and of the portable code, which is slower.
SHARES = {"beam_search": (1, 1), "divided_attention": (3, 3), "retrieval": (2, 4), "triplet": (2, 5)}


def checks(portable: bool) -> Iterator[tuple]:
    """A function that holds a case to its budget, the case, what follows its dtype."""
    for path in sorted(Path(__file__).parent.glob("*/cases.py")):
        op = path.parent.name
        module = importlib.import_module(f"tests.{op}.cases")
        for case in module.CASES[:: SHARES.get(op, (1, 3))[portable]]:
            yield module.check_case, case, "cpu"
        for case in getattr(module, "IN_ONE_PASS", ()):
            yield module.check_case, case, "cpu", "mean"


def check_every_op(portable: bool) -> None:
    for check, case, *arguments in checks(portable):
        for dtype in DTYPES:
            check(case, dtype, *arguments)
    for spec, call in (case.values for case in CALLS):
        for entry in contract.NOT_FINITE:
            contract.check_not_finite(spec, call, "cpu", entry)
    print(torch.ops.mmkernels.cpu_variant())


@pytest.mark.parametrize("variant", ["avx512bf16", "avx512", "avx2", "portable"])
@needs_library
def test_every_op(variant):
    code = f"from tests.test_instruction_sets import check_every_op; check_every_op({variant == 'portable'})"
    result = subprocess.run(
        [sys.executable, "-c", code],
        # Threads that wait do not spin: another worker has the core.
        env={**os.environ, "MMKERNELS_CPU": variant, "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    for lacking in (f"this machine has no {variant}", f"the library was built without {variant}"):
        if lacking in result.stderr:
            pytest.skip(lacking)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == variant
