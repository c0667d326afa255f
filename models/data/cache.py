"""Tensors that are slow to make, kept in a file for the next run."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from models.common.checkpoint import checksum

T = TypeVar("T")


def read_cache(
    path: Path, understand: Callable[[dict[str, Tensor], dict[str, str]], T], warn: Callable[[str], None] = print
) -> T | None:
    """What ``understand`` makes of a cache's tensors and metadata; None where there is none, or none that is whole.

    One that cannot be used is named through ``warn``, and gone: the caller makes it anew.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
        stored = metadata.pop("sha256", None)
        if stored is None:
            raise ValueError("it has no checksum, as caches of earlier versions")
        if stored != _checksum(tensors, metadata):
            raise ValueError("its checksum is another, so some byte of it has changed")
        return understand(tensors, metadata)
    except (SafetensorError, ValueError, KeyError) as error:
        path.unlink()  # a cache is cheap to make again
        warn(f"cache {path} is not used ({error}); it is made anew")
        return None


def write_cache(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replace a cache as a whole, whatever other process does the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(dict(tensors), temporary, {**metadata, "sha256": _checksum(tensors, metadata)})
    temporary.replace(path)


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    return checksum(tensors, json.dumps(metadata, sort_keys=True))
