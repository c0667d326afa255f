"""Every figure is drawn from its numbers alone."""

import shutil

import pytest
import torch

for package in ("matplotlib", "rich", "triton", "typer"):
    pytest.importorskip(package)

from benchmarks import report
from benchmarks.harness import figures
from benchmarks.harness.tables import Comparison
from benchmarks.registry import FOLDERS


def test_every_figure_is_drawn_without_asking_the_machine(tmp_path, monkeypatch):
    """The threads that a figure names are those of the run, not of the machine that draws."""

    def asked():
        raise AssertionError("a figure asked torch for its threads")

    for folder in FOLDERS:
        shutil.copy(report.ROOT / report.NUMBERS / f"{folder}.json", tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", asked)
    report.draw_again(FOLDERS, tmp_path)
    assert {path.stem for path in tmp_path.glob("*.png")} == {*FOLDERS, "front"}


def test_a_figure_names_the_machine_of_its_numbers():
    assert figures.on({"processor": "EPYC 9B14", "threads": 7}) == "Measured on 7 threads of a CPU (EPYC 9B14)."
    assert figures.on({"processor": "x86_64", "threads": 2}) == "Measured on 2 threads of an x86_64 CPU."


def test_the_fastest_peer_is_no_call_of_ours_and_no_model_alone():
    names = {"mmkernels": 2.0, "mmkernels DistillClipLoss": 1.0, "the model alone": 0.5, "eager": 6.0, "faiss": 3.0}
    rows = [{"n": 1, "name": name, "seconds": seconds} for name, seconds in names.items()]
    comparison = Comparison(("n",), "name")
    (cell,) = comparison.cells(rows)
    assert comparison.peers(cell) == ["faiss", "eager"]
    assert comparison.ratio(cell, "eager") == 3


def test_memory_is_shown_where_it_is_asked_for():
    comparison = Comparison(("n",), "name")
    rows = [{"n": 1, "name": name, "seconds": 1.0, "bytes": 2**20} for name in ("mmkernels", "eager")]
    first = ("N", lambda row: str(row["n"]))
    assert "memory: mmkernels" not in comparison.table(rows, first, {"eager": "eager"}).columns
    table = comparison.table(rows, first, {"eager": "eager"}, {"eager": "eager"})
    assert table.columns[-2:] == ["memory: mmkernels", "eager"]
    assert table.rows[0][-2:] == ["1.0 MiB", "1.0 MiB"]
