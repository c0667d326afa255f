"""Interleaved timing: every candidate in turn, round after round, so that a noisy machine is noisy for all."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch


def interleaved(
    candidates: Mapping[str, Callable[[], Any]], *, seconds: float = 10.0, least: int = 3, most: int = 50
) -> dict[str, list[float]]:
    """Seconds of each call of each candidate, after one call of each that does not count.

    Rounds go on until `seconds` have passed, but there are at least `least` and at most `most`.
    """
    for call in candidates.values():
        call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    for turn in range(most):
        if turn >= least and time.perf_counter() - start > seconds:
            break
        for name, call in candidates.items():
            before = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - before)
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
