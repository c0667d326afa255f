"""The one console that every table, line and progress bar of the models goes to."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.markup import escape

# Tables and lines in a log file need not fit the 80 columns that rich assumes there.
console = Console(width=None if sys.stdout.isatty() else 120)


def say(message: str, style: str = "") -> None:
    """Print a line as it is: brackets in captions, paths and errors are no markup."""
    console.print(f"[{style}]{escape(message)}" if style else escape(message), highlight=False, soft_wrap=True)


def warn(message: str) -> None:
    """Print a warning."""
    say(message, "yellow")
