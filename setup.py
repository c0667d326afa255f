"""Builds mmkernels._C: the CPU kernels where there is a C++ compiler, the CUDA kernels where there is a toolkit.

No GPU is looked for: the CUDA kernels are built where there is nvcc (CUDA_HOME, or on the path) of the CUDA release
that torch is built for. FORCE_CUDA=1 asks for them, and the build fails where it cannot have them; FORCE_CUDA=0 leaves
them out. Without a C++ compiler the package is installed without the library. `python -m mmkernels.info` says what is
missing.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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


# Compute capabilities with code of their own; later ones compile the last's PTX.
CUDA_ARCHITECTURES = ("80", "90", "100")
# No contraction, as above.
NVCC_FLAGS = ["-O3", "-std=c++20", "-fmad=false", "-Xcompiler", "-fPIC,-fvisibility=hidden"]


class Toolkit(NamedTuple):
    nvcc: str
    runtime: str  # libcudart, a file
    architectures: tuple[str, ...]


def find_toolkit() -> Toolkit | str:
    """The CUDA toolkit to build with, or why there is none."""
    import torch

    if os.environ.get("FORCE_CUDA") == "0":
        return "FORCE_CUDA=0"
    if torch.version.cuda is None:
        return "torch is built without CUDA"
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home or "/usr/local/cuda", "bin"))
    if nvcc is None and home is None:
        nvcc = shutil.which("nvcc")
    if nvcc is None:
        return "no CUDA toolkit was found; set CUDA_HOME"

    def ask(*arguments: str) -> str:
        result = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=False)
        return result.stdout + result.stderr

    release = re.search(r"release (\d+)\.", ask("--version"))
    wanted = torch.version.cuda.split(".")[0]
    if release is None or release[1] != wanted:
        return f"{nvcc} is of CUDA {release[1] if release else '?'}, torch is built for {wanted}"
    known = ask("--list-gpu-arch")
    architectures = tuple(a for a in CUDA_ARCHITECTURES if re.search(rf"compute_{a}\b", known))
    # nvcc may be a script: it says itself where the toolkit is. A toolkit of wheels has its libraries beside torch's.
    top = re.search(r"TOP=(.*)", ask("--dryrun", "-x", "cu", "-c", os.devnull))
    places = [Path(top[1]) / name for name in ("lib64", "lib")] if top else []
    places.append(Path(torch.__file__).parents[1] / "nvidia" / f"cu{wanted}" / "lib")
    runtimes = [file for place in places for file in sorted(place.glob("libcudart.so*"))]
    if not architectures or not runtimes:
        return f"{nvcc} comes without {'libcudart' if architectures else 'an architecture that the kernels are for'}"
    return Toolkit(nvcc, str(runtimes[0].resolve()), architectures)


def build_arguments() -> dict:
    compiler = find_compiler()
    if compiler is None:
        print("mmkernels: no C++ compiler found (CXX, g++, clang++, c++): installing without the compiled kernels")
        return {}
    from torch.utils import cpp_extension

    found = find_toolkit()
    if isinstance(found, str):
        if os.environ.get("FORCE_CUDA") == "1":
            raise SystemExit(f"mmkernels: FORCE_CUDA=1, but {found}")
        print(f"mmkernels: building without the CUDA kernels: {found}")
    toolkit = None if isinstance(found, str) else found

    sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/cpu.cpp"))
    headers = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/**/*.h"))
    kernels = sorted(ROOT.glob("csrc/*/cpu_kernels.cpp"))
    cuda_kernels = sorted(ROOT.glob("csrc/*/cuda.cu"))
    cuda_sources = sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("csrc/*/cuda.cpp"))
    extension = cpp_extension.CppExtension(
        "mmkernels._C",
        sources,
        depends=[*headers, *cuda_sources, *(str(k.relative_to(ROOT)) for k in [*kernels, *cuda_kernels])],
        # at::parallel_for runs on one thread unless its caller is compiled with OpenMP.
        extra_compile_args={"cxx": [*FLAGS, "-fopenmp"]},
        extra_link_args=["-fopenmp"],
        py_limited_api=True,
    )

    class Build(cpp_extension.BuildExtension):
        """Compiles the variants of the kernels, which need no torch header, before the rest."""

        def build_extension(self, ext):
            jobs = [(kernel, variant) for kernel in kernels for variant in VARIANTS]
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
                cuda = [] if toolkit is None else [pool.submit(self.compile_cuda, kernel) for kernel in cuda_kernels]
                ext.extra_objects = list(pool.map(self.compile_variant, jobs))
            try:
                ext.extra_objects += [job.result() for job in cuda]
                if toolkit is not None:
                    ext.sources += cuda_sources
                    ext.extra_objects.append(toolkit.runtime)
            except subprocess.CalledProcessError as error:
                if os.environ.get("FORCE_CUDA") == "1":
                    raise
                print(f"mmkernels: building without the CUDA kernels: {error}")
            super().build_extension(ext)

        def compile_variant(self, job):
            kernel, variant = job
            flags = [*FLAGS, *VARIANTS[variant], f"-DMMK_VARIANT={variant}"]
            return self.compile_apart(kernel, f"{kernel.parent.name}_{variant}.o", [*compiler.split(), *flags])

        def compile_cuda(self, kernel):
            codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in toolkit.architectures]
            codes.append(f"-gencode=arch=compute_{toolkit.architectures[-1]},code=compute_{toolkit.architectures[-1]}")
            host = ["-ccbin", compiler] if os.environ.get("CXX") else []
            return self.compile_apart(
                kernel, f"{kernel.parent.name}_cuda.o", [toolkit.nvcc, *NVCC_FLAGS, *host, *codes]
            )

        def compile_apart(self, kernel, name, command):
            target = Path(self.build_temp).absolute() / name
            inputs = [kernel, *kernel.parent.glob("*.h"), *ROOT.glob("csrc/common/*.h")]
            if not target.exists() or target.stat().st_mtime < max(p.stat().st_mtime for p in inputs):
                target.parent.mkdir(parents=True, exist_ok=True)
                subprocess.run([*command, "-c", str(kernel), "-o", str(target)], check=True)
            return str(target)

    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build.with_options(use_ninja=False)}}


setup(**build_arguments())
