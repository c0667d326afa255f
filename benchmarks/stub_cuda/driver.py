"""Runs the Triton path of the ops without a GPU: CPU tensors stand in for a GPU's, and no kernel does anything."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import triton
from triton.backends.nvidia.driver import CudaDriver

from mmkernels import _backends
from mmkernels._tiles import triton as tiles

_BUILT = "MMKERNELS_STUB_CUDA"


def in_stub(module: str, arguments: Sequence[str]) -> int:
    """Run a module in a process whose CUDA driver is libcuda.c. Returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(__file__).with_name("libcuda.c"), Path(folder) / "libcuda.so.1"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-w", "-o", library, source], check=True)
        environment = os.environ | {"TRITON_LIBCUDA_PATH": folder, "LD_LIBRARY_PATH": folder, _BUILT: folder}
        return subprocess.run([sys.executable, "-m", module, *arguments], env=environment).returncode


def is_stub() -> bool:
    """Whether this process is one of in_stub."""
    return _BUILT in os.environ


def pretend(launching: bool = True) -> None:
    """Have impl="triton" take CPU tensors for those of an H100, with its tiles. Before mmkernels' kernels are imported.

    launching: Triton's launches go to the stub; otherwise the caller replaces JITFunction.run.
    """
    chip = tiles.Chip(132, 50 << 20)
    for module, name, value in (
        (_backends, "triton_interprets", lambda: True),
        (tiles, "family_of", lambda device: "sm_90"),
        (tiles, "chip_of", lambda device: chip),
    ):
        setattr(module, name, value)
    if launching:
        driver = CudaDriver()
        driver.get_current_device = lambda: 0
        driver.get_current_stream = lambda device: 0
        driver.get_current_target = lambda: triton.backends.compiler.GPUTarget("cuda", 90, 32)
        triton.runtime.driver.set_active(driver)
    torch.set_num_threads(1)
