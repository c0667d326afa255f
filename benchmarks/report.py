"""The comparison with what users run today: tables on the screen, numbers and a figure on disk.

python -m benchmarks.report [OP ...] [--quick] [--out docs/figures]
"""

import importlib
import json
import os
import platform
import sys
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # read when torch is imported: the profiler's own notes

import matplotlib as mpl
import torch
import typer
from rich.console import Console
from rich.progress import Progress

from mmkernels import _backends

mpl.use("Agg")

# An op's report is benchmarks/<op>/report.py: CELLS and QUICK, measure(*cell, seconds) with the rows of one cell,
# finish(rows) once all are measured, table_of(rows), draw(rows, path).
OPS = (
    "info_nce",
    "distillation",
    "siglip",
    "divided_attention",
    "linear_cross_entropy",
    "triplet",
    "retrieval",
    "beam_search",
)


def main(
    ops: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(OPS)}; default: all")] = None,
    quick: Annotated[bool, typer.Option(help="a few small cells, a minute")] = False,
    seconds: Annotated[float, typer.Option(help="time spent on each cell, beyond the least number of rounds")] = 10.0,
    out: Annotated[Path, typer.Option(help="folder of the numbers and the figures")] = Path("docs/figures"),
) -> None:
    """Compare the ops with their peers on this machine's CPU."""
    console = Console(width=None if sys.stdout.isatty() else 120)
    unknown = sorted(set(ops or OPS) - set(OPS))
    if unknown:
        raise typer.BadParameter(f"expected some of {', '.join(OPS)}, got {', '.join(unknown)}")
    reason = _backends.unavailable("cpu")
    if reason is not None:
        console.print(f"The CPU kernels cannot run here: {reason}")
        raise typer.Exit(1)
    out.mkdir(parents=True, exist_ok=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "kernels": torch.ops.mmkernels.cpu_variant(),
        "torch": torch.__version__,
    }
    for op in ops or OPS:
        report = importlib.import_module(f"benchmarks.{op}.report")
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
        (out / f"{op}.json").write_text(json.dumps({"machine": machine, "results": results}, indent=1) + "\n")
        report.draw(results, out / f"{op}.png")
        console.print(f"Numbers: {out / f'{op}.json'}; figure: {out / f'{op}.png'}")


if __name__ == "__main__":
    typer.run(main)
