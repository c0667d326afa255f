"""Tensors that are slow to make, kept in a file for the next run."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

T = TypeVar("T")


def read_cache(path: Path, understand: Callable[[dict[str, Tensor], dict[str, str]], T]) -> T | None:
    """What ``understand`` makes of a cache's tensors and metadata; None, and the file is gone, where it cannot."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            return understand({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118
    except (SafetensorError, ValueError, KeyError):
        path.unlink()  # a cache is cheap to make again
        return None


def write_cache(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replace a cache as a whole, whatever other process does the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    save_file(dict(tensors), temporary, dict(metadata))
    temporary.replace(path)
