"""Four figures of every kernel of one step from Nsight Compute, where its command is installed.

    ncu ... python -m benchmarks.harness.ncu OP DTYPE

runs the step: the first size of the op's contests that is quick, our call alone.
"""

import csv
import shutil
import statistics
import subprocess
import sys

import torch

from benchmarks import registry
from benchmarks.harness.gpu_runs import one_pass
from benchmarks.harness.tables import Row

# The columns and what Nsight Compute calls them.
FIGURES = {
    "tensor active %": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "issue active %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "stalled at a barrier": "smsp__average_warps_issue_stalled_barrier_per_issue_active.ratio",
    "stalled on memory": "smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",
}
_SECONDS = 180  # Nsight runs every kernel several times


def command() -> str | None:
    return shutil.which("ncu")


def kernels(op: str, dtype: torch.dtype) -> list[Row]:
    """A row for each kernel of a step: how often it ran, and the means of its figures; or one that says why not."""
    name = str(dtype).removeprefix("torch.")
    run = [sys.executable, "-m", "benchmarks.harness.ncu", op, name]
    options = [
        "--csv",
        "--clock-control",
        "none",
        "--profile-from-start",
        "off",
        "--metrics",
        ",".join(FIGURES.values()),
    ]
    try:
        output = subprocess.run(["ncu", *options, *run], capture_output=True, text=True, timeout=_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return [{"error": f"ncu took more than {_SECONDS} s"}]
    rows = figures(output.stdout)
    said = [line for line in (output.stdout + output.stderr).splitlines() if "ERROR" in line]
    return rows or [{"error": said[0] if said else f"ncu ended with code {output.returncode}"}]


def figures(report: str) -> list[Row]:
    """The rows of Nsight Compute's CSV, which begins after lines of its own and of the program."""
    lines = report.splitlines()
    head = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, list[float]]] = {}
    for line in csv.DictReader(lines[head:]):
        metrics = found.setdefault(line["Kernel Name"], {})
        try:
            value = float(line["Metric Value"].replace(",", ""))
        except ValueError:
            continue  # n/a: this GPU has no such counter
        metrics.setdefault(line["Metric Name"], []).append(value)
    rows = []
    for kernel, metrics in found.items():
        row: Row = {"kernel": kernel, "launches": max(map(len, metrics.values()), default=0)}
        row |= {head: statistics.mean(metrics[name]) for head, name in FIGURES.items() if name in metrics}
        rows.append(row)
    return rows


def main(op: str, dtype: str) -> None:
    check = registry.gpu_check(op)
    peers, leaves, _, backward = check.contest(check.QUICK[0], getattr(torch, dtype), torch.device("cuda"))
    step = one_pass(next(iter(peers.values())), leaves, backward)
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    step()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


if __name__ == "__main__":
    main(*sys.argv[1:])
