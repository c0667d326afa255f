"""The comparison with what users run today: tables on the screen, numbers and a figure on disk.

python -m benchmarks.report [OP ...] [--quick | --draw] [--out docs/figures]
"""

import datetime
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: the profiler's own notes

import matplotlib as mpl
import torch
import typer
from rich.console import Console
from rich.progress import Progress

from benchmarks import registry
from benchmarks.registry import FOLDERS
from mmkernels import _backends

mpl.use("Agg")


def machine_of(op: str) -> dict[str, Any]:
    """What the numbers depend on: the machine, the kernels, torch, the peers and the day."""
    versions = {}
    for package in registry.peers(op).PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue  # a peer that is not installed has no rows
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "kernels": torch.ops.mmkernels.cpu_variant(),
        "torch": torch.__version__,
        "peers": versions,
        "date": datetime.date.today().isoformat(),
    }


def draw_again(ops: Sequence[str], folder: Path) -> None:
    """Draw the figures from the numbers of earlier runs."""
    for op in ops:
        registry.report(op).draw(json.loads((folder / f"{op}.json").read_text())["results"], folder / f"{op}.png")


def main(
    ops: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(FOLDERS)}; default: all")] = None,
    quick: Annotated[bool, typer.Option(help="a few small cells, a minute")] = False,
    seconds: Annotated[float, typer.Option(help="time spent on each cell, beyond the least number of rounds")] = 10.0,
    draw: Annotated[bool, typer.Option(help="draw the figures again from the numbers in the folder")] = False,
    out: Annotated[Path, typer.Option(help="folder of the numbers and the figures")] = Path("docs/figures"),
) -> None:
    """Compare the ops with their peers on this machine's CPU."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    unknown = sorted(set(ops or FOLDERS) - set(FOLDERS))
    if unknown:
        raise typer.BadParameter(f"expected some of {', '.join(FOLDERS)}, got {', '.join(unknown)}")
    if draw:
        draw_again(ops or FOLDERS, out)
        return
    reason = _backends.unavailable("cpu")
    if reason is not None:
        console.print(f"The CPU kernels cannot run here: {reason}")
        raise typer.Exit(1)
    out.mkdir(parents=True, exist_ok=True)
    for op in ops or FOLDERS:
        report = registry.report(op)
        cells = report.QUICK if quick else report.CELLS
        results: list[dict[str, Any]] = []
        with Progress(console=console) as progress:
            for cell in progress.track(cells, description=op):
                torch.compiler.reset()  # every size is compiled for itself, as in training
                results += report.measure(*cell, seconds=seconds)
        report.finish(results)
        console.print(report.table_of(results))
        if quick:
            continue
        (out / f"{op}.json").write_text(json.dumps({"machine": machine_of(op), "results": results}, indent=1) + "\n")
        report.draw(results, out / f"{op}.png")
        console.print(f"Numbers: {out / f'{op}.json'}; figure: {out / f'{op}.png'}")


if __name__ == "__main__":
    typer.run(main)
