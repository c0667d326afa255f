"""The check on a GPU without one: its kernels in Triton's interpreter, its tensors on the CPU, its clock replaced.

The interpreter must be chosen before Triton is imported: run plainly, this file runs itself again in a process where it
is.
"""

import argparse
import functools
import os
import time
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch

import mmkernels
from benchmarks import gpu_check, registry
from benchmarks.harness import gpu_machine, gpu_runs, ncu
from benchmarks.harness.gpu_workers import run_tasks
from benchmarks.harness.row_log import RowLog
from tests.cpu_kernels import needs_library
from tests.interpreting import INTERPRETED, run_interpreted

pytest.importorskip("triton")

CPU = torch.device("cpu")
FOREVER = float("inf")


class Size(NamedTuple):
    N: int


class _Event:
    """A clock that goes on by a millisecond whenever it is read."""

    now = 0.0

    def __init__(self, enable_timing):
        pass

    def record(self):
        _Event.now += 1.0
        self.at = _Event.now

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def gpu(monkeypatch):
    """What torch tells of a GPU, told of the CPU; a graph is the call itself."""

    def captured(step):
        return SimpleNamespace(replay=step), step()

    for name, answer in {
        "Event": _Event,
        "synchronize": lambda: None,
        "memory_allocated": lambda: 0,
        "max_memory_allocated": lambda: 3_000_000,
        "reset_peak_memory_stats": lambda: None,
        "clock_rate": lambda: 1755,
        "power_draw": lambda: 700_000,
    }.items():
        monkeypatch.setattr(torch.cuda, name, answer)
    monkeypatch.setattr(gpu_runs, "captured", captured)
    monkeypatch.setattr(gpu_runs, "kernel_times", lambda step: [{"kernel": "k", "launches": 2, "us": 1.5}])
    monkeypatch.setattr(gpu_runs, "gemm_rate", lambda *shape: 1e9)
    monkeypatch.setattr(gpu_runs, "REPEATS", 1)
    monkeypatch.setattr(gpu_machine, "SIDE", 4)
    monkeypatch.setattr(gpu_machine, "COPIED", 1 << 10)
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


# At module level, because a process of its own imports it.
def _task(folder, task):
    if task == "dies":
        os._exit(3)
    if task == "waits":
        time.sleep(60)
    (folder / f"{task} {os.getpid()}").touch()
    return task != "spoils"


