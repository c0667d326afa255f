"""The samples of many shards as one list, of which any is read by its number."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from rich.progress import track
from torch import Tensor

from models.common.console import console
from models.data.folder import CAPTION_COLUMNS, LANGUAGE_COLUMNS
from models.data.rows import Row, column, mend, object_rows
from models.data.sets import BadDataError, BadDataLog
from models.data.shards.index import CLASS, FIELDS, IMAGE, TEXT, VIDEO, Index, read_index
from models.data.shards.names import shard_paths, splits_of
from models.data.shards.part import FilePart

_THREADS = 8  # that read indices


@dataclass
class Samples:
    """Some samples of some shards, in the order of the shards and of the members in each."""

    indices: Sequence[Index]
    places: Tensor  # [n, 2], a shard and a sample of it

    def __len__(self) -> int:
        return len(self.places)

    def name(self, row: int) -> str:
        """A sample's name in errors."""
        shard, sample = self.places[row].tolist()
        return self.indices[shard].name(sample)

    def part(self, row: int, kind: int) -> FilePart | None:
        """One member of a sample; None where it has none of the kind."""
        shard, sample = self.places[row].tolist()
        start, size = self.indices[shard].places[sample, kind].tolist()
        return FilePart(self.indices[shard].path, start, size, self.indices[shard].name(sample)) if start >= 0 else None

    def read(self, rows: Sequence[int], kinds: Collection[int]) -> list[dict[int, bytes] | BadDataError]:
        """The members of some kinds of each row, or what is wrong with it; every shard is opened once."""
        found: list[dict[int, bytes] | BadDataError] = [{} for _ in rows]
        shards = self.places[torch.as_tensor(rows, dtype=torch.long), 0]
        for shard in shards.unique().tolist():
            own = [(i, rows[i]) for i in (shards == shard).nonzero().squeeze(1).tolist()]
            try:
                descriptor = os.open(self.indices[shard].path, os.O_RDONLY)
            except OSError as error:
                for i, row in own:
                    found[i] = BadDataError(f"{self.name(row)}: cannot be read ({error.strerror})")
                continue
            try:
                for i, row in sorted(own, key=lambda one: one[1]):  # as they lie in the file
                    found[i] = self._read(row, kinds, descriptor)
            finally:
                os.close(descriptor)
        return found

    def _read(self, row: int, kinds: Collection[int], descriptor: int) -> dict[int, bytes] | BadDataError:
        parts = {kind: part for kind in kinds if (part := self.part(row, kind)) is not None}
        try:
            return {kind: part.read(descriptor) for kind, part in parts.items()}
        except BadDataError as error:
            return error

    def few(self, most: int) -> Samples:
        """At most so many of them: those with the smallest hashes."""
        if len(self) <= most:
            return self
        shards, counts = self.places[:, 0].unique_consecutive(return_counts=True)
        own = zip(shards.tolist(), self.places[:, 1].split(counts.tolist()), strict=True)
        shares = torch.cat([self.indices[shard].shares[samples] for shard, samples in own])
        return Samples(self.indices, self.places[shares.argsort()[:most].sort().values])


def open_shards(source: str, bad: BadDataLog, *, media: int, validation: float = 0.0) -> dict[str, Samples]:
    """The samples of each split with an image (or a video) and its text; those that lack something go to ``bad``.

    If no shard names a split, a tenth of the samples, by the hash of their keys, is the test set, and the share
    ``validation`` the validation set.
    """
    splits = splits_of(shard_paths(source))
    with ThreadPoolExecutor(_THREADS) as pool:
        reading = pool.map(read_index, splits)
        indices = list(track(reading, "shards", len(splits), console=console, transient=True, disable=len(splits) < 50))
    found: dict[str, list[Tensor]] = {"train": [], "validation": [], "test": []}
    for shard, (index, split) in enumerate(zip(indices, splits.values(), strict=True)):
        rows = _usable(index, media, bad)
        places = torch.stack([torch.full_like(rows, shard), rows], 1)
        if split:
            found[split].append(places)
            continue
        shares = index.shares[rows]
        held = {"test": shares < 0.1, "validation": (shares >= 0.1) & (shares < 0.1 + validation)}
        for name, own in held.items():
            found[name].append(places[own])
        found["train"].append(places[~held["test"] & ~held["validation"]])
    samples = {split: Samples(indices, torch.cat(parts)) for split, parts in found.items() if sum(map(len, parts))}
    if not samples:
        what = "video with a class" if media == VIDEO else "image with a caption"
        raise BadDataError(f"{source}: no {what} in {len(splits)} shard(s){'; ' + bad.summary() if len(bad) else ''}")
    if "train" not in samples:
        raise BadDataError(f"{source}: no sample is for training")
    return samples


def _usable(index: Index, media: int, bad: BadDataLog) -> Tensor:
    """The samples of a shard that have all they need; what is wrong with it or with one of them is reported."""
    there = index.places[:, :, 0] >= 0
    shown = there[:, media]
    if media == VIDEO:
        told, lacking = torch.tensor([label != "" for label in index.labels] or [False] * len(index)), "class"
    else:
        told, lacking = there[:, TEXT] | there[:, FIELDS], "caption"
    faults = index.faults[:3] + [f"and {len(index.faults) - 3} more such places"] * (len(index.faults) > 3)
    if not shown.any():
        faults.append(f"holds no {'video' if media == VIDEO else 'image'}")
    if faults:
        bad.report(str(index.path), "; ".join(faults))
    for sample in (shown & ~told).nonzero().squeeze(1).tolist():
        bad.report(index.name(sample), f"has no {lacking}")
    return (shown & told).nonzero().squeeze(1)


def rows_of(name: str, parts: Mapping[int, bytes]) -> list[Row]:
    """A row for each caption of a sample, as a captions file would have it; raises :class:`BadDataError`."""
    try:
        texts = {kind: data.decode("utf-8-sig") for kind, data in parts.items() if kind not in (IMAGE, VIDEO)}
    except UnicodeDecodeError as error:
        raise BadDataError(f"{name}: its text is not UTF-8 ({error.reason} at byte {error.start})") from error
    rows: list[Row] = []
    if FIELDS in texts:
        try:
            fields = json.loads(texts[FIELDS])
        except (ValueError, RecursionError) as error:
            raise BadDataError(f"{name}: its fields are not JSON") from error
        rows = [row for _, row in object_rows(name, 0, fields, CAPTION_COLUMNS)]
        names = fields.get("names")
        for language, caption in names.items() if isinstance(names, dict) else ():
            rows.append({LANGUAGE_COLUMNS[0]: language, CAPTION_COLUMNS[0]: mend(str(caption))})
    said = {"label": texts[CLASS].strip()} if CLASS in texts else {}
    said |= {key: rows[0][key] for key in ("label", "group") if rows and key in rows[0]}
    captions = [mend(texts[TEXT])] if TEXT in texts else []
    rows = [dict.fromkeys(CAPTION_COLUMNS[:1], caption) for caption in captions] + rows
    rows = [row | said for row in rows if column(row, CAPTION_COLUMNS)]
    if not rows:
        raise BadDataError(f"{name}: has no caption")
    return rows
