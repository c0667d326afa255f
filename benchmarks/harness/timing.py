"""Interleaved timing: every candidate in turn, round after round, so that a noisy machine is noisy for all."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

# A candidate that takes more than so many times as long as the first one is not called again: its multiple is clear.
SLOW = 20
# No compiler takes so many seconds: a first call beyond them is a slow call, and counts.
LONGEST_COMPILATION = 30.0
# Times are settled where the middle half of a candidate's calls, seven or more of them in a second or more of rounds,
# lies within so much of their median: that is then known within 1 %.
SETTLED = 0.02
LEAST_CALLS, LEAST_SECONDS = 7, 1.0


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def is_settled(times: list[float]) -> bool:
    """Whether more calls would hardly move the median."""
    if len(times) < LEAST_CALLS:
        return False
    first, middle, third = statistics.quantiles(times, n=4)
    return third - first <= SETTLED * middle


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], *, seconds: float = 10.0, least: int = 3, most: int = 50
) -> dict[str, list[float]]:
    """Seconds of each call of each candidate, after one call of each that does not count.

    Rounds go on until `seconds` have passed or all times are settled; there are at least `least` and at most `most`.
    A candidate that takes more than SLOW times as long as the first one has one time alone.
    """
    first = next(iter(candidates))
    warm = {name: seconds_of(call) for name, call in candidates.items()}
    times: dict[str, list[float]] = {name: [] for name in candidates}

    def is_slow(name: str, time_of_call: float) -> bool:
        return name != first and time_of_call > SLOW * min(times[first])

    start = time.perf_counter()
    for turn in range(most):
        passed = time.perf_counter() - start
        repeated = [of_one for of_one in times.values() if len(of_one) == turn]
        if turn >= least and (passed > seconds or (passed > LEAST_SECONDS and all(map(is_settled, repeated)))):
            break
        for name, call in candidates.items():
            if times[name] and is_slow(name, times[name][0]):
                continue
            is_known = not times[name] and warm[name] > LONGEST_COMPILATION and is_slow(name, warm[name])
            times[name].append(warm[name] if is_known else seconds_of(call))
    return times


def median(times: list[float]) -> float:
    return statistics.median(times)


def bandwidth() -> float:
    """Bytes per second of a copy of 256 MiB; reads and writes count once each."""
    source = torch.ones(1 << 26)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(5):
        before = time.perf_counter()
        target.copy_(source)
        best = min(best, time.perf_counter() - before)
    return 2 * source.nbytes / best
