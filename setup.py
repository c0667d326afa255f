"""Builds mmkernels._C: the CPU kernels where there is a C++ compiler, the CUDA kernels where there is a toolkit.

No GPU is looked for: the CUDA kernels are built where there is nvcc (CUDA_HOME, or on the path) of the CUDA release
that torch is built for. FORCE_CUDA=1 asks for them, and the build fails where it cannot have them; FORCE_CUDA=0 leaves
them out. Without a C++ compiler the package is installed without the library, and a compiler that does not know an
instruction set builds the library without it. `python -m mmkernels.info` says what is missing.
"""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent
# pip gives every build a new temporary folder. Objects stay here instead, so that a second build compiles what changed.
OBJECTS = ROOT / "build" / "objects"
# One source, compiled once for each instruction set; csrc/common/dispatch.h chooses at run time.
VARIANTS: dict[str, list[str]] = {"portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    # x86-64-v3 and x86-64-v4, spelled out for compilers older than g++ 11 and clang 12.
    _V3 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mmovbe"]
    _V4 = [*_V3, "-mavx512f", "-mavx512bw", "-mavx512cd", "-mavx512dq", "-mavx512vl"]
    VARIANTS |= {"avx2": _V3, "avx512": _V4, "avx512bf16": [*_V4, "-mavx512bf16"]}
# No contraction: the logits must round alike in the forward and the backward pass. The code writes fma where it wants.
FLAGS = ["-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off"]
# at::parallel_for runs on one thread unless its caller is compiled with OpenMP.
TORCH_FLAGS = [*FLAGS, "-fopenmp", "-DNDEBUG"]


def knows(compiler: str, flags: list[str]) -> bool:
    """Whether the compiler takes the flags."""
    command = [*compiler.split(), *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def find_compiler() -> str | None:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        if name and shutil.which(name.split()[0]):
            if knows(name, FLAGS):
                return name
            print(f"mmkernels: {name} is too old: it does not know {' '.join(FLAGS)}")
    return None


def variants_of(compiler: str) -> dict[str, list[str]]:
    """The instruction sets that the compiler knows, and their flags."""
    known = {variant: flags for variant, flags in VARIANTS.items() if knows(compiler, flags)}
    for variant in VARIANTS.keys() - known.keys():
        print(f"mmkernels: building without {variant}: {compiler} does not know {' '.join(VARIANTS[variant])}")
    return known


class Job(NamedTuple):
    """One run of a compiler: from a source to an object in OBJECTS."""

    source: Path
    variant: str
    command: tuple[str, ...]

    @property
    def object(self) -> Path:
        return OBJECTS / f"{self.source.parent.name}_{self.source.name}{self.variant and '_' + self.variant}.o"

    def is_done(self) -> bool:
        """Whether the object is there, from this command, and younger than every file that the compiler read."""
        try:
            command, *files = json.loads(self.object.with_suffix(".json").read_text())
            made = self.object.stat().st_mtime
            return command == [*self.command] and all(Path(file).stat().st_mtime < made for file in files)
        except (OSError, ValueError):
            return False

    def run(self) -> str:
        if not self.is_done():
            record, dependencies = self.object.with_suffix(".json"), self.object.with_suffix(".d")
            record.unlink(missing_ok=True)
            print(f"mmkernels: compiling {self.object.stem}", flush=True)
            output = ["-MD", "-MF", str(dependencies), "-o", str(self.object)]
            subprocess.run([*self.command, "-c", str(self.source), *output], check=True)
            # "object: file file \\ file": a line goes on after a backslash, and one stands before a space in a name.
            files = re.findall(r"(?:\\.|[^\s\\])+", dependencies.read_text().partition(": ")[2])
            record.write_text(json.dumps([self.command, *(re.sub(r"\\(.)", r"\1", file) for file in files)]))
        return str(self.object)


# mmkernels/_backends.py looks for it in the library's bytes before it loads the library.
FINGERPRINT = 'extern "C" __attribute__((used, visibility("default"))) const char mmkernels_schemas[] = "{}";\n'


def read_fingerprint() -> str:
    """The fingerprint of the schemas that the kernels implement, from the package that lies here."""
    sys.path.insert(0, str(ROOT))
    import mmkernels._library

    return mmkernels._library.fingerprint()


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
        print("mmkernels: no C++20 compiler found (CXX, g++, clang++, c++): installing without the compiled kernels")
        return {}
    from torch.utils import cpp_extension

    found = find_toolkit()
    if isinstance(found, str):
        if os.environ.get("FORCE_CUDA") == "1":
            raise SystemExit(f"mmkernels: FORCE_CUDA=1, but {found}")
        print(f"mmkernels: building without the CUDA kernels: {found}")
    toolkit = None if isinstance(found, str) else found
    variants = variants_of(compiler)
    has_variants = [f"-DMMK_HAS_{variant.upper()}=1" for variant in variants]

    def torch_job(source: Path) -> Job:
        includes = [f"-I{path}" for path in cpp_extension.include_paths()]
        return Job(source, "", (*compiler.split(), *TORCH_FLAGS, *has_variants, *includes))

    # The kernels include no torch header: plain data goes between them and the op's cpu.cpp.
    kernels = [ROOT / "csrc/common/engine.cpp", *ROOT.glob("csrc/*/cpu_kernels*.cpp")]
    jobs = [
        Job(kernel, variant, (*compiler.split(), *FLAGS, *flags, f"-DMMK_VARIANT={variant}"))
        for kernel in kernels
        for variant, flags in variants.items()
    ]
    # Torch's headers take most of a cpu.cpp's time: one by one the eight take 76 s, as one source 15. So each has a
    # namespace of its own.
    torch_side = OBJECTS / "all" / "cpu.cpp"
    jobs.insert(0, torch_job(torch_side))
    cuda_jobs = []
    if toolkit is not None:
        last = toolkit.architectures[-1]
        codes = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in toolkit.architectures]
        codes.append(f"-gencode=arch=compute_{last},code=compute_{last}")
        host = ["-ccbin", compiler] if os.environ.get("CXX") else []
        cuda_jobs = [Job(k, "", (toolkit.nvcc, *NVCC_FLAGS, *host, *codes)) for k in ROOT.glob("csrc/*/cuda.cu")]
        cuda_jobs += map(torch_job, ROOT.glob("csrc/*/cuda.cpp"))

    class Build(build_ext):
        """Compiles everything in one pool, what takes longest first, then links."""

        def build_extension(self, ext):
            torch_side.parent.mkdir(parents=True, exist_ok=True)
            source = "".join(f'#include "{path}"\n' for path in sorted(ROOT.glob("csrc/*/cpu.cpp")))
            source += FINGERPRINT.format(read_fingerprint())
            if not torch_side.exists() or torch_side.read_text() != source:
                torch_side.write_text(source)
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", os.cpu_count() or 1))) as pool:
                running = {job: pool.submit(job.run) for job in [*cuda_jobs, *jobs]}
            ext.extra_objects = [running[job].result() for job in jobs]
            try:
                cuda_objects = [running[job].result() for job in cuda_jobs]
                ext.extra_objects += [*cuda_objects, *([] if toolkit is None else [toolkit.runtime])]
            except subprocess.CalledProcessError as error:
                if os.environ.get("FORCE_CUDA") == "1":
                    raise
                print(f"mmkernels: building without the CUDA kernels: {error}")
            self.force = True  # links even if no source of its own is newer: it has none
            super().build_extension(ext)

    extension = cpp_extension.CppExtension(
        "mmkernels._C",
        [],
        depends=[str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("csrc/**/*.*"))],
        extra_link_args=["-fopenmp"],
        py_limited_api=True,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build}}


if __name__ == "__main__":
    # A new environment of Python 3.10 or 3.11 brings 65, which stops at a line of pyproject.toml and names no remedy.
    if int(setuptools.__version__.partition(".")[0]) < 77:
        raise SystemExit(
            f"mmkernels: expected setuptools 77 or newer, got {setuptools.__version__}: "
            "pip install --upgrade 'setuptools>=77', then install with --no-build-isolation"
        )
    setup(**build_arguments())
