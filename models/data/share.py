"""The part of every batch that one of several ranks takes: together they see what one process would."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Share:
    """Rank ``rank`` of ``ranks`` takes an equal run of each batch's rows, or one less.

    Where a batch is taken in ``parts``, one after the other, the ranks share each of them.
    """

    rank: int = 0
    ranks: int = 1
    part: int = 0
    parts: int = 1

    def rows(self, count: int) -> slice:
        """Which rows of ``count`` are this rank's."""
        first, last = count * self.part // self.parts, count * (self.part + 1) // self.parts
        if last - first < self.ranks:
            raise ValueError(f"a batch of {last - first} rows has none for some of {self.ranks} ranks: run fewer")
        return slice(*(first + (last - first) * rank // self.ranks for rank in (self.rank, self.rank + 1)))

    def weight(self, count: int) -> float:
        """What the mean over this rank's rows counts, so that the mean over ranks is that over all ``count`` rows."""
        own = self.rows(count)
        return (own.stop - own.start) * self.ranks / count


ALL = Share()


@dataclass
class Draws:
    """Random numbers for the rows at hand, drawn for the whole batch: no row depends on who else takes which rows."""

    generator: torch.Generator
    count: int  # rows of the whole batch
    own: Tensor | slice | None = None  # those at hand; None: all

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """Numbers from ``low`` to ``high``, [rows at hand, *shape]."""
        drawn = torch.rand((self.count, *shape), generator=self.generator) * (high - low) + low
        return drawn if self.own is None else drawn[self.own]
