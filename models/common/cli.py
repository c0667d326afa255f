"""What the command lines of the models share: their options, and errors in one line instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Annotated, Literal

import torch
import typer

from models.checkpoint import CheckpointError
from models.data.sets import BadDataError, BadDataLog, BadDataPolicy
from models.training import console


class Precision(str, Enum):
    """Mixed precision."""

    auto = "auto"
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class BadChoice(str, Enum):
    """What to do about files that cannot be read."""

    skip = "skip"
    stop = "raise"


class Resume(str, Enum):
    """Whether to go on from the checkpoints of a run folder."""

    auto = "auto"
    never = "never"


BadOption = Annotated[BadChoice, typer.Option(help="Skip files that cannot be read, with a count, or stop.")]
ResumeOption = Annotated[Resume, typer.Option(help="Go on from the run folder's checkpoints, or not.")]
PrecisionOption = Annotated[Precision, typer.Option(help="Mixed precision.")]


def pick_precision(choice: str) -> Literal["no", "bf16", "fp16"]:
    """bf16 where the processor multiplies it in hardware, else full precision."""
    if choice != "auto":
        return choice  # type: ignore[return-value]
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    return "bf16" if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported() else "no"


def bad_log(choice: BadChoice) -> BadDataLog:
    """A log that names every file skipped on the screen, or raises at the first."""
    policy: BadDataPolicy = "raise" if choice is BadChoice.stop else "skip"
    return BadDataLog(policy, lambda message: console.print(f"[yellow]{message}", highlight=False))


def announce(notes: Sequence[str], bad: BadDataLog) -> None:
    """Say what was read, what was held out, and what was skipped."""
    for note in notes:
        console.print(f"[dim]{note}", highlight=False, soft_wrap=True)
    if len(bad):
        console.print(f"[yellow]{bad.summary()}", highlight=False)


def run_app(app: typer.Typer, arguments: Iterable[str] | None = None) -> int:
    """Run a command line; foreseeable errors end it with one clear line."""
    try:
        app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except typer.Exit as stop:
        return stop.exit_code
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
