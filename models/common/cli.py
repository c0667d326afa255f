"""What the command lines of the models share: how they end, and what they say of their data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import typer

from models.common.checkpoint import CheckpointError
from models.common.console import console
from models.data.sets import BadDataError, BadDataLog, BadDataPolicy


def warn(message: str) -> None:
    """Print a warning."""
    console.print(f"[yellow]{message}", highlight=False)


def bad_log(policy: BadDataPolicy) -> BadDataLog:
    """A log that names every skipped file on the screen, or raises at the first."""
    return BadDataLog(policy, warn)


def announce(notes: Sequence[str], bad: BadDataLog) -> None:
    """Say what was read, what was held out, and what was skipped."""
    for note in notes:
        console.print(f"[dim]{note}", highlight=False, soft_wrap=True)
    if len(bad):
        warn(bad.summary())


def run_app(app: typer.Typer, arguments: Iterable[str] | None = None) -> int:
    """Run a command line; foreseeable errors end it with one clear line instead of a traceback."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except SystemExit as stop:  # typer's own end, after help and after options that it cannot read
        return int(stop.code or 0)
    except (
        BadDataError,
        CheckpointError,
        FileNotFoundError,
        ModuleNotFoundError,
        ValueError,
        FloatingPointError,
    ) as error:
        console.print(f"[red]error:[/] {error}", highlight=False, soft_wrap=True)
        return 1
    return 0
