"""Checkpoints that are whole or not there: one safetensors file, written beside the old one and renamed over it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
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
    state = json.dumps(metadata)
    # Bytes first, then plain writes: a memory-mapped file on a full disk would end the process by a signal.
    data = save(whole, {"state": state, "sha256": checksum(whole, state)})
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


def write_text(path: Path, text: str) -> None:
    """Write a text file of a run: a kill leaves the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def checksum(tensors: Mapping[str, Tensor], state: str) -> str:
    """A checksum of all that a file of tensors holds: a disk or a copy may change a byte that no format notices."""
    found = hashlib.sha256(state.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def all_finite(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the weights of a checkpoint, averaged ones included, hold neither NaN nor infinity."""
    weights = (value for name, value in tensors.items() if name.startswith(("model/", "average/")))
    return all(bool(value.isfinite().all()) for value in weights)


def load_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the metadata of a checkpoint; a :class:`CheckpointError` names a file that is no good."""
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
    try:
        described = json.loads(metadata["state"])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"checkpoint {path} is damaged (its description: {error})") from error
    if "sha256" in metadata and metadata["sha256"] != checksum(tensors, metadata["state"]):
        raise CheckpointError(f"checkpoint {path} is damaged: its checksum is another, so some byte of it has changed")
    if not all_finite(tensors):
        raise CheckpointError(f"checkpoint {path} holds weights that are not finite; train again with a lower --lr")
    return tensors, described


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


def remove_temporaries(folder: Path) -> None:
    """Delete what killed runs had begun to write; no other run may be at work in the folder."""
    for path in folder.glob(".*.*.tmp"):
        path.unlink(missing_ok=True)


def prune(folder: Path, keep: int) -> None:
    """Delete all but the ``keep`` newest checkpoints."""
    for path in checkpoints(folder)[keep:]:
        path.unlink(missing_ok=True)
