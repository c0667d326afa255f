"""The pytest-benchmark suite of every op: for histograms, and comparing with a saved run.

python -m benchmarks.bench [-k "info_nce and bfloat16"] [other options of pytest]
"""

import sys
from typing import Any

import pytest
import torch

from benchmarks import registry
from benchmarks.harness.bench_cases import BenchCase

CASES = [
    pytest.param(folder, case, id=f"{folder}-{case.cell}-{case.who}")
    for folder in registry.FOLDERS
    for case in registry.report(folder).bench_cases()
]


@pytest.mark.parametrize(("folder", "case"), CASES)
def test_op(benchmark: Any, folder: str, case: BenchCase) -> None:
    benchmark.group = f"{folder}, {case.cell}"
    torch.compiler.reset()  # a peer that is compiled for too many sizes would run eagerly
    benchmark.pedantic(case.make(), rounds=case.rounds, warmup_rounds=1)


if __name__ == "__main__":
    raise SystemExit(pytest.main([__file__, *sys.argv[1:]]))
