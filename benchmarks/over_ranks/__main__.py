"""python -m benchmarks.over_ranks            measure on this machine, fit, print, and draw docs/figures/over_ranks.png
python -m benchmarks.over_ranks --kept     the same from the numbers that are there"""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from benchmarks.harness.tables import Row
from benchmarks.over_ranks import report
from benchmarks.over_ranks.measure import fit, measure
from benchmarks.report import NUMBERS, machine_of
from mmkernels import _backends


def main(
    kept: Annotated[bool, typer.Option("--kept", help="Measure nothing: draw what an earlier run measured.")] = False,
    out: Annotated[Path, typer.Option(help="Folder of numbers and figure.")] = NUMBERS,
) -> None:
    """The cost of a loss over ranks: measured by gloo on this machine, and predicted for H100s."""
    console, file = Console(), out / "over_ranks.json"
    if not kept:
        if reason := _backends.unavailable("cpu"):
            raise SystemExit(f"the C++ kernels cannot run here: {reason}")
        machine = machine_of("info_nce") | {"threads": 1}
        file.write_text(json.dumps({"machine": machine, "results": measure()}, indent=1) + "\n")
    found = json.loads(file.read_text())
    results: list[Row] = found["results"]
    for name, table in report.tables(results).items():
        console.print(table.for_screen(name))
    console.print(report.said(fit(results)))
    report.draw(results, found["machine"], out / "over_ranks.png")


if __name__ == "__main__":
    typer.run(main)
