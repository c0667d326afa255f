"""What the reports of all ops do on a CPU: time ours by turns with its peers, and compare with the cores' limit."""

from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import torch

from benchmarks.harness.peak import cpu_peak
from benchmarks.harness.tables import Row
from benchmarks.harness.timing import interleaved, median
from mmkernels.testing import peak_allocated


def timed(
    calls: Mapping[str, Callable[[], Any]],
    name: str,
    *,
    seconds: float,
    least: int,
    most: int = 50,
    skip: Container[str] = (),
) -> list[Row]:
    """A row for each call: what it is called, under the key `name`, and its seconds.

    A row is marked `once` where its call was so much slower than the first one that it was not repeated. Calls to
    `skip` get none.
    """
    calls = {call: made for call, made in calls.items() if call not in skip}
    times = interleaved(calls, seconds=seconds, least=least, most=most)
    most_calls = max(map(len, times.values()))
    rows: list[Row] = []
    for call in calls:
        row = {name: call, "seconds": median(times[call]), "best": min(times[call]), "calls": len(times[call])}
        rows.append(row | ({"once": True} if len(times[call]) < most_calls else {}))
    return rows


def measured(
    calls: Mapping[str, Callable[[], Any]],
    name: str,
    dtype: torch.dtype,
    *,
    seconds: float,
    least: int,
    skip: Container[str] = (),
    given: int = 0,
) -> list[Row]:
    """`timed`, with the bytes that a call holds beyond those `given`, and the cores' best rate before and after.

    The bytes take one more call, which a call that is marked `once` is spared.
    """
    peaks = [cpu_peak(dtype) or 0.0 for _ in range(3)]
    rows = timed(calls, name, seconds=seconds, least=least, skip=skip)
    peaks += [cpu_peak(dtype) or 0.0 for _ in range(3)]
    held = [None if "once" in row else peak_allocated(calls[row[name]]) - given for row in rows]
    return [row | {"bytes": count, "peak": max(peaks)} for row, count in zip(rows, held, strict=True)]


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
