"""What can run and why not; importing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mmkernels
from mmkernels import _backends, info
from mmkernels._library import fingerprint

ROOT = Path(__file__).parents[1]


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_info_names_every_implementation():
    result = subprocess.run([sys.executable, "-m", "mmkernels.info"], capture_output=True, text=True, check=True)
    for op, names in _backends.IMPLEMENTATIONS.items():
        assert op in result.stdout
        assert all(name in result.stdout for name in names)
    machine = subprocess.run([sys.executable, "-m", "mmkernels.info", "--json"], capture_output=True, check=True)
    assert json.loads(machine.stdout)["ops"]["info_nce"]["reference"] == "yes"


@pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason="no compiled library")
def test_info_says_that_the_compiler_was_too_old(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.setattr(torch.ops.mmkernels, "cpu_variant", lambda: "avx2")
    monkeypatch.setattr("sys.argv", ["info"])
    info.main()
    assert "did not know AVX512" in capsys.readouterr().out
    monkeypatch.setattr(torch.ops.mmkernels, "cpu_variant", lambda: "avx512")
    info.main()
    assert "did not know" not in capsys.readouterr().out


@pytest.mark.parametrize("triton", ["as installed", "missing"])
def test_import_is_quiet_and_loads_no_kernels(triton):
    code = (
        "import sys, torch\n"
        f"if {triton == 'missing'}: sys.modules['triton'] = None\n"
        "import mmkernels\n"
        "assert not [name for name in sys.modules if name.startswith('mmkernels.') and 'triton' in name], sys.modules\n"
        "assert not torch.ops.loaded_libraries, torch.ops.loaded_libraries\n"
    )
    result = python(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("version", "older"), [("3.6.0", True), ("3.7.1+git2b8a9c1", True), ("3.8.0", False), ("3.10.0", False)]
)
def test_a_triton_too_old_for_the_gpu_is_named(version, older, monkeypatch):
    """Such a machine runs the reference, with a warning, and no kernel that spills or does not compile."""
    triton = pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for major in (10, 9):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda major=major: (major, 0))
        _backends._triton_is_too_old.cache_clear()
        reason = _backends.unavailable("triton", "siglip")
        assert (
            reason is None
            if not (older and major == 10)
            else f"needs Triton 3.8 or newer (torch 2.14), this is {version}" in reason
        )
    _backends._triton_is_too_old.cache_clear()


def test_choice_is_logged_once_at_debug():
    code = (
        "import logging, torch, mmkernels\n"
        "logging.basicConfig(level=logging.DEBUG)\n"
        "logging.getLogger('torch').setLevel(logging.WARNING)\n"
        "x = torch.ones(2, 2)\n"
        "mmkernels.info_nce(x, x, 1.0); mmkernels.info_nce(x, x, 1.0)\n"
    )
    lines = [line for line in python(code).stderr.splitlines() if "mmkernels" in line]
    assert len(lines) == 1
    assert lines[0].startswith("DEBUG:mmkernels:info_nce on cpu, torch.float32: ")


@pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason="no compiled library")
def test_a_library_without_an_op_is_refused():
    assert _backends.unavailable("cpu", "info_nce") is None
    assert "the compiled library has no kernels of no_such_op" in (_backends.unavailable("cpu", "no_such_op") or "")


@pytest.mark.parametrize("changed", ["library", "schema"])
@pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason="no compiled library")
def test_a_library_of_other_sources_is_named_and_not_loaded(changed, source):
    """Loaded all the same, kernels that differ from their schema would end the process."""
    library = next((ROOT / "mmkernels").glob("_C*"))
    content = library.read_bytes()
    if changed == "library":
        mark = fingerprint().encode()
        assert content.count(mark) == 1
        content = content.replace(mark, mark[:-64] + b"0" * 64)
    else:
        ops = source / "mmkernels/info_nce/ops.py"
        ops.write_text(ops.read_text().replace("bool keep_products)", "bool keep_products, int more=0)", 1))
    (source / "mmkernels" / library.name).write_bytes(content)
    code = (
        "import json, torch, mmkernels, mmkernels.info\n"
        "for _ in range(2): assert 0.693 < mmkernels.info_nce(torch.ones(2, 2), torch.ones(2, 2), 1.) < 0.694\n"
        "print(json.dumps(mmkernels.info.collect()))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=True)
    said = (
        f"{library.name} was built from another version of the sources; install mmkernels again, or in its repository"
    )
    assert run.stderr.count(said) == 1
    assert all(said in implementations["cpu"] for implementations in json.loads(run.stdout).values())


@pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason="no compiled library")
def test_unknown_instruction_set_is_refused():
    result = python(
        "import torch, mmkernels as m; m.info_nce(torch.ones(2, 2), torch.ones(2, 2), 1.)", MMKERNELS_CPU="z80"
    )
    assert "MMKERNELS_CPU: expected avx512bf16, avx512, avx2 or portable, got z80" in result.stderr


def test_a_fall_to_the_reference_is_said_once():
    code = (
        "import torch, mmkernels, mmkernels._backends as b\n"
        "b._load_library = lambda: 'the compiled library is missing'\n"
        "x = torch.ones(2, 2)\n"
        "mmkernels.info_nce(x, x, 1.0); mmkernels.info_nce(x, x, 1.0)\n"
        "mmkernels.info_nce(x.double(), x.double(), 1.0)\n"  # no compiled kernel takes it: nothing to say
    )
    lines = [line for line in python(code).stderr.splitlines() if "eager reference" in line]
    assert lines == [
        "info_nce on cpu runs as the eager reference, for cpu cannot: the compiled library is missing",
    ]


@pytest.mark.skipif(_backends.unavailable("cpu") is not None, reason="no compiled library")
def test_functional_transforms_take_the_reference():
    queries, keys = torch.randn(2, 5, 8)
    expected = torch.func.grad(lambda x: mmkernels.siglip(x, keys, 3.0, -1.0, impl="reference"))(queries)
    assert torch.equal(torch.func.grad(lambda x: mmkernels.siglip(x, keys, 3.0, -1.0))(queries), expected)
    with pytest.raises(
        RuntimeError, match=r"mmkernels.siglip: impl='cpu' cannot run .*\n  triton: .*\n  cpu: torch.func"
    ):
        torch.func.grad(lambda x: mmkernels.siglip(x, keys, 3.0, -1.0, impl="cpu"))(queries)


@pytest.mark.parametrize("disabled", [True, False])
def test_import_leaves_torchs_logger_as_it_was(disabled):
    code = (
        "import logging\n"
        "logger = logging.getLogger('torch.utils.flop_counter')\n"
        f"logger.disabled = {disabled}\n"
        "import mmkernels\n"
        f"assert logger.disabled is {disabled}"
    )
    assert python(code).returncode == 0
