"""The order of the rows in each epoch, as a function of (seed, epoch): any part of it is known without the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from models.data.batches import generator_of

# Shards whose rows are mixed with each other: the reads of some steps stay within as many files.
WINDOW = 16


class Order:
    """Shards in a random order, and in each ``window`` of them all rows in a random order.

    ``shards`` is the shard of each row, never falling. One permutation of all rows would open any file at any time;
    here the shuffle is whole up to ``window`` shards, and past that a row meets those of other shards in each epoch.
    """

    def __init__(self, shards: Tensor, seed: int, window: int = WINDOW) -> None:
        self.seed, self.window = seed, window
        self._counts = torch.unique_consecutive(shards, return_counts=True)[1]
        self._firsts = self._counts.cumsum(0) - self._counts
        self._mixed: dict[tuple[int, int], Tensor] = {}

    def __call__(self, epoch: int, first: int, last: int) -> Tensor:
        """The rows at the places ``first`` to ``last`` of an epoch."""
        windows = torch.randperm(len(self._counts), generator=generator_of(self.seed, 4, epoch)).split(self.window)
        found, start = [], 0
        for number, shards in enumerate(windows):
            end = start + int(self._counts[shards].sum())
            if start < last and first < end:
                rows = self._window(epoch, number, shards)
                found.append(rows[max(0, first - start) : last - start])
            start = end
        return torch.cat(found)

    def _window(self, epoch: int, number: int, shards: Tensor) -> Tensor:
        if (epoch, number) not in self._mixed:
            while len(self._mixed) > 1:  # a batch may lie in two windows
                self._mixed.pop(next(iter(self._mixed)))
            own = zip(self._firsts[shards].tolist(), self._counts[shards].tolist(), strict=True)
            rows = torch.cat([torch.arange(first, first + count) for first, count in own])
            mixed = torch.randperm(len(rows), generator=generator_of(self.seed, 5, epoch, number))
            self._mixed[epoch, number] = rows[mixed]
        return self._mixed[epoch, number]
