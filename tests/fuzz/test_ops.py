"""Drawn calls of every op keep to float64, under every instruction set of this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import mmkernels
from tests.cpu_kernels import needs_library
from tests.fuzz.ops import KINDS, run_cases
from tests.fuzz.wrong_arguments import OPS

CASES = 2000


def test_every_op_is_drawn():
    public = {name for name in mmkernels.__all__ if not isinstance(getattr(mmkernels, name), type)}
    public.remove("contrastive_step")  # it calls the caller's model and loss, and computes nothing
    drawn = {kind.__name__ for kind in KINDS}
    assert public - drawn == {"retrieval_ranks", "retrieval_topk"}  # `retrieval` draws both
    assert public - set(OPS) == {"beam_search"}  # tests/beam_search/spec.py makes its arguments wrong


@needs_library
def test_some_cases(threads):
    assert list(run_cases(range(60))) == []


@pytest.mark.slow
@needs_library
def test_many_cases_under_every_instruction_set():
    result = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "--cases", str(CASES), "--seed", "1000000"],
        cwd=Path(__file__).parents[2],
        env={name: value for name, value in os.environ.items() if name != "MMKERNELS_CPU"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
