"""What the command lines of the models share: how they end, and what they say of their data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import typer

from models.common.checkpoint import CheckpointError
from models.common.console import complain, say, warn
from models.common.engine import LostRankError, leave
from models.common.signals import StoppedError
from models.data.sets import BadDataError, BadDataLog, BadDataPolicy


def bad_log(policy: BadDataPolicy) -> BadDataLog:
    """A log that names every skipped file on the screen, or raises at the first."""
    return BadDataLog(policy, warn)


def announce(notes: Sequence[str], bad: BadDataLog) -> None:
    """Say what was read, what was held out, and what was skipped."""
    for note in notes:
        say(note, "dim")
    if len(bad):
        warn(bad.summary())


def run_app(app: typer.Typer, arguments: Iterable[str] | None = None) -> int:
    """Run a command line; foreseeable errors end it with one clear line instead of a traceback."""
    try:
        app(args=list(arguments) if arguments is not None else None)
    except SystemExit as stop:  # typer's own end, after help and after options that it cannot read
        return int(stop.code or 0)
    except StoppedError as stopped:
        warn(f"{stopped}; run the same command again to resume")
        return stopped.code
    except (
        BadDataError,
        CheckpointError,
        FloatingPointError,
        LostRankError,
        ModuleNotFoundError,
        NotImplementedError,
        OSError,
        ValueError,
    ) as error:
        complain(str(error))
        return 1
    leave()
    return 0
