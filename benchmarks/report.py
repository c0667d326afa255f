"""The comparison with what users run today: tables on the screen, numbers and a figure on disk.

python -m benchmarks.report [OP ...] [--quick | --draw] [--minutes 9] [--out docs/figures]
python -m benchmarks.report --tables    # the marked tables of README.md and docs/ anew from the numbers
"""

import contextlib
import datetime
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: the profiler's own notes

import matplotlib as mpl
import torch
import typer
from rich.console import Console

from benchmarks import registry
from benchmarks.harness import figures, tables
from benchmarks.harness.cpu_cells import Cells
from benchmarks.harness.row_log import checksum
from benchmarks.harness.tables import Row
from benchmarks.over_ranks import report as over_ranks
from benchmarks.registry import FOLDERS
from mmkernels import _backends

mpl.use("Agg")

ROOT = Path(__file__).parents[1]
NUMBERS = Path("docs/figures")
CELLS = Path("runs/report")


def processor() -> str:
    """The CPU's model name where Linux tells it, else its architecture."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def machine_of(op: str) -> dict[str, Any]:
    """What the numbers depend on: the machine, the kernels, torch, the peers and the day."""
    versions = {}
    for package in registry.peers(op).PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # a peer that is not installed has no rows
    return {
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "kernels": torch.ops.mmkernels.cpu_variant(),
        "torch": torch.__version__,
        "peers": versions,
        "date": datetime.date.today().isoformat(),
    }


def read(folder: str, numbers: Path) -> dict[str, Any]:
    """The machine and the results of an earlier run."""
    file = numbers / f"{folder}.json"
    if not file.exists():
        raise FileNotFoundError(f"{file} is not there yet; measure first: python -m benchmarks.report {folder}")
    return json.loads(file.read_text())


def standings(numbers: Path) -> list[tables.Standing]:
    """The rows of the README's table and picture."""
    found = []
    for folder in FOLDERS:
        report, results = registry.report(folder), read(folder, numbers)["results"]
        found += [tables.standing(headline, report.COMPARISON, results) for headline in report.HEADLINES]
    return found


def draw_again(folders: Sequence[str], numbers: Path) -> None:
    """Draw the figures from the numbers of earlier runs."""
    for folder in folders:
        stored = read(folder, numbers)
        registry.report(folder).draw(stored["results"], stored["machine"], numbers / f"{folder}.png")
    if set(folders) == set(FOLDERS):
        figures.front(standings(numbers), read("info_nce", numbers)["machine"], numbers / "front.png")


def blocks(numbers: Path) -> dict[str, str]:
    """What stands between the marks of the pages: {name: Markdown}."""
    found = {"headline": tables.headline_table(standings(numbers)).markdown()}
    machines = {}
    for folder in FOLDERS:
        stored = read(folder, numbers)
        machines[folder] = stored["machine"]
        found[f"{folder} machine"] = tables.provenance(stored["machine"]) + "\n"
        made = registry.report(folder).tables(stored["results"])
        found.update({name: table.markdown() for name, table in made.items()})
    stored = read("over_ranks", numbers)
    found |= over_ranks.blocks(stored["results"], stored["machine"])
    found["headline machine"] = tables.provenances(machines) + "\n"
    return found


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def fill_pages(numbers: Path) -> None:
    """Make the marked tables of the pages anew."""
    made = blocks(numbers)
    for page in pages():
        page.write_text(tables.filled(page.read_text(), made))


def measure_cell(console: Console, op: str, seconds: float, cell: tuple[Any, ...], skip: set[str]) -> list[Row]:
    console.print(f"{op} {' '.join(map(str, cell))}", highlight=False)
    torch.compiler.reset()  # every size is compiled for itself, as in training
    return registry.report(op).measure(*cell, seconds=seconds, skip=skip)


def main(
    ops: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(FOLDERS)}; default: all")] = None,
    quick: Annotated[bool, typer.Option(help="a few small cells, a minute")] = False,
    seconds: Annotated[float, typer.Option(help="the most for a cell, beyond the least number of rounds")] = 10.0,
    minutes: Annotated[float, typer.Option(help="begin no cell after them; the same command goes on")] = float("inf"),
    draw: Annotated[bool, typer.Option(help="draw the figures again from the numbers in the folder")] = False,
    fill: Annotated[bool, typer.Option("--tables", help="make the tables of README.md and docs/ from them")] = False,
    out: Annotated[Path, typer.Option(help="folder of the numbers and the figures")] = NUMBERS,
) -> None:
    """Compare the ops with their peers on this machine's CPU."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    unknown = sorted(set(ops or FOLDERS) - set(FOLDERS))
    if unknown:
        raise typer.BadParameter(f"expected some of {', '.join(FOLDERS)}, got {', '.join(unknown)}")
    if draw:
        draw_again(ops or FOLDERS, out)
    if fill:
        fill_pages(out)
    if draw or fill:
        return
    reason = _backends.unavailable("cpu")
    if reason is not None:
        console.print(f"The CPU kernels cannot run here: {reason}")
        raise typer.Exit(1)
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * minutes
    logs = []
    for op in ops or FOLDERS:
        report, machine = registry.report(op), machine_of(op)
        under = machine | {"sources": checksum(), "seconds": seconds, "date": None}
        cells = Cells(CELLS / f"{op}{'-quick' * quick}.jsonl", under)
        logs.append(cells)
        measure = functools.partial(measure_cell, console, op, seconds)
        results = cells.measure(report.QUICK if quick else report.CELLS, report.COMPARISON.who, measure, deadline)
        if results is None:
            console.print(f"The time is over in the midst of {op}: run the same command again to go on.")
            return
        console.print(f"{op}: all cells took {cells.seconds() / 60:.1f} minutes")
        report.finish(results)
        for name, table in report.tables(results).items():
            if not table.rows:
                continue  # the quick cells fill not every table
            console.print(table.for_screen(f"{name}, CPU, {torch.get_num_threads()} threads"))
        if quick:
            continue
        (out / f"{op}.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
        report.draw(results, machine, out / f"{op}.png")
        console.print(f"Numbers: {out / f'{op}.json'}; figure: {out / f'{op}.png'}")
    for cells in logs:
        cells.close()


if __name__ == "__main__":
    typer.run(main)
