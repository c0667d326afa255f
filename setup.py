"""Builds mmkernels._C: the CPU kernels where there is a C++ compiler, the CUDA kernels where there is a toolkit.

No GPU is looked for: CUDA sources are built if a toolkit (CUDA_HOME) is found or FORCE_CUDA=1 asks for it. Without a
C++ compiler the package is installed without the library, and `python -m mmkernels.info` says so.
"""

import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# One source, compiled once for each instruction set; csrc/common/dispatch.h chooses at run time.
VARIANTS = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    VARIANTS |= {
        "avx2": ["-march=x86-64-v3"],
        "avx512": ["-march=x86-64-v4"],
        "avx512bf16": ["-march=x86-64-v4", "-mavx512bf16"],
    }
# No contraction: the logits must round alike in the forward and the backward pass. The code writes fma where it wants.
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]


def find_compiler() -> str | None:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            return name
    return None


def build_arguments() -> dict:
    compiler = find_compiler()
    if compiler is None:
        print("mmkernels: no C++ compiler found (CXX, g++, clang++, c++): installing without the compiled kernels")
        return {}
    from torch.utils import cpp_extension

    cuda_sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/cuda.cu"))
    with_cuda = bool(cuda_sources) and (os.environ.get("FORCE_CUDA") == "1" or cpp_extension.CUDA_HOME is not None)
    if os.environ.get("FORCE_CUDA") == "1" and cpp_extension.CUDA_HOME is None:
        raise SystemExit("mmkernels: FORCE_CUDA=1, but no CUDA toolkit was found; set CUDA_HOME")

    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/cpu.cpp"))
    headers = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h"))
    kernels = sorted(ROOT.glob("csrc/*/cpu_kernels.cpp"))
    make = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    extension = make(
        "mmkernels._C",
        sources + (cuda_sources if with_cuda else []),
        depends=headers + [str(k.relative_to(ROOT)) for k in kernels],
        # at::parallel_for runs on one thread unless its caller is compiled with OpenMP.
        extra_compile_args={"cxx": [*FLAGS, "-fopenmp"], "nvcc": ["-O3", "-std=c++20"]},
        extra_link_args=["-fopenmp"],
        py_limited_api=True,
    )

    class Build(cpp_extension.BuildExtension):
        """Compiles the variants of the kernels, which need no torch header, before the rest."""

        def build_extension(self, ext):
            jobs = [(kernel, variant) for kernel in kernels for variant in VARIANTS]
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
                ext.extra_objects = list(pool.map(self.compile_variant, jobs))
            super().build_extension(ext)

        def compile_variant(self, job):
            kernel, variant = job
            target = Path(self.build_temp).absolute() / f"{kernel.parent.name}_{variant}.o"
            inputs = [kernel, *(ROOT / header for header in headers)]
            if not target.exists() or target.stat().st_mtime < max(p.stat().st_mtime for p in inputs):
                target.parent.mkdir(parents=True, exist_ok=True)
                flags = [*FLAGS, *VARIANTS[variant], f"-DMMK_VARIANT={variant}"]
                subprocess.run([*compiler.split(), *flags, "-c", str(kernel), "-o", str(target)], check=True)
            return str(target)

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build.with_options(use_ninja=False)}}


setup(**build_arguments())
