"""What lies in a run folder beside its numbered checkpoints: the best weights, the logs, the report."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from models.common.checkpoint import CheckpointError, load_checkpoint, load_newest
from models.common.console import console

BEST = "best.safetensors"  # the weights that did best in validation, where a run has any


def read_history(run_dir: Path, name: str = "history.jsonl") -> list[dict[str, float]]:
    """The rows of a log of a run; a last line cut off by a kill is left out."""
    path = run_dir / name
    rows = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


def clear_run(run_dir: Path) -> None:
    """Delete the checkpoints and the logs of a run folder, to start anew in it."""
    logs = [run_dir / "history.jsonl", run_dir / "validation.jsonl"]
    for old in [*run_dir.glob("step-*.safetensors"), run_dir / BEST, *logs]:
        old.unlink(missing_ok=True)
    shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)


def load_run(path: Path, remedy: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights (the averaged ones, where there are any) and configuration of a run folder or a checkpoint file.

    A folder gives the weights that did best in validation, or else the newest. ``remedy`` is the command that makes a
    checkpoint; the error names it if the folder has none.
    """
    if (path / BEST).is_file():
        tensors, metadata = load_checkpoint(path / BEST)
    elif path.is_dir():
        found = load_newest(path, lambda message: console.print(f"[yellow]{message}"))
        if found is None:
            raise CheckpointError(f"{path} holds no checkpoint; train first: {remedy}")
        tensors, metadata, _ = found
    else:
        tensors, metadata = load_checkpoint(path)
    prefix = "average/" if any(name.startswith("average/") for name in tensors) else "model/"
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return weights, metadata["model"]


def announce_files(folder: Path, *names: str) -> None:
    """Say which of the files a report consists of were written."""
    written = ", ".join(str(folder / name) for name in names if (folder / name).exists())
    console.print(f"written: {written}", highlight=False, soft_wrap=True)
