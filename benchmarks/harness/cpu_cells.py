"""The cells of a CPU's report, each on disk as soon as it is measured: a run that is cut off goes on where it was."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness.row_log import RowLog
from benchmarks.harness.tables import Row

# A peer that is not repeated (SLOW in timing.py) and takes longer is not called at all in larger cells.
PATIENCE = 10.0

Cell = tuple[Any, ...]


def covers(larger: Cell, cell: Cell) -> bool:
    """Whether two cells differ in their sizes alone, and no size of the first is smaller."""
    is_size = [type(x) is int for x in cell]
    return len(larger) == len(cell) and all(
        x >= y if size else x == y for x, y, size in zip(larger, cell, is_size, strict=True)
    )


def hopeless(measured: Iterable[tuple[Cell, Sequence[Row]]], cell: Cell, who: str) -> set[str]:
    """The peers, named under the key `who`, that were too slow in a smaller cell."""
    return {
        row[who]
        for smaller, rows in measured
        if covers(cell, smaller)
        for row in rows
        if "once" in row and row["seconds"] > PATIENCE
    }


class Cells:
    """Measures the cells of an op one by one until a deadline, and keeps those that are done in a file."""

    def __init__(self, path: Path, under: Mapping[str, Any]) -> None:
        self.log = RowLog(path)
        self.log.begin(under)
        self.done = {entry["cell"]: entry for entry in self.log.rows()}

    def measure(
        self, cells: Iterable[Cell], who: str, measure: Callable[[Cell, set[str]], list[Row]], deadline: float
    ) -> list[Row] | None:
        """The rows of all cells, or None where the time was over before the last was begun."""
        found: list[tuple[Cell, Sequence[Row]]] = []
        for cell in cells:
            if str(cell) not in self.done:
                if time.monotonic() > deadline:
                    return None
                start = time.monotonic()
                rows = measure(cell, hopeless(found, cell, who))
                entry = {"cell": str(cell), "took": time.monotonic() - start, "rows": rows}
                self.log.add(entry)
                self.done[str(cell)] = entry
            found.append((cell, self.done[str(cell)]["rows"]))
        return [row for _, rows in found for row in rows]

    def seconds(self) -> float:
        """What the measured cells took."""
        return sum(entry["took"] for entry in self.done.values())

    def close(self) -> None:
        """The next run measures anew."""
        self.log.path.unlink()
