"""Check the GPU kernels on the GPU of this machine: parity, speed and memory against what users run today.

    python -m benchmarks.gpu_check [OP ...] [--out runs/gpu_check] [--quick] [--seconds 540]
    python -m benchmarks.gpu_check --tune [OP ...] [--tiles FILE]

Needs the repository (parity runs the cases of the tests) with torch, Triton, numpy and pytest, and installs nothing.
Four parts, one after the other: the GPU's ceilings; parity, which compiles every kernel it meets, in several processes;
speed and memory against eager PyTorch, torch.compile of it, and what else users run, where it is installed; Nsight
Compute's figures, where `ncu` is. Every row is in OUT/rows.jsonl as soon as it is measured: run the same command again
to go on where the time, or a fault, ended it. OUT/report.md is made from the rows. Without a GPU it says so and ends
well. --tune looks for faster tiles instead (benchmarks/gpu_tune.py), and leaves them where mmkernels takes them from.
"""

import argparse
import functools
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_kernels, gpu_tune, registry
from benchmarks.harness import gpu_machine, gpu_runs, ncu
from benchmarks.harness.gpu_workers import run_tasks
from benchmarks.harness.row_log import RowLog
from benchmarks.harness.tables import Row, Table
from benchmarks.registry import FOLDERS

PARTS = ("ceilings", "parity", "speed", "ncu")
MOST_PROCESSES = 8  # each has a GPU context of half a GB
_EXPECTED = (
    "bound us: the least time by the datasheet of the best-known chip of this kind; predicted us: the issue model's, "
    "of the machine code that ran. Both are of one pass of the kernel's forms over the whole problem, without launches."
)
# What a row is filed under; the rest are its columns.
FILED = ("task", "op", "kernels")


class Task(NamedTuple):
    """What one process does at a time."""

    part: str
    op: str = ""
    dtype: str = ""
    number: int = 0  # of the case or the size: two cases may read alike
    what: Any = None

    @property
    def name(self) -> str:
        what = "" if self.what is None else f"{self.number}: {self.what}"
        return " ".join(filter(None, (self.part, self.op, self.dtype, what)))


def tasks(part: str, ops: Sequence[str], dtypes: Sequence[torch.dtype], quick: bool) -> Iterator[Task]:
    """The tasks of one part; what users run most comes first."""
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    if part == "ceilings":
        yield Task(part)
    elif part in ("parity", "speed"):
        for dtype in names:
            for op in ops:
                check = registry.gpu_check(op)
                every = check.CASES if part == "parity" else check.QUICK if quick else check.SIZES
                yield from (Task(part, op, dtype, number, what) for number, what in enumerate(every))
    elif ncu.command() is not None:
        yield from (Task(part, op, names[0]) for op in ops)


def rows_of(task: Task, device: torch.device) -> Iterable[Row]:
    if task.part == "ceilings":
        return gpu_machine.ceilings(device)
    dtype = getattr(torch, task.dtype)
    if task.part == "ncu":
        return ncu.kernels(task.op, dtype)
    check = registry.gpu_check(task.op)
    if task.part == "parity":
        return [gpu_runs.parity(task.what, check.check, dtype, device)]
    kernels = functools.partial(gpu_kernels.times, task.op, task.what, dtype, device)
    return gpu_runs.contest_rows(check.contest, task.what, dtype, device, kernels)


def run(log: RowLog, device: torch.device, task: Task) -> bool:
    """Measure the rows of a task; whether the GPU still answers this process."""
    for row in rows_of(task, device):
        log.add({"task": task.name, "op": task.op} | row)
        show(row)
    if not gpu_runs.healthy(device):
        return False
    log.add({"task": task.name, "ended": True})
    return True


