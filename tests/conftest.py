"""What all tests share: a thread for each worker, NaN in fresh memory, Triton's interpreter in a process of its own."""

import os
import shutil
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # there are as many workers as cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.interpreting import INTERPRETED, run_interpreted

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def _fill_empty_with_nan():
    """What a kernel leaves unwritten shows: torch.empty comes filled with NaN."""
    previous = torch.are_deterministic_algorithms_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(previous)
    torch.utils.deterministic.fill_uninitialized_memory = filling


@pytest.fixture
def threads():
    """Sets the number of threads, and at the end what it was."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def source(tmp_path):
    """A copy of the sources in a folder named mmkernels, without what was built."""
    clone = tmp_path / "mmkernels"
    clone.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    for name in ("csrc", "mmkernels"):
        shutil.copytree(ROOT / name, clone / name, ignore=shutil.ignore_patterns("_C*", "__pycache__"))
    return clone


class InTheInterpreter(pytest.Item):
    """The tests of a file that are slow, or those that are not, in a process that runs Triton's interpreter."""

    def runtest(self) -> None:
        pytest.importorskip("triton")
        run_interpreted(self.path, "-m", "slow" if self.get_closest_marker("slow") else "not slow")

    def reportinfo(self) -> tuple[os.PathLike[str], None, str]:
        return self.path, None, self.name


class KernelsInTheInterpreter(pytest.File):
    def collect(self) -> list[pytest.Item]:
        fast, slow = (InTheInterpreter.from_parent(self, name=name) for name in ("fast_cases", "slow_cases"))
        slow.add_marker(pytest.mark.slow)
        return [fast, slow]


def pytest_pycollect_makemodule(module_path, parent) -> pytest.File | None:
    """The interpreter must be chosen before Triton is imported: a process that has not imports none of these files."""
    if module_path.name in ("test_triton.py", "test_chunked.py") and not INTERPRETED:
        return KernelsInTheInterpreter.from_parent(parent, path=module_path)
    return None
