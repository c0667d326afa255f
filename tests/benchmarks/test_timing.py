"""Which calls are repeated when candidates are timed by turns."""

import time

import pytest

from benchmarks.harness import cpu_runs, timing
from benchmarks.harness.tables import Comparison


def calls(seconds: dict[str, list[float]], clock: list[float]) -> dict:
    """Calls that take the given seconds one after the other, and the last of them from then on."""

    def call(name: str) -> None:
        left = seconds[name]
        clock[0] += left.pop(0) if len(left) > 1 else left[0]

    return {name: lambda name=name: call(name) for name in seconds}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_a_slow_candidate_is_called_once(clock: list[float]) -> None:
    candidates = {
        "ours": [1.0],
        "near": [19.0],
        "slow": [22.0, 21.0, 1.0],  # the first call does not count
        "slowest": [100.0, 1.0],  # no compiler takes so long: the first call is the one that counts
        "compiled": [25.0, 2.0],
    }
    times = timing.interleaved(calls(candidates, clock), seconds=0, least=3)
    assert times == {
        "ours": [1.0] * 3,
        "near": [19.0] * 3,
        "slow": [21.0],
        "slowest": [100.0],
        "compiled": [2.0] * 3,
    }


def test_a_row_tells_that_its_call_was_made_once(clock: list[float]) -> None:
    made = calls({"mmkernels": [1.0], "slow": [21.0], "near": [3.0]}, clock)
    rows = cpu_runs.timed(made, "loss", seconds=0, least=2)
    assert [row.get("once", False) for row in rows] == [False, True, False]
    comparison = Comparison((), "loss")
    (cell,) = comparison.cells(rows)
    assert comparison.multiple(cell, "slow") == "21.0x, one call"
    assert comparison.multiple(cell, "near") == "3.00x"
