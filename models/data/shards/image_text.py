"""Captioned images in shards: batches that are read as training goes, and small sets in memory to evaluate on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from models.data.augment import Augment
from models.data.batches import Batch, generator_of
from models.data.folder import CAPTION_COLUMNS, gather, splits_of_images
from models.data.rows import Row, column
from models.data.sets import BadDataError, BadDataLog, Splits, decode_image
from models.data.shards.index import CLASS, FIELDS, IMAGE, TEXT
from models.data.shards.order import Order
from models.data.shards.samples import Samples, open_shards, rows_of
from models.data.share import ALL, Draws, Share

_KINDS = (IMAGE, TEXT, FIELDS, CLASS)
# Samples of a split that are read into memory: enough to evaluate on, and for a baseline of pixels.
MOST = 20_000


@dataclass
class ShardData:
    """Samples that stay in their shards, to train on."""

    train: Samples
    notes: list[str]


def open_shard_data(source: str, bad: BadDataLog) -> ShardData:
    """The training samples of shards; nothing but the indices is read."""
    opened = open_shards(source, bad, media=IMAGE)
    counts = ", ".join(f"{len(samples)} for {split}" for split, samples in opened.items())
    return ShardData(opened["train"], [f"{source}: samples {counts}, in {len(opened['train'].indices)} shards"])


def load_shards(source: str, size: int, bad: BadDataLog | None = None, *, most: int = MOST) -> Splits:
    """Images and captions in memory, as :func:`models.data.folder.load_folder` reads them: ``most`` of each split."""
    bad = bad if bad is not None else BadDataLog()
    opened = open_shards(source, bad, media=IMAGE)
    kept = {split: samples.few(most) for split, samples in opened.items()}
    numbers = {samples.name(row): (samples, row) for samples in kept.values() for row in range(len(samples))}

    def rows() -> Iterator[tuple[str, str, Row]]:
        for split, samples in kept.items():
            for row in range(len(samples)):
                name = samples.name(row)
                (parts,) = samples.read([row], (TEXT, FIELDS, CLASS))
                try:
                    found = rows_of(name, _good(parts))
                except BadDataError as error:
                    bad.report(name, str(error).removeprefix(f"{name}: "))
                    continue
                yield from ((name, name, own | {"split": split}) for own in found)

    def read(name: str) -> Tensor:
        samples, row = numbers[name]
        (parts,) = samples.read([row], (IMAGE,))
        return decode_image(_good(parts)[IMAGE], size, name=name)

    splits = splits_of_images(source, gather(source, rows(), read, bad))
    for split, samples in opened.items():
        if len(samples) > most:
            splits.notes.append(f"{split}: {most} of {len(samples)} samples are read")
    return splits


def _good(parts: dict[int, bytes] | BadDataError) -> dict[int, bytes]:
    if isinstance(parts, BadDataError):
        raise parts
    return parts


Fault = tuple[str, str]  # the name of a sample, and what is wrong with it


class Pair(NamedTuple):
    """An image, uint8 [4, S, S], and its captions."""

    pixels: Tensor
    captions: list[str]
    row: int


class ShardPlan:
    """Batches of captioned images as a function of the step, read from shards as they are asked for.

    A batch is a slice of the epoch's :class:`Order`, and a rank takes its :class:`Share` of it: together the ranks have
    the same batch at any number of ranks, augmentation included. So a run goes on at any step, on any number of ranks,
    and keeps no state for that. A sample that cannot be read is reported to ``bad`` once, and the next good one of its
    shard takes its place.

    While a step is computed the next batch is read by ``threads`` threads. Worker processes do as well:
    ``DataLoader(plan, sampler=[(step, share) for step in steps], batch_size=None, num_workers=4)``.
    """

    def __init__(
        self,
        samples: Samples,
        tokenizer: Callable[[Sequence[str]], Tensor],
        augment: Augment,
        bad: BadDataLog,
        *,
        size: int,
        batch_size: int,
        views: int = 1,
        texts: int = 1,
        seed: int = 0,
        threads: int = 4,
    ) -> None:
        self.samples, self.tokenizer, self.augment, self.bad = samples, tokenizer, augment, bad
        self.size, self.batch_size, self.views, self.texts, self.seed = size, batch_size, views, texts, seed
        self.steps_per_epoch = len(samples) // batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"batch size {batch_size} exceeds the {len(samples)} samples of an epoch: choose a smaller"
            )
        self.order = Order(samples.places[:, 0], seed)
        self.threads = threads
        self._broken: dict[int, BadDataError] = {}
        self._reader: ThreadPoolExecutor | None = None  # begins with the first batch, in the process that asks for it
        self._ahead: dict[tuple[int, Share], Future[tuple[list[Pair], list[Fault]]]] = {}

    def rows(self, step: int, share: Share = ALL) -> Tensor:
        """The rows of a step, before damaged ones are replaced."""
        epoch, index = divmod(step, self.steps_per_epoch)
        rows = self.order(epoch, index * self.batch_size, (index + 1) * self.batch_size)
        return rows[share.rows(self.batch_size)]

    def __call__(self, step: int, share: Share = ALL) -> Batch:
        """The batch of one step, or a rank's share of it."""
        if self._reader is None:
            self._reader = ThreadPoolExecutor(1)
        reading = self._ahead.get((step, share)) or self._reader.submit(self._read, step, share)
        part = (share.part + 1) % share.parts
        after = (step if part else step + 1, replace(share, part=part))
        self._ahead = {after: self._reader.submit(self._read, *after)}
        pairs, faults = reading.result()
        for fault in faults:
            self.bad.report(*fault)
        generator, own = generator_of(self.seed, 2, step), share.rows(self.batch_size)
        chosen = torch.rand(self.texts, self.batch_size, generator=generator, dtype=torch.float64)[:, own]
        captions = [
            pair.captions[int(at * len(pair.captions))]
            for of_pairs in chosen.tolist()
            for at, pair in zip(of_pairs, pairs, strict=True)
        ]
        images = torch.stack([pair.pixels for pair in pairs]).repeat(self.views, 1, 1, 1)
        places = torch.arange(self.views * self.batch_size).view(self.views, -1)[:, own].reshape(-1)
        images = self.augment(images, Draws(generator, self.views * self.batch_size, places))
        ids = torch.tensor([pair.row for pair in pairs])
        return Batch(images.unflatten(0, (self.views, -1)), self.tokenizer(captions), ids)

    def __getitem__(self, of: tuple[int, Share]) -> Batch:
        return self(*of)

    def _read(self, step: int, share: Share) -> tuple[list[Pair], list[Fault]]:
        """The pairs of a step, and the bad samples that were met."""
        rows = self.rows(step, share).tolist()
        parts = self.samples.read(rows, _KINDS)
        with ThreadPoolExecutor(self.threads) as pool:
            found = list(pool.map(self._pair, rows, parts))
        pairs: list[Pair] = []
        faults: list[Fault] = []
        for row, pair in zip(rows, found, strict=True):
            tries = 0
            while isinstance(pair, BadDataError):
                self._broken[row] = pair
                name = self.samples.name(row)
                faults.append((name, str(pair).removeprefix(f"{name}: ")))
                tries += 1
                if tries == len(self.samples):
                    raise BadDataError(f"none of the {tries} samples can be read; the last: {pair}")
                row = (row + 1) % len(self.samples)
                pair = self._broken.get(row) or self._pair(row, *self.samples.read([row], _KINDS))
            pairs.append(pair)
        return pairs, faults

    def _pair(self, row: int, parts: dict[int, bytes] | BadDataError) -> Pair | BadDataError:
        name = self.samples.name(row)
        try:
            texts = rows_of(name, _good(parts))
            pixels = decode_image(_good(parts)[IMAGE], self.size, name=name)
        except BadDataError as error:
            return error
        return Pair(pixels, list(dict.fromkeys(column(text, CAPTION_COLUMNS) for text in texts)), row)
