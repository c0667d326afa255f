"""What a run says of itself while it trains: a row of ``history.jsonl`` for each step, a bar or lines on the screen."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from models.common.console import console

# A log file gets a line of progress after so many seconds at the latest, if a step takes no longer.
LINE_SECONDS = 15

# Columns of the history that the progress line leaves out.
_UNSHOWN = ("step", "grad_norm", "lr", "seconds", "memory_mib")


class RunLog:
    """A terminal gets a moving bar; a log file gets a line now and then, and on a slow machine in time too."""

    def __init__(self, run_dir: Path, steps: int, done: int, every: int) -> None:
        self.steps, self.every, self.said = steps, every, -math.inf
        self.file = open(run_dir / "history.jsonl", "a", encoding="utf-8")  # noqa: SIM115
        self.quiet = not console.is_terminal
        self.bar = Progress(
            TextColumn("[progress.description]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=self.quiet,
        )
        self.job = self.bar.add_task("training", total=steps, completed=done, note="")

    def __enter__(self) -> RunLog:
        self.bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()
        self.file.close()

    def row(self, row: Mapping[str, float], step: int, progress: float) -> None:
        """A step has ended, the run's number ``step``."""
        self.file.write(json.dumps(row) + "\n")
        shown = [f"{key} {value:.3f}" for key, value in row.items() if key not in _UNSHOWN]
        note = "  ".join([*shown, f"{row['seconds']:.2f} s/step"])
        self.bar.update(self.job, completed=step, note=note)
        if step % self.every == 0:
            self.flush()
        now = time.monotonic()
        if self.quiet and (step % (10 * self.every) == 0 or now - self.said >= LINE_SECONDS):
            self.said = now
            console.print(f"step {step}/{self.steps}  {100 * progress:.0f} %  {note}")

    def flush(self) -> None:
        """Write out the rows so far."""
        self.file.flush()
