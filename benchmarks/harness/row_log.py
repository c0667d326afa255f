"""Rows of a long measurement, on disk as soon as each is there: a run that is cut off loses none, and goes on."""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

import mmkernels
from benchmarks.harness.tables import Row


def checksum() -> str:
    """Of the package's sources and of its library: rows of other kernels are no rows of these."""
    package = Path(mmkernels.__file__).parent
    sources = [path for kind in ("*.py", "*.so") for path in sorted(package.rglob(kind))]
    return f"{crc32(b''.join(path.read_bytes() for path in sources)):08x}"


class RowLog:
    """A file of rows, a line of JSON each; its first line says under what they were measured.

    A file that was measured under something else is set aside under another name, and a new one begun.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, under: Mapping[str, Any]) -> Path | None:
        """Makes the file unless it is there; where an older one was set aside, if one was."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        aside = None
        if self.path.exists():
            if self._lines()[:1] == [{"under": dict(under)}]:
                if not self.path.read_text().endswith("\n"):  # cut off there: the next row gets a line of its own
                    self._append("\n")
                return None
            names = (self.path.with_stem(f"{self.path.stem}-{number}") for number in itertools.count(1))
            aside = self.path.rename(next(name for name in names if not name.exists()))
        self.path.write_text(json.dumps({"under": dict(under)}) + "\n")
        return aside

    def add(self, row: Row) -> None:
        # One write of one line: rows of several processes do not mix.
        self._append(json.dumps(row) + "\n")

    def under(self) -> Mapping[str, Any]:
        return self._lines()[0]["under"]

    def rows(self) -> list[Row]:
        return self._lines()[1:]

    def _append(self, text: str) -> None:
        with self.path.open("a") as file:
            file.write(text)

    def _lines(self) -> list[Row]:
        """Whole lines alone: the last may have been cut off."""
        found = []
        for line in self.path.read_text().splitlines():
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return found
