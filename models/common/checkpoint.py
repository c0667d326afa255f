"""Checkpoints that are whole or not there: one safetensors file, written beside the old one and renamed over it."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written; the message names the file and the remedy."""


def save_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write ``tensors`` and ``metadata`` (anything JSON holds) to ``path``.

    The old file stays until every byte of the new one is on the disk.
    """
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    # Bytes first, then plain writes: a memory-mapped file on a full disk would end the process by a signal.
    data = save(whole, {"state": json.dumps(metadata)})
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # not every file system lets a folder be synced
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            reason = f"{reason}: {len(data) / 2**20:.0f} MiB do not fit"
        kept = "the file that stood there is untouched" if path.exists() else "nothing was written"
        raise CheckpointError(f"could not save {path} ({reason}); {kept}. Free some space and resume.") from error


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata of a checkpoint; a damaged file is named in a :class:`CheckpointError`."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"there is no checkpoint {path}") from error
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or damaged ({error})") from error
    if "state" not in metadata:
        raise CheckpointError(f"{path} is a safetensors file, but no checkpoint of this project (no 'state' in it)")
    return tensors, json.loads(metadata["state"])


def step_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return folder / f"step-{step:07d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, newest first."""
    return sorted((p for p in folder.glob("step-*.safetensors") if re.fullmatch(r"step-\d+", p.stem)), reverse=True)


def load_newest(
    folder: Path, warn: Callable[[str], None] = print
) -> tuple[dict[str, Tensor], dict[str, Any], Path] | None:
    """The newest checkpoint that can be read; damaged ones are named through ``warn`` and passed over.

    None where the run has no checkpoint yet; :class:`CheckpointError` where it has some and none is good.
    """
    failures = []
    for path in checkpoints(folder):
        try:
            return *load_checkpoint(path), path
        except CheckpointError as error:
            failures.append(str(error))
            warn(f"{error}; trying the one before it")
    if failures:
        listed = "; ".join(failures)
        raise CheckpointError(f"no good checkpoint in {folder}: {listed}. Start anew with --resume never.")
    return None


def prune(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints."""
    for path in checkpoints(folder)[keep:]:
        path.unlink(missing_ok=True)
