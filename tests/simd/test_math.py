"""The functions and the moves of the CPU kernels' vectors, in every instruction set that this machine has."""

import ctypes
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from setup import VARIANTS
from tests.cpu_kernels import needs_library

pytestmark = needs_library

HERE = Path(__file__).parent
LEAST_NORMAL = np.finfo(np.float32).tiny
Function = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    names = list(VARIANTS)
    widest = os.environ.get("MMKERNELS_CPU") or torch.ops.mmkernels.cpu_variant()
    if names.index(request.param) > names.index(widest):
        pytest.skip(f"this machine has no {request.param}")
    return request.param


@pytest.fixture(scope="module")
def functions(variant: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Function]:
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    target = tmp_path_factory.mktemp("simd") / f"{variant}.so"
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-ffp-contract=off", *VARIANTS[variant]]
    command = [*compiler.split(), *flags, f"-DMMK_VARIANT={variant}", str(HERE / "math.cpp"), "-o", str(target)]
    subprocess.run(command, check=True)
    library = ctypes.CDLL(str(target))

    def wrapped(name: str) -> Function:
        def call(x: np.ndarray) -> np.ndarray:
            x = np.ascontiguousarray(x, np.float32)
            result = np.full_like(x, np.nan)
            getattr(library, name)(
                ctypes.c_void_p(x.ctypes.data), ctypes.c_void_p(result.ctypes.data), ctypes.c_int64(x.size)
            )
            return result

        return call

    names = ("exp_of", "log_of", "log1p_of", "bf16_of", "f16_of", "transpose_of", "sums_of_rows")
    return {name.removesuffix("_of"): wrapped(name) for name in names}


def floats_between(low: float, high: float, count: int = 1 << 20) -> np.ndarray:
    """Floats of one sign from low to high: evenly spread values and evenly spread bits, for every binade."""
    ends = np.array([low, high], np.float32)
    first, last = np.sort(np.abs(ends)).view(np.int32).astype(np.int64)
    bits = np.linspace(first, last, count).astype(np.int32).view(np.float32)
    sign = -1.0 if low < 0 else 1.0
    return np.concatenate([np.linspace(low, high, count).astype(np.float32), bits * np.float32(sign), ends])


def largest_error(function: Function, exact_function: Function, x: np.ndarray) -> float:
    """The error is in units of the last place of the exact result as a float."""
    exact = exact_function(x.astype(np.float64))
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    return float((np.abs(function(x) - exact) / unit).max())


@pytest.mark.parametrize(("low", "high"), [(-87.3, -0.0), (0.0, 88.37)])
def test_exp(functions: dict[str, Function], low: float, high: float) -> None:
    assert largest_error(functions["exp"], np.exp, floats_between(low, high)) < 1.1


def test_exp_is_exact_at_zero_and_passes_nan(functions: dict[str, Function]) -> None:
    x = np.array([0.0, -0.0, 1e-45, -1e-45, LEAST_NORMAL, -LEAST_NORMAL, 1e-8, -np.inf, -1e30, -110.0, np.nan])
    assert functions["exp"](x).tolist()[:-1] == [1.0] * 7 + [0.0] * 3
    assert np.isnan(functions["exp"](x)[-1])


def test_exp_where_floats_end(functions: dict[str, Function], variant: str) -> None:
    """Past the normal numbers AVX-512 is as exact as before; the others give 0 below, and infinity a little early."""
    below, above = floats_between(-104.0, -87.3), floats_between(88.38, 88.72)
    if variant.startswith("avx512"):
        assert largest_error(functions["exp"], np.exp, below) < 1.1
        assert largest_error(functions["exp"], np.exp, above) < 1.1
    else:
        got, exact = functions["exp"](below), np.exp(below.astype(np.float64))
        assert (got >= 0).all()
        assert (np.abs(got - exact) < LEAST_NORMAL).all()
        assert np.isinf(functions["exp"](above)).all()
    assert functions["exp"](np.array([88.73, 100.0, 1000.0])).tolist() == [np.inf] * 3


def test_log(functions: dict[str, Function]) -> None:
    for low, high in ((1e-45, LEAST_NORMAL), (LEAST_NORMAL, 0.7), (0.7, 1.4), (1.4, 3.4e38)):
        assert largest_error(functions["log"], np.log, floats_between(low, high)) < 0.9, (low, high)
    assert functions["log"](np.array([1.0])).tolist() == [0.0]
    assert np.isnan(functions["log"](np.array([np.nan]))).all()


def test_log1p(functions: dict[str, Function]) -> None:
    assert largest_error(functions["log1p"], np.log1p, floats_between(1e-45, 1.0)) < 2
    x = np.array([0.0, 1e-45, LEAST_NORMAL, 1e-20], np.float32)
    assert functions["log1p"](x).tolist() == x.tolist()
    assert np.isnan(functions["log1p"](np.array([np.nan]))).all()


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("f16", torch.float16)])
@pytest.mark.parametrize("left_over", [0, 1, 7, 15])
def test_halves_round_to_nearest(
    functions: dict[str, Function], variant: str, name: str, dtype: torch.dtype, left_over: int
) -> None:
    """As torch rounds, ties and subnormals included; infinity where floats of 16 bits end; a NaN stays one."""
    bits = np.random.default_rng(left_over).integers(0, 1 << 32, 4096 + left_over, dtype=np.uint32)
    bits[:5] = [0x7F800001, 0xFFFFFFFF, 0x7F800000, 0x80000000, 0x477FF000]  # NaN, NaN, infinity, -0, 65520
    bits[5:2048:3] = bits[5:2048:3] & 0xFFFF0000 | 0x8000  # ties of bfloat16
    bits[6:2048:3] = (bits[6:2048:3] & 0x8FFFE000 | 0x1000) + 0x30000000  # ties of float16
    if (variant, name) == ("avx512bf16", "bf16"):
        bits[(bits & 0x7F800000) == 0] = 0  # the machine's conversion makes 0 of subnormals
    got, expected = functions[name](bits.view(np.float32)), torch.from_numpy(bits.view(np.float32)).to(dtype).float()
    np.testing.assert_array_equal(got, expected.numpy())


def test_transpose_and_sums(functions: dict[str, Function], variant: str) -> None:
    lanes = {"portable": 4, "avx2": 8}.get(variant, 16)
    square = np.arange(lanes * lanes, dtype=np.float32).reshape(lanes, lanes)
    assert functions["transpose"](square).tolist() == square.T.tolist()
    assert functions["sums_of_rows"](square)[0].tolist() == square.sum(1).tolist()
