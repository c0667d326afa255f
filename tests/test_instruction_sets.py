"""Every op's cases under the instruction sets that this machine would not choose by itself, on two threads."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.beam_search import cases as beam_search
from tests.cpu_kernels import DTYPES, needs_library
from tests.distillation import cases as distillation
from tests.divided_attention import cases as divided_attention
from tests.info_nce import cases as info_nce
from tests.linear_cross_entropy import cases as linear_cross_entropy
from tests.retrieval import cases as retrieval
from tests.siglip import cases as siglip
from tests.triplet import cases as triplet

# An op, and of how many of its cases one is taken: under AVX, and of the portable code, which is slower.
OPS = [
    (info_nce, 1, 3),
    (distillation, 1, 3),
    (siglip, 1, 3),
    (linear_cross_entropy, 1, 3),
    (retrieval, 2, 4),
    (divided_attention, 3, 3),
    (beam_search, 1, 1),
]


def checks(portable: bool) -> Iterator[tuple]:
    """A function that holds a case to its budget, the case, what follows its dtype."""
    for op, of_avx, of_portable in OPS:
        for case in op.CASES[:: of_portable if portable else of_avx]:
            yield op.check_case, case, "cpu"
    for case in triplet.cases()[:: 5 if portable else 2]:
        yield triplet.check_case, case, "cpu"
    for case in triplet.IN_ONE_PASS:
        yield triplet.check_case, case, "cpu", "mean"


def check_every_op(portable: bool) -> None:
    for check, case, *arguments in checks(portable):
        for dtype in DTYPES:
            check(case, dtype, *arguments)
    print(torch.ops.mmkernels.cpu_variant())


@pytest.mark.parametrize("variant", ["avx512", "avx2", "portable"])
@needs_library
def test_every_op(variant):
    if torch.ops.mmkernels.cpu_variant() == variant:
        pytest.skip("the other tests run it")
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
    if "this machine has no" in result.stderr:
        pytest.skip(f"this machine has no {variant}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == variant
