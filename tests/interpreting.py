"""What the tests of Triton kernels in Triton's interpreter share: the process that chooses it, and guard bands."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GUARD = 1 << 15  # bytes, more than any block
NAN = 0xFF  # bytes that are a NaN in every floating dtype


def run_interpreted(file: str, *options: str) -> None:
    """Run a test file again in a process where the interpreter is chosen before Triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, file]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    print(run.stdout[-6000:], run.stderr[-2000:])
    assert run.returncode == 0


def guarded_allocations(
    monkeypatch: pytest.MonkeyPatch, fill: int = NAN, *, launches: bool = True
) -> Iterator[list[torch.Tensor]]:
    """What the launchers allocate: bytes of `fill` all over, between guards that must still be so at the end."""
    buffers: list[torch.Tensor] = []
    plain = torch.Tensor.new_empty

    def new_empty(like: torch.Tensor, *size, dtype: torch.dtype | None = None, **options) -> torch.Tensor:
        if options:  # the interpreter's own
            return plain(like, *size, dtype=dtype, **options)
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        dtype = dtype or like.dtype
        buffer = torch.full((shape.numel() * dtype.itemsize + 2 * GUARD,), fill, dtype=torch.uint8)
        buffers.append(buffer)
        return buffer[GUARD : len(buffer) - GUARD].view(dtype).view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield buffers
    assert buffers or not launches, "no kernel ran"
    for buffer in buffers:
        assert (buffer[:GUARD] == fill).all(), "written before a buffer"
        assert (buffer[-GUARD:] == fill).all(), "written past a buffer"


def guarded_rows(x: torch.Tensor) -> torch.Tensor:
    """[rows, D] or [rows] inside a larger tensor full of NaN, or of indices out of range."""
    fill = torch.nan if x.is_floating_point() else 1 << 30
    if x.ndim == 1:
        buffer = torch.full((len(x) + 2 * GUARD,), fill, dtype=x.dtype)
        buffer[GUARD : GUARD + len(x)] = x
        return buffer[GUARD : GUARD + len(x)]
    rows, D = x.shape
    buffer = torch.full((rows + 2, -(-D // 16) * 16 + 16), fill, dtype=x.dtype)
    buffer[1:-1, :D] = x
    return buffer[1:-1, :D]