def written(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def show(row: Row) -> None:
    cells = (f"{key} {written(value)}" for key, value in row.items() if key not in FILED)
    print("  " + ", ".join(cells), flush=True)


def check_all(log: RowLog, chosen: argparse.Namespace, device: torch.device, deadline: float) -> int:
    """Run what the log does not have yet, until the deadline; how many tasks are left."""
    dtypes = gpu_runs.DTYPES[:1] if chosen.quick else gpu_runs.DTYPES
    left = 0
    for part in chosen.parts:
        ended = {row["task"] for row in log.rows() if "ended" in row}
        todo = [task for task in tasks(part, chosen.ops, dtypes, chosen.quick) if task.name not in ended]
        print(f"{part}: {len(todo)} to do", flush=True)
        # Only what is not timed may share the GPU.
        processes = chosen.processes if part == "parity" else min(1, chosen.processes)
        for task, died in run_tasks(functools.partial(run, log, device), todo, processes, deadline):
            left -= 1
            if died:  # a fault of ours or of a peer: the rows say which, and it is not tried again
                log.add({"task": task.name, "op": task.op, "dtype": task.dtype, "error": died} | _named(task))
                log.add({"task": task.name, "ended": True})
                print(f"  {task.name}: {died}", flush=True)
        left += len(todo)
        (chosen.out / "report.md").write_text(report(log))
    return left


def _named(task: Task) -> Row:
    """The columns that tell a row of the task."""
    if task.part == "parity":
        return {"case": str(task.what), "verdict": "FAILED: the process died"}
    return {**task.what._asdict(), "peer": "?"} if task.part == "speed" else {}


def latest(rows: Iterable[Row]) -> list[Row]:
    """The rows with columns, without those that were measured again."""
    found: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        if "ended" not in row:
            found[row["task"], row.get("peer"), row.get("kernel"), row.get("ceiling")] = row
    return list(found.values())


def faults(rows: Iterable[Row]) -> list[str]:
    """What is wrong with ours: parity, and speed that could not be measured."""
    found = []
    for row in latest(rows):
        if row.get("verdict", "ok") != "ok":
            found.append(f"{row['task']}: {row['verdict']}")
        elif "error" in row and row.get("peer", "").startswith(("mmkernels", "triton", "cuda", "?")):
            found.append(f"{row['task']}: {row['error']}")
    return found


def table(rows: Sequence[Row]) -> str:
    shown = [{key: value for key, value in row.items() if key not in FILED} for row in rows]
    columns = list(dict.fromkeys(key for row in shown for key in row))
    return Table(columns, [[written(row.get(column, "-")) for column in columns] for row in shown]).markdown()


def report(log: RowLog) -> str:
    """The page: ceilings, then each op's parity, speed, kernels and counters."""
    under, rows = log.under(), latest(log.rows())
    parts = ["# Check of the GPU kernels\n", "".join(f"- {key}: {value}\n" for key, value in under.items())]
    of = {part: [row for row in rows if row["task"].split()[0] == part] for part in PARTS}
    if of["ceilings"]:
        parts += ["## Ceilings\n", table(of["ceilings"])]
    for op in FOLDERS:
        parity, speed, counters = ([row for row in of[part] if row["op"] == op] for part in PARTS[1:])
        if parity:
            parts += [f"## {op}: parity\n", table(parity)]
        if speed:
            failed = sum(row["verdict"] != "ok" for row in parity)
            parts.append(f"## {op}: speed and memory\n")
            if failed:
                parts.append(
                    f"**{failed} of {len(parity)} cases fail parity: these are the times of wrong results.**\n"
                )
            elif not parity:
                parts.append("Parity was not checked.\n")
            parts += [table(speed), f"{registry.gpu_check(op).NOTE}\n"]
            kernels = [{**_size(row), **kernel} for row in speed for kernel in row.get("kernels", ())]
            if kernels:
                parts += [f"## {op}: kernels of one pass of ours\n", table(kernels), f"{_EXPECTED}\n"]
        if counters:
            parts += [f"## {op}: Nsight Compute\n", table(counters)]
    return "\n".join(parts)


def _size(row: Row) -> Row:
    """The columns of a contest that come before its peer."""
    keys = list(row)
    return {key: row[key] for key in keys[: keys.index("peer")] if key not in FILED}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = ", ".join(FOLDERS)
    parser.add_argument("ops", nargs="*", default=list(FOLDERS), metavar="op", help=f"of {every}; default all")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="where the rows and the report go")
    parser.add_argument("--quick", action="store_true", help="bf16 and a few sizes only")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after so many; the rows stay")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default all")
    processes = min(os.cpu_count() or 1, MOST_PROCESSES)
    parser.add_argument("--processes", type=int, default=processes, help="that check parity at once; 0: in this one")
    parser.add_argument("--tune", action="store_true", help="time other tiles, and keep those that are faster")
    parser.add_argument("--tiles", type=Path, help="where --tune writes (default: the user's cache, as it is used)")
    arguments = parser.parse_args()
    unknown = set(arguments.ops) - set(FOLDERS)
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}: expected {every}")
    if not torch.cuda.is_available():
        print("There is no GPU that torch can see here, so there is nothing to check. Run this where there is one.")
        print("The kernels' parity in the interpreter and their compile check: pytest tests -k 'triton or compile'")
        return
    deadline = time.monotonic() + arguments.seconds
    device = torch.device("cuda", torch.cuda.current_device())
    if arguments.tune:
        gpu_tune.main(arguments, device, deadline)
        return
    under = gpu_machine.description(device)
    print(", ".join(f"{key} {value}" for key, value in under.items()))
    log = RowLog(arguments.out / "rows.jsonl")
    if (aside := log.begin(under)) is not None:
        print(f"{log.path} was measured under something else: it is {aside} now")
    left = check_all(log, arguments, device, deadline)
    print(f"written: {arguments.out / 'report.md'}")
    if left:
        print(f"The time is over, {left} tasks are left: run the same command again to go on.")
    if found := faults(log.rows()):
        raise SystemExit("\n".join([f"{len(found)} faults:", *found]))


if __name__ == "__main__":
    main()
