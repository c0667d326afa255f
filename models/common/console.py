"""The one console that every table, line and progress bar of the models goes to."""

from __future__ import annotations

import sys

from rich.console import Console

# Tables and lines in a log file need not fit the 80 columns that rich assumes there.
console = Console(width=None if sys.stdout.isatty() else 120)
