"""Installing: what setup.py builds with which compiler, and what an editable install leaves behind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import setup

ROOT = Path(__file__).parents[1]
needs_compiler = pytest.mark.skipif(setup.find_compiler() is None, reason="no C++ compiler")


def test_without_a_compiler_the_package_builds_and_runs_the_reference(source):
    environment = {**os.environ, "PATH": "/nonexistent", "CXX": ""}
    command = [sys.executable, "setup.py", "build"]
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "no C++20 compiler found" in result.stdout
    assert not list(source.rglob("_C*"))
    code = (
        "import torch, mmkernels, mmkernels._backends as b\n"
        "print(mmkernels.info_nce(torch.ones(2, 2), torch.ones(2, 2), 1.).item(), b.unavailable('cpu'))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("0.693")
    assert "installed without a C++ compiler" in run.stdout


def test_forced_cuda_without_a_toolkit_is_refused(source):
    environment = {**os.environ, "FORCE_CUDA": "1", "CUDA_HOME": "/nonexistent"}
    command = [sys.executable, "setup.py", "build_ext"]
    result = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "FORCE_CUDA=1, but no CUDA toolkit was found" in result.stderr


def older_compiler(folder: Path, *unknown: str) -> str:
    """A compiler that refuses the flags, and is else the one that is here."""
    script = folder / "older-g++"
    refused = "|".join(unknown)
    script.write_text(
        f'#!/bin/sh\nfor flag; do case $flag in {refused}) exit 1;; esac; done\nexec {setup.find_compiler()} "$@"\n'
    )
    script.chmod(0o755)
    return str(script)


@needs_compiler
def test_an_older_compiler_loses_the_instruction_sets_that_it_does_not_know(tmp_path, capsys):
    compiler = older_compiler(tmp_path, "-mavx512bf16")
    known = setup.variants_of(compiler)
    assert list(known) == [name for name in setup.VARIANTS if name != "avx512bf16"]
    if known != setup.VARIANTS:
        assert f"building without avx512bf16: {compiler} does not know" in capsys.readouterr().out
    assert list(setup.variants_of(older_compiler(tmp_path, "-mavx*"))) == ["portable"]


@needs_compiler
def test_a_compiler_without_the_language_is_passed_over(tmp_path, monkeypatch, capsys):
    compiler = older_compiler(tmp_path, "-std=c++20")
    monkeypatch.setenv("CXX", compiler)
    assert setup.find_compiler() not in (None, compiler)
    assert f"{compiler} is too old" in capsys.readouterr().out


@needs_compiler
def test_a_library_without_an_instruction_set_links_and_runs(tmp_path):
    """What csrc/common/dispatch.h declares for the missing set is never asked for."""
    source = tmp_path / "op.cpp"
    source.write_text(
        '#include <cstdio>\n#include "common/dispatch.h"\nnamespace mmkernels {\n'
        "struct Kernels { const char* name; };\n"
        "MMK_VARIANTS(Kernels, kernels)\n"
        'const Kernels portable::kernels{"portable"};\n}\n'
        "int main() { std::puts(mmkernels::kernels_here().name); }\n"
    )
    program = tmp_path / "op"
    flags = ["-std=c++20", "-O0", f"-I{ROOT / 'csrc'}", "-o", str(program)]
    subprocess.run([*(setup.find_compiler() or "").split(), str(source), *flags], check=True)

    def run(**environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(program, env=environment, capture_output=True, text=True, check=False)

    assert run().stdout == "portable\n"
    assert "the library was built without avx512bf16" in run(MMKERNELS_CPU="avx512bf16").stderr


def test_an_editable_install_is_a_plain_path(source):
    """mypy reads it, and Python started beside a clone named mmkernels takes the package, not the folder."""
    code = "from setuptools.build_meta import build_editable; build_editable('wheels')"
    (source / "wheels").mkdir()
    environment = {**os.environ, "PATH": "/nonexistent", "CXX": ""}
    subprocess.run([sys.executable, "-c", code], cwd=source, env=environment, capture_output=True, check=True)
    site = source / "wheels" / "site"
    shutil.unpack_archive(next((source / "wheels").glob("*.whl")), site, "zip")
    lines = [file.read_text().strip() for file in site.glob("*.pth")]
    assert lines == [str(source)]
    # -S and -E leave out what this environment has installed.
    find = f"import site; site.addsitedir({str(site)!r}); from importlib.util import find_spec"
    command = [sys.executable, "-S", "-E", "-c", f"{find}; print(find_spec('mmkernels').origin)"]
    found = subprocess.run(command, cwd=source.parent, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == str(source / "mmkernels" / "__init__.py")


def test_an_older_setuptools_is_named(source):
    """A new environment of Python 3.11 brings 65."""
    code = (
        "import runpy, setuptools\nsetuptools.__version__ = '65.5.0'\nrunpy.run_path('setup.py', run_name='__main__')"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "expected setuptools 77 or newer, got 65.5.0" in result.stderr
    assert "pip install" in result.stderr
