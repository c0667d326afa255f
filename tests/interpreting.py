"""What the tests of Triton kernels in Triton's interpreter share: the process that chooses it, its dot product, its
patches, and guard bands."""

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mmkernels.testing import EXP2_ERROR

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
GUARD = 1 << 15  # bytes, more than any block
NAN = 0xFF  # bytes that are a NaN in every floating dtype
POINTER = np.dtype(np.uint64)  # the interpreter's
HALVES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
# float16 and bfloat16 go the same way through the kernels: a few cases of float16 serve, the rest are slow.
_FP32 = pytest.param(torch.float32, id="fp32")
_SLOW_HALVES = [pytest.param(x, id=name, marks=pytest.mark.slow) for x, name in HALVES.items()]
DTYPES = [_FP32, *_SLOW_HALVES]
FAST_IN_FP16 = [_FP32, pytest.param(torch.float16, id="fp16"), *_SLOW_HALVES[1:]]
OPERATIONS = {"add": np.add, "sub": np.subtract, "mul": np.multiply}


def product_in_order(x: np.ndarray, y: np.ndarray, acc: np.ndarray) -> np.ndarray:
    """acc + x y of matrices, in acc's dtype: rounds each product and adds it to acc, one k after the other.

    That is a GPU's order, whose units have one accumulator for an element: sums of D products are D additions, where a
    CPU's library adds in blocks.
    """
    columns = np.ascontiguousarray(x.T, acc.dtype)  # [K, M]
    rows = np.ascontiguousarray(y, acc.dtype)  # [K, N]
    total, term = acc.copy(), np.empty_like(acc)
    for column, row in zip(columns, rows, strict=True):
        total += np.multiply(column[:, None], row, out=term)
    return total


def _create_dot(self, x, y, acc, input_precision, max_num_imprecise_acc):
    """tl.dot. The interpreter's own is numpy's matrix product, whose bits differ with the processor and with an
    element's place in the tile: equal features would not have equal products."""
    return interpreter.TensorHandle(product_in_order(x.data, y.data, acc.data), acc.dtype.scalar)


def _refuse_overflow(self, lhs, rhs, operation) -> None:
    """A sum, difference or product of tiles of integers leaves no integer out of range. The interpreter's own check
    makes some ten operations of Triton's language of each of the kernel's."""
    if lhs.dtype.int_bitwidth < 64:
        exact = OPERATIONS[operation.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
        limits = np.iinfo(lhs.handle.data.dtype)
        assert limits.min <= exact.min() <= exact.max() <= limits.max, f"{lhs.dtype} overflows"


def _patch_interpreter() -> None:
    """In this process dot products add in the order of k. What the interpreter does anew at every operation, which is
    most of its time, it does once, or in a few calls of numpy."""
    interpreter.InterpreterBuilder.create_dot = _create_dot
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
    # That of Triton 3.6 and 3.7 makes a number of an array of one dimension, which numpy 2.4 refuses.
    tl.tensor.__index__ = lambda self: int(self.handle.data.squeeze())
    of_scalar = functools.cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda dtype: POINTER if dtype.scalar.is_ptr() else of_scalar(dtype.scalar)
    TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow


if INTERPRETED and importlib.util.find_spec("triton"):
    import triton.language as tl
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    _patch_interpreter()


def inexact_exp2(monkeypatch: pytest.MonkeyPatch) -> None:
    """2^x is off by all that PTX allows ex2.approx: 2^-22 of itself, up or down by the bits of x, and exact at 0."""
    plain = interpreter.InterpreterBuilder.create_exp2

    def create_exp2(self, x):
        exact = plain(self, x)
        if exact.data.dtype != np.float32:
            return exact
        upwards = (np.asarray(x.data).view(np.uint32) * np.uint32(2654435761)) >> np.uint32(31)
        error = np.where(x.data == 0, 0.0, np.where(upwards, 1.0, -1.0)) * EXP2_ERROR
        return interpreter.TensorHandle((exact.data * (1 + error)).astype(np.float32), exact.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_exp2", create_exp2)


def run_interpreted(file: Path | str, *options: str) -> None:
    """Run a test file in a process where the interpreter is chosen before Triton is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *options, str(file)]
    root = Path(__file__).parents[1]
    run = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    all_of_the_other_kind = run.returncode == pytest.ExitCode.NO_TESTS_COLLECTED and "deselected" in run.stdout
    if run.returncode and not all_of_the_other_kind:
        pytest.fail(run.stdout[-6000:] + run.stderr[-2000:], pytrace=False)


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
