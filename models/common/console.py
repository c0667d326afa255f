"""The one console that every table, line and progress bar of the models goes to; of several ranks the first speaks."""

from __future__ import annotations

import os
import sys

from rich.console import Console
from rich.markup import escape

# Tables and lines in a log file need not fit the 80 columns that rich assumes there.
_WIDTH = None if sys.stdout.isatty() else 120
_RANK = int(os.environ.get("RANK", "0"))
console = Console(width=_WIDTH, quiet=_RANK > 0)


def say(message: str, style: str = "") -> None:
    """Print a line as it is: brackets in captions, paths and errors are no markup."""
    console.print(f"[{style}]{escape(message)}" if style else escape(message), highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning."""
    say(message, "yellow")


def complain(message: str) -> None:
    """Print an error, whichever rank has it."""
    rank = f"rank {_RANK}: " if "RANK" in os.environ else ""
    loud = Console(width=_WIDTH)
    loud.print(f"[red]error:[/] {escape(rank + message)}", highlight=False, soft_wrap=True)
