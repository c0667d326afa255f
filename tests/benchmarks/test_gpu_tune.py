"""The tuner without a GPU: which tiles it tries, what it does when one is wrong or ends its process, and all of it
against a CUDA driver that does nothing."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import gpu_check, gpu_tune, registry
from benchmarks.harness.row_log import RowLog
from benchmarks.stub_cuda import driver
from mmkernels._tiles import overrides

OPS = registry.FOLDERS
CPU = torch.device("cpu")


@pytest.fixture
def log(tmp_path):
    log = RowLog(tmp_path / "tiles.jsonl")
    log.begin({"GPU": "none"})
    return log


def test_every_slot_is_a_line_of_a_file_of_tiles():
    for slot in gpu_tune.SLOTS:
        assert slot.kernel in overrides.KERNELS[slot.owner]
        assert all(registry.gpu_bounds(slot.op).kernel(form) for form in slot.forms)
    named = [task.name for task in gpu_tune.tasks(OPS, quick=False)]
    assert len(named) == len(set(named))
    assert {task.of.op for task in gpu_tune.tasks(OPS, quick=True)} == set(OPS)


@pytest.mark.parametrize("task", gpu_tune.tasks(OPS, quick=False), ids=lambda task: task.name)
def test_the_tables_own_tile_comes_first_and_every_tile_is_a_row(task):
    tried = gpu_tune.candidates(task, "sm_90", "sm_90")
    if not tried:
        assert task.of.kernel.startswith("whole")  # streamed under some releases of Triton
        return
    own, *others = tried
    family = registry.gpu_bounds(task.of.op).cases(["sm_90"])
    assert any(gpu_tune.fields_of(case) == json.loads(own) for case in family)
    assert others
    for tile in tried:
        op, kernel, precision = task.key
        overrides.parse(json.dumps({"sm_90": {op: {kernel: {precision: json.loads(tile)}}}}))
    assert gpu_tune.sizes_of(task)


def test_the_best_predicted_is_timed_first_and_the_hopeless_never(log):
    task = gpu_tune.tasks(["siglip"], quick=True)[0]
    for tile, refused, ms in (("own", "", 2.0), ("b", "", 1.5), ("a", "", 1.0), ("c", "", 1.7), ("d", "spills", 0.1)):
        log.add({"task": task.name, "tile": tile, "refused": refused, "predicted ms": ms})
    assert gpu_tune.ordered(log.rows(), task, "own") == ["a", "b"]


def test_a_tile_that_ends_its_process_is_not_tried_again():
    rows = [{"tile": "a", "began": 1}, {"tile": "a", "x": 1.0}, {"tile": "b", "began": 1}]
    assert gpu_tune.fatal(rows) == set()
    assert gpu_tune.fatal([*rows, {"died": "its process ended with code 1"}]) == {"b"}
    assert gpu_tune.fatal([*rows, {"died": "x"}, {"tile": "c", "began": 1}, {"tile": "c", "error": "y"}]) == {"b"}


def test_who_dies_is_left_out_and_the_rest_goes_on(log, monkeypatch):
    """Two tiles end the process, the third is timed; where no tile did it, the slot is given up."""
    task = gpu_tune.tasks(["siglip"], quick=True)[0]

    def run_tasks(run, todo, processes, deadline):
        bad = gpu_tune.fatal(log.rows())
        begun = next((tile for tile in ("a", "b") if tile not in bad), None)
        if begun:
            log.add({"task": task.name, "tile": begun, "began": True})
            return [gpu_tune.argparse.Namespace(died="it died")]
        log.add({"task": task.name, "ended": True, "key": list(task.key), "winner": None})
        return [gpu_tune.argparse.Namespace(died="")]

    monkeypatch.setattr(gpu_tune, "run_tasks", run_tasks)
    assert gpu_tune._until_it_ends(log, task, CPU, 1, float("inf"))
    assert gpu_tune.fatal(log.rows()) == {"a", "b"}
    monkeypatch.setattr(gpu_tune, "run_tasks", lambda *_: [gpu_tune.argparse.Namespace(died="no memory")])
    other = gpu_tune.tasks(["triplet"], quick=True)[0]
    assert gpu_tune._until_it_ends(log, other, CPU, 1, float("inf"))
    assert log.rows()[-1]["winner"] is None
    monkeypatch.setattr(gpu_tune, "run_tasks", lambda *_: [])
    assert not gpu_tune._until_it_ends(log, other, CPU, 1, 0.0)


def test_a_file_keeps_what_was_measured_before(log, tmp_path):
    path = tmp_path / "tiles.json"
    for kernel, tile in (("pairs", '{"BLOCK_M": 64}'), ("topk", None)):
        log.add({"task": kernel, "ended": True, "key": ["retrieval", kernel, "half"], "winner": tile, "x": 0.5})
    old = {"siglip": {"pairs": {"half": {"BLOCK_N": 64}}}, "retrieval": {"topk": {"half": {"BLOCK_N": 32}}}}
    path.write_text(json.dumps({"about": overrides.measured_under(), "A GPU": old}))
    gpu_tune.write(gpu_tune.file_of(log.rows(), "A GPU", path), path)
    found = overrides.parse(path.read_text())["A GPU"]
    assert found == {("siglip", "pairs", "half"): {"BLOCK_N": 64}, ("retrieval", "pairs", "half"): {"BLOCK_M": 64}}
    path.write_text("{")
    gpu_tune.write(gpu_tune.file_of(log.rows(), "A GPU", path), path)
    assert list(overrides.parse(path.read_text())["A GPU"]) == [("retrieval", "pairs", "half")]


def test_without_a_gpu_it_says_so():
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--tune", "retrieval"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0
    assert "There is no GPU" in done.stdout
    assert gpu_check.gpu_tune is gpu_tune


@pytest.mark.skipif(shutil.which("gcc") is None, reason="the driver that does nothing is compiled")
def test_the_whole_command_against_a_driver_that_does_nothing(tmp_path, monkeypatch, capfd):
    """The fastest tile fails parity, so the next one is kept; what gains 1 % is not; the file is in use at once."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(overrides.VARIABLE, raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert driver.in_stub("tests.benchmarks.tune_rehearsal", [str(tmp_path)]) == 0
    *_, of_pass, said = capfd.readouterr().out.splitlines()
    said = json.loads(said)
    (path,) = (tmp_path / "cache" / "mmkernels" / "tiles").iterdir()
    assert path.name == "NVIDIA H0 _stub_.json"
    row = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 4, "maxnreg": None}
    assert said["file"] == {"retrieval": {"pairs": {"half": row}}}
    assert said["pairs"]["num_warps"] == 4
    rows = RowLog(tmp_path / "out" / "tiles.jsonl").rows()
    verdicts = [row["verdict"] for row in rows if "verdict" in row]
    assert verdicts[-1] == "ok"
    assert all("BLOCK_N=64" in verdict for verdict in verdicts[:-1])
    assert all(row["predicted ms"] > 0 for row in rows if row.get("refused") == "")
    # The kernels of a pass in those tiles, beside what was expected of them on half of an H100.
    ranks, positives, other = json.loads(of_pass)["pass"]
    assert ranks["bound us"] == pytest.approx(2.0 * 4096**2 * 512 / 989e12 * 1e6)
    assert 3 * ranks["bound us"] < ranks["predicted us"] < 10 * ranks["bound us"]
    assert 0 < positives["bound us"] < positives["predicted us"]
    assert other == {"kernel": "at::native::reduce_kernel", "launches": 1, "us": 9.0}
