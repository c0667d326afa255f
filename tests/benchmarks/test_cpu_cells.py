"""A CPU's report goes on where it was, and spares a peer that was hopeless in a smaller cell."""

import math

from benchmarks.harness.cpu_cells import Cells, hopeless


def test_a_cell_that_is_measured_is_not_measured_again(tmp_path):
    asked = []

    def measure(cell, skip):
        asked.append(cell)
        return [{"n": cell[1], "loss": "mmkernels", "seconds": 1.0}]

    path, cells = tmp_path / "rows.jsonl", [("float32", 1), ("float32", 2)]
    assert Cells(path, {}).measure(cells, "loss", measure, -math.inf) is None  # the time is over before it begins
    assert Cells(path, {}).measure(cells[:1], "loss", measure, math.inf) is not None
    rows = Cells(path, {}).measure(cells, "loss", measure, math.inf)
    assert asked == cells
    assert [row["n"] for row in rows] == [1, 2]


def test_a_peer_that_was_too_slow_is_skipped_in_larger_cells_alone():
    rows = [{"loss": "eager", "seconds": 24.0, "once": True}, {"loss": "near", "seconds": 24.0}]
    measured = [(("bfloat16", 512, 50257), rows)]
    assert hopeless(measured, ("bfloat16", 2048, 50257), "loss") == {"eager"}
    assert hopeless(measured, ("bfloat16", 2048, 9488), "loss") == set()
    assert hopeless(measured, ("float32", 2048, 50257), "loss") == set()
