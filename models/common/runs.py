"""What lies in a run folder beside its numbered checkpoints: the best weights, the logs, the report."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor

from models.common.checkpoint import CheckpointError, load_checkpoint, load_newest, remove_temporaries, write_text
from models.common.console import say, warn

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


def write_history(rows: Sequence[Mapping[str, float]], run_dir: Path, name: str = "history.jsonl") -> None:
    """Replace the rows of a log of a run."""
    write_text(run_dir / name, "".join(json.dumps(row) + "\n" for row in rows))


def clear_run(run_dir: Path) -> None:
    """Delete the checkpoints and the logs of a run folder, to start anew in it."""
    logs = [run_dir / "history.jsonl", run_dir / "validation.jsonl"]
    for old in [*run_dir.glob("step-*.safetensors"), run_dir / BEST, *logs]:
        old.unlink(missing_ok=True)
    remove_temporaries(run_dir)
    shutil.rmtree(run_dir / "tensorboard", ignore_errors=True)


@contextmanager
def only_run(run_dir: Path) -> Iterator[None]:
    """Keep other processes from training in a run folder; a :class:`CheckpointError` where one does already."""
    run_dir.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run_dir / ".lock", timeout=0):
            yield
    except Timeout:
        raise CheckpointError(f"another process trains in {run_dir}: wait for it, or choose another --out") from None


@dataclass(frozen=True)
class Run:
    """What a checkpoint holds of a model: weights (the averaged ones, where there are any) and description."""

    path: Path
    weights: dict[str, Tensor]
    described: dict[str, Any]

    @contextmanager
    def fitting(self) -> Iterator[None]:
        """Names the file where the description lacks something, or the weights are those of another model."""
        try:
            yield
        except KeyError as error:
            raise CheckpointError(f"{self.path} lacks {error} in its description: it is damaged or edited") from error
        except (TypeError, ValueError, RuntimeError) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise CheckpointError(f"{self.path} does not fit this model: {' '.join(lines[:3])}") from error


def load_run(path: Path, model: str) -> Run:
    """The run of ``model`` ("clip") in a run folder or a checkpoint file.

    A folder gives the weights that did best in validation, or else the newest.
    """
    if (path / BEST).is_file():
        path = path / BEST
        tensors, metadata = load_checkpoint(path)
    elif path.is_dir():
        found = load_newest(path, warn)
        if found is None:
            command = f"python -m models.{model} train --out {shlex.quote(str(path))}"
            raise CheckpointError(f"{path} holds no checkpoint; train first: {command}")
        tensors, metadata, path = found
    else:
        tensors, metadata = load_checkpoint(path)
    described = metadata.get("model")
    if not isinstance(described, dict):
        raise CheckpointError(f"checkpoint {path} does not say which model it holds")
    if described.get("name", model) != model:
        raise CheckpointError(f"{path} is a checkpoint of models.{described['name']}, not of models.{model}")
    prefix = "average/" if any(name.startswith("average/") for name in tensors) else "model/"
    weights = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    return Run(path, weights, described)


def announce_files(folder: Path, *names: str) -> None:
    """Say which of the files a report consists of were written."""
    written = ", ".join(str(folder / name) for name in names if (folder / name).exists())
    say(f"written: {written}")
