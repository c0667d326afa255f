"""What the reports of all ops do on a CPU: time ours by turns with its peers, and compare with the cores' limit."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.harness.peak import cpu_peak
from benchmarks.harness.tables import Row
from benchmarks.harness.timing import interleaved, median
from mmkernels.testing import peak_allocated


def timed(
    calls: Mapping[str, Callable[[], Any]], name: str, *, seconds: float, least: int, most: int = 50
) -> list[Row]:
    """A row for each call: what it is called, under the key `name`, and its seconds."""
    times = interleaved(calls, seconds=seconds, least=least, most=most)
    return [
        {name: call, "seconds": median(times[call]), "best": min(times[call]), "calls": len(times[call])}
        for call in calls
    ]


def measured(
    calls: Mapping[str, Callable[[], Any]], name: str, dtype: torch.dtype, *, seconds: float, least: int, given: int = 0
) -> list[Row]:
    """`timed`, with the bytes that a call holds beyond those `given`, and the cores' best rate before and after."""
    peaks = [cpu_peak(dtype) or 0.0 for _ in range(3)]
    rows = timed(calls, name, seconds=seconds, least=least)
    peaks += [cpu_peak(dtype) or 0.0 for _ in range(3)]
    return [row | {"bytes": peak_allocated(calls[row[name]]) - given, "peak": max(peaks)} for row in rows]


def best_peaks(results: Sequence[Row]) -> dict[str, float]:
    """The best rate that the cores showed in this run, for each dtype."""
    peaks: dict[str, float] = {}
    for row in results:
        peaks[row["dtype"]] = max(row["peak"], peaks.get(row["dtype"], 0.0))
    return peaks


def add_limits(results: Sequence[Row], flops: Callable[[Row], float]) -> None:
    """Adds to each row its limit, the seconds that its FLOPs take at the cores' best rate, and the share that this is
    of its time."""
    peaks = best_peaks(results)
    for row in results:
        if peaks[row["dtype"]] > 0:  # else the rate could not be measured
            row["limit"] = flops(row) / peaks[row["dtype"]]
            row["share_of_limit"] = row["limit"] / row["seconds"]