if not INTERPRETED:

    def test_the_whole_command_in_the_interpreter() -> None:
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
            if case == "raises":
                raise KeyError("tile")
            return torch.zeros(3), torch.rand(3) if case == "random" else torch.tensor(torch.nan)

        rows = [gpu_runs.parity(case, check, torch.float32, CPU) for case in ("right", "wrong", "random", "raises")]
        assert [row["verdict"] for row in rows] == [
            "ok",
            "FAILED: losses: largest error 1",
            "FAILED: two runs differ",
            "FAILED: KeyError: 'tile'",
        ]

    def test_a_row_of_times(gpu) -> None:
        """Every reading of the clock is a millisecond later: a part takes one, a pass of two parts two."""
        leaf = torch.ones(3, requires_grad=True)
        row = gpu_runs.measure(lambda: (leaf * leaf).sum(), [leaf])
        assert row == {
            "ms": 2.0, "spread ms": 0.0, "forward ms": 1.0, "backward ms": 1.0, "graph ms": 1.0,
            "memory MB": pytest.approx(3.0 - 12e-6), "SM MHz": 1755, "watt": 700.0,
        }  # fmt: skip
        row = gpu_runs.measure(lambda: leaf * leaf, [leaf], backward=False)
        assert row["ms"] == 1.0
        assert "backward ms" not in row

    def test_what_no_graph_can_hold(gpu, monkeypatch) -> None:
        def refuse(step):
            raise RuntimeError("operation not permitted when stream is capturing")

        monkeypatch.setattr(gpu_runs, "captured", refuse)
        leaf = torch.ones(3, requires_grad=True)
        assert gpu_runs.measure(lambda: leaf.sum(), [leaf])["graph ms"] == "not capturable"

    def test_who_fails_has_a_row(gpu) -> None:
        def refuse():
            raise ValueError("no float32")

        def too_large():
            raise torch.cuda.OutOfMemoryError

        def contest(size, dtype, device):
            ours = refuse if size.N == 0 else lambda: torch.zeros(())
            peers = {"mmkernels": ours, "small": refuse, "large": too_large}
            return gpu_runs.Contest(peers, [torch.zeros(1)], lambda seconds: {"GB/s": 1.0}, False)

        of = lambda step: gpu_runs.kernel_times(step)  # noqa: E731
        rows = list(gpu_runs.contest_rows(contest, Size(1), torch.float32, CPU, of))
        assert [row.get("error") for row in rows] == [None, "ValueError: no float32", "out of memory"]
        assert rows[0]["kernels"] == [{"kernel": "k", "launches": 2, "us": 1.5}]
        rows = list(gpu_runs.contest_rows(contest, Size(0), torch.float32, CPU, of))
        filed = [{"task": f"speed op N=0 {i}", "op": "op"} | row for i, row in enumerate(rows)]
        assert gpu_check.faults(filed) == ["speed op N=0 0: ValueError: no float32"]

    def test_a_process_that_dies_takes_no_other_with_it(tmp_path) -> None:
        tasks = ["one", "dies", "spoils", "two", "three"]
        ended = list(run_tasks(functools.partial(_task, tmp_path), tasks, 1, FOREVER))
        assert [end.task for end in ended] == tasks
        assert [end.died for end in ended if end.died] == ["its process ended with code 3"]
        processes = dict(path.name.split() for path in tmp_path.iterdir())
        assert processes["two"] == processes["three"] != processes["spoils"] != processes["one"]

    def test_what_runs_at_the_deadline_is_stopped(tmp_path) -> None:
        began = time.monotonic()
        ended = list(run_tasks(functools.partial(_task, tmp_path), ["one", "waits", "two"], 1, began + 20))
        assert [end.task for end in ended] == ["one"]
        assert time.monotonic() - began < 50

    def test_no_two_tasks_have_one_name() -> None:
        for part in gpu_check.PARTS:
            names = [task.name for task in gpu_check.tasks(part, registry.FOLDERS, gpu_runs.DTYPES, quick=False)]
            assert len(names) == len(set(names))

    def test_the_log_of_rows(tmp_path) -> None:
        log = RowLog(tmp_path / "new" / "rows.jsonl")
        assert log.begin({"GPU": "a"}) is None
        log.add({"task": "t", "ms": 1.0})
        with log.path.open("a") as file:
            file.write('{"task": "u", "m')  # killed here
        assert log.begin({"GPU": "a"}) is None
        assert log.rows() == [{"task": "t", "ms": 1.0}]
        log.add({"task": "v"})
        assert log.rows() == [{"task": "t", "ms": 1.0}, {"task": "v"}]
        aside = log.begin({"GPU": "b"})
        assert '"ms": 1.0' in aside.read_text()
        assert (log.under(), log.rows()) == ({"GPU": "b"}, [])
        assert log.begin({"GPU": "c"}) not in (None, aside)

    def test_what_nsight_compute_prints() -> None:
        metrics = list(ncu.FIGURES.values())
        lines = ["==PROF== Profiling", '"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"']
        lines += [f'"{i}","forward_kernel","{metrics[0]}","%","{value}"' for i, value in enumerate(("20.5", "21.5"))]
        lines += [f'"0","forward_kernel","{metrics[3]}","inst","1,000.5"', f'"0","other","{metrics[1]}","%","n/a"']
        row = {"kernel": "forward_kernel", "launches": 2, "tensor active %": 21.0, "stalled on memory": 1000.5}
        assert ncu.figures("\n".join(lines)) == [row, {"kernel": "other", "launches": 0}]
        assert ncu.figures("==ERROR== ERR_NVGPUCTRPERM") == []

    def test_ncu_that_may_not_count(monkeypatch, tmp_path) -> None:
        fake = tmp_path / "ncu"
        fake.write_text("#!/bin/sh\necho '==ERROR== ERR_NVGPUCTRPERM'\nexit 1\n")
        fake.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert ncu.kernels("siglip", torch.bfloat16) == [{"error": "==ERROR== ERR_NVGPUCTRPERM"}]

else:

    def shrunk(size):
        """A size of the table with no number above 4."""
        return size._replace(**{name: min(x, 4) for name, x in size._asdict().items() if isinstance(x, int)})

    pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

    @pytest.mark.parametrize("op", registry.FOLDERS)
    def test_every_part_and_again(op, gpu, monkeypatch, tmp_path, capsys):
        """The whole check of an op, cut off by the clock and taken up again; the third time nothing is left."""
        check = registry.gpu_check(op)
        if op == "beam_search":  # its library has no CUDA here, and a graph is the call itself
            monkeypatch.setattr(check, "replayed_once", mmkernels.beam_search_step)
        monkeypatch.setattr(check, "CASES", check.CASES[:2])
        monkeypatch.setattr(check, "QUICK", [max(map(shrunk, check.QUICK))])
        monkeypatch.setattr(gpu_runs, "DTYPES", [torch.float32])
        monkeypatch.setattr(gpu_machine, "DTYPES", [torch.float32])
        chosen = argparse.Namespace(
            ops=[op], quick=True, parts=["ceilings", "parity", "speed"], processes=0, out=tmp_path
        )
        log = RowLog(tmp_path / "rows.jsonl")
        log.begin({"GPU": "none"})
        tasks = 1 + len(check.CASES) + len(check.QUICK)
        assert gpu_check.check_all(log, chosen, CPU, time.monotonic() - 1) == tasks
        assert gpu_check.check_all(log, chosen, CPU, FOREVER) == 0
        rows = log.rows()
        assert gpu_check.check_all(log, chosen, CPU, FOREVER) == 0
        assert log.rows() == rows
        assert gpu_check.faults(rows) == []
        text = (tmp_path / "report.md").read_text()
        ours = "triton" if op == "beam_search" else "mmkernels"
        for part in ("## Ceilings", f"## {op}: parity", check.NOTE, f"## {op}: kernels of one pass of ours", ours):
            assert part in text
        assert not any("error" in row for row in rows)
        broken = [row | {"verdict": "FAILED: x"} if "verdict" in row else row for row in rows]
        assert len(gpu_check.faults(broken)) == 2
        log.path.unlink()
        log.begin({"GPU": "none"})
        for row in broken:
            log.add(row)
        assert "2 of 2 cases fail parity" in gpu_check.report(log)
