"""The cores' own limit, measured: fused multiply-adds from registers (peak.cpp), in FLOP per second."""

import ctypes
import functools
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch


@functools.cache
def _library() -> ctypes.CDLL | None:
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        return None
    target = Path(tempfile.mkdtemp()) / "peak.so"
    source = Path(__file__).with_name("peak.cpp")
    flags = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-pthread", "-Wno-ignored-attributes"]
    if torch.ops.mmkernels.cpu_variant() == "avx2":
        flags.append("-mno-avx512f")  # MMKERNELS_CPU may hold the kernels to less than the machine has
    subprocess.run(["g++", *flags, str(source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    for name in ("peak_float32", "peak_bfloat16"):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_double
    return library


def cpu_peak(dtype: torch.dtype, rounds: int = 20_000_000) -> float | None:
    """FLOP per second over torch's threads, from a tenth of a second of work; None where it cannot be measured.

    Without products of bfloat16 the kernels multiply it as float32.
    """
    library = _library()
    if library is None:
        return None
    threads = torch.get_num_threads()
    of_pairs = library.peak_bfloat16(threads, rounds) if dtype == torch.bfloat16 else 0
    return of_pairs or library.peak_float32(threads, rounds)
