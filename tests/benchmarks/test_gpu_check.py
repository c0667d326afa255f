"""The check on a GPU without one: its kernels in Triton's interpreter, its tensors on the CPU, its clock replaced.

The interpreter must be chosen before Triton is imported: run plainly, this file runs itself again in a process where it
is.
"""

from typing import NamedTuple

import pytest
import torch

from benchmarks import gpu_check, registry
from benchmarks.harness import gpu_runs
from tests.cpu_kernels import needs_library
from tests.interpreting import INTERPRETED, run_interpreted

pytest.importorskip("triton")

CPU = torch.device("cpu")


class Size(NamedTuple):
    N: int


@pytest.fixture
def clock(monkeypatch):
    """A pass takes a millisecond and a product runs at a FLOP a nanosecond."""

    def measure(forward, leaves, *, repeats, backward=True):
        result = forward()
        if backward:
            assert all(x.isfinite().all() for x in torch.autograd.grad(result.sum(), leaves))
        return {"ms": 1.0}

    monkeypatch.setattr(gpu_runs, "measure", measure)
    monkeypatch.setattr(gpu_runs, "gemm_rate", lambda *shape: 1e9)


if not INTERPRETED:

    def test_the_paths_of_every_op_in_the_interpreter() -> None:
        run_interpreted(__file__)

    @pytest.mark.slow
    @pytest.mark.parametrize("op", registry.FOLDERS)
    @needs_library
    def test_the_larger_cases_hold_on_a_cpu(op) -> None:
        """A case that only a GPU runs may be wrong itself."""
        check = registry.gpu_check(op)
        known = {str(case) for case in check.cases.CASES}
        for case in check.CASES:
            if str(case) not in known:
                check.cases.check_case(case, torch.float32, "cpu")

    def test_a_failure_is_a_row() -> None:
        def check(case, dtype, device):
            if case == "wrong":
                raise AssertionError("losses: largest error 1\nand more")
            return torch.zeros(3), torch.rand(3) if case == "random" else torch.tensor(torch.nan)

        rows = gpu_runs.check_parity(["right", "wrong", "random"], check, CPU, [torch.float32])
        verdicts = [row["verdict"] for row in rows]
        assert verdicts == ["ok", "FAILED: losses: largest error 1", "FAILED: two runs differ"]

    def test_a_peer_may_fail_and_ours_may_not(clock) -> None:
        def refuse():
            raise ValueError("no float32")

        def too_large():
            raise torch.cuda.OutOfMemoryError

        def contest(size, dtype, device):
            ours = refuse if size.N == 0 else too_large
            return gpu_runs.Contest({"mmkernels": ours, "peer": refuse}, [], lambda seconds: {}, False)

        rows = gpu_runs.measure_all([Size(1)], contest, CPU, [torch.float32])
        assert [row["error"] for row in rows] == ["out of memory", "ValueError"]
        with pytest.raises(ValueError, match="no float32"):
            gpu_runs.measure_all([Size(0)], contest, CPU, [torch.float32])

else:

    def shrunk(size):
        """A size of the table with no number above 4."""
        return size._replace(**{name: min(x, 4) for name, x in size._asdict().items() if isinstance(x, int)})

    pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

    @pytest.mark.parametrize("op", registry.FOLDERS)
    def test_parity_and_speed(op, clock, monkeypatch):
        monkeypatch.setattr(torch, "compile", lambda function, **options: function)
        check = registry.gpu_check(op)
        if op == "beam_search":
            monkeypatch.setattr(check, "captured", lambda step: step)
        parity = gpu_runs.check_parity(check.CASES[:3], check.check, CPU, [torch.float32])
        assert [row["verdict"] for row in parity] == ["ok"] * 3
        sizes = sorted({shrunk(size) for size in check.QUICK})
        speed = gpu_runs.measure_all(sizes, check.contest, CPU, [torch.float32])
        assert not any("error" in row for row in speed)
        assert all(set(row) > {*sizes[0]._fields, "dtype", "peer", "ms"} for row in speed)
        assert speed[0]["peer"] == ("triton" if op == "beam_search" else "mmkernels")
        text = gpu_check.report({"GPU": "none"}, {op: {"parity": parity, "speed": speed}})
        assert f"## {op}: speed and memory" in text
        assert check.NOTE in text
