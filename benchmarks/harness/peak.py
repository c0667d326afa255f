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
    subprocess.run(["g++", *flags, str(source), "-o", str(target)], check=True)
    library = ctypes.CDLL(str(target))
    for name in ("peak_float32", "peak_bfloat16"):
        function = getattr(library, name)
        function.argtypes, function.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_double
    return library


def cpu_peak(dtype: torch.dtype, rounds: int = 20_000_000) -> float | None:
    """FLOP per second over torch's threads, from a tenth of a second of work; None where it cannot be measured."""
    library = _library()
    if library is None:
        return None
    function = library.peak_bfloat16 if dtype == torch.bfloat16 else library.peak_float32
    return function(torch.get_num_threads(), rounds) or None
