"""A part of a file that is read as if it were a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from models.data.sets import BadDataError


@dataclass(frozen=True)
class FilePart:
    """``size`` bytes of a file from ``start`` on; errors call it ``name``."""

    path: Path
    start: int
    size: int
    name: str

    def __str__(self) -> str:
        return self.name

    def read(self, descriptor: int | None = None) -> bytes:
        """Its bytes, from the file's open ``descriptor`` if there is one; raises :class:`BadDataError`."""
        try:
            if descriptor is not None:
                data = os.pread(descriptor, self.size, self.start)
            else:
                with open(self.path, "rb") as file:
                    file.seek(self.start)
                    data = file.read(self.size)
        except OSError as error:
            raise BadDataError(f"{self.name}: cannot be read ({error.strerror or error})") from error
        if len(data) < self.size:
            raise BadDataError(f"{self.name}: breaks off: {self.path.name} has become shorter")
        return data
