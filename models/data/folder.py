"""A user's own folder of images with a captions file.

The captions file is CSV with a header (commas, tabs, semicolons), JSON lines, one JSON array, or COCO's or Karpathy's
captions. Each row names an image (``image``, ``file``, ``file_name``, ``filename``, ``filepath`` or ``path``, relative
to the captions file) and its caption (``caption``, ``text`` or ``title``; in JSON also a list of captions). Optional
columns: ``split`` ("train", "validation", "test"), ``label`` (a class for zero-shot evaluation), ``group`` (rows that
must not be split) and ``language`` ("de": what the caption is written in; the first caption of an image in each
language is its name there). If no row has a ``split``, a tenth of the groups, chosen by hash, is the test set.

Every image is a concept of its own, with its own captions, label and split. No batch holds two images that share a
caption, for neither is a wrong answer for it; those whose first caption is the same are a group.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from models.data.rows import Row, column, known_split, read_rows
from models.data.sets import BadDataError, BadDataLog, Concept, ImageTextSet, Splits, hash_share, read_image

IMAGE_COLUMNS = ("image", "file", "file_name", "filename", "filepath", "path")
CAPTION_COLUMNS = ("caption", "text", "title")
LANGUAGE_COLUMNS = ("language", "lang")
CAPTION_FILES = ("captions.csv", "captions.jsonl", "captions.json", "metadata.csv", "metadata.jsonl")

T = TypeVar("T")  # how an image is kept: its pixels, or a file


def images_folder(source: Path, images: Path | None) -> Path:
    """Where the files lie that a captions file names: ``images``, beside it, or where COCO keeps them.

    COCO keeps the images of ``annotations/captions_val2017.json`` in ``val2017``.
    """
    if images is not None:
        if not images.is_dir():
            raise FileNotFoundError(f"--images {images}: no such folder")
        return images
    coco = source.parent.parent / source.stem.removeprefix("captions_")
    return coco if source.stem.startswith("captions_") and coco.is_dir() else source.parent


def captions_file(path: Path) -> Path:
    """The captions file that ``path`` is, or that lies in the folder ``path``."""
    if path.is_file():
        return path
    found = next((path / name for name in CAPTION_FILES if (path / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{path} holds no captions file: expected one of {', '.join(CAPTION_FILES)}")
    return found


def load_folder(
    path: Path, size: int, bad: BadDataLog | None = None, *, test_share: float = 0.1, images: Path | None = None
) -> Splits:
    """Read images and captions; files that cannot be read are skipped with a count, or stop the run (``bad``).

    ``images`` is the folder of the images, if they do not lie beside the captions.
    """
    bad = bad if bad is not None else BadDataLog()
    source = captions_file(path)
    listed = list_captions(source, bad, images)
    found = gather(source, listed, lambda name: read_image(Path(name), size), bad)
    return splits_of_images(source, found, test_share)


def list_captions(source: Path, bad: BadDataLog, images: Path | None = None) -> Iterator[tuple[str, str, Row]]:
    """The rows of a captions file: where each stands, its image, and the row; those that lack one are reported."""
    folder = images_folder(source, images)
    for number, row in read_rows(source, bad, (IMAGE_COLUMNS, CAPTION_COLUMNS), lists=CAPTION_COLUMNS):
        where = f"{source}, line {number}"
        file, caption = column(row, IMAGE_COLUMNS), column(row, CAPTION_COLUMNS)
        if not file:
            bad.report(where, f"names no image (looked for the columns {', '.join(IMAGE_COLUMNS)})")
        elif not caption:
            bad.report(where, f"has no caption (looked for the columns {', '.join(CAPTION_COLUMNS)})")
        else:
            yield where, str(folder / os.path.normpath(file)), row


def gather(
    source: Path | str, rows: Iterable[tuple[str, str, Row]], read: Callable[[str], T], bad: BadDataLog
) -> dict[str, Captioned[T]]:
    """What the rows say of each image, by its name; one that ``read`` refuses is reported, and left out."""
    found: dict[str, Captioned[T]] = {}
    broken: set[str] = set()
    for where, name, row in rows:
        if name in broken:
            continue
        if name not in found:
            try:
                found[name] = Captioned(read(name))
            except BadDataError as error:
                broken.add(name)
                bad.report(name, str(error).removeprefix(f"{name}: "))
                continue
        if fault := found[name].add(column(row, CAPTION_COLUMNS), row):
            bad.report(where, fault)
    if not found:
        raise BadDataError(f"{source}: no usable image and caption in it" + (f" ({bad.summary()})" if len(bad) else ""))
    return found


def split_of_image(source: Path | str, image: Captioned[Any], test_share: float = 0.1) -> str:
    """The split that the rows of an image name, or the one of its group by hash."""
    named = image.fields.get("split", "").lower()
    if named:
        return known_split(source, named)
    return "test" if hash_share(image.group) < test_share else "train"


def splits_of_images(source: Path | str, found: Mapping[str, Captioned[Tensor]], test_share: float = 0.1) -> Splits:
    """Images in memory, each a concept of its own."""
    own = list(found.values())
    shared = Counter(caption for image in own for caption in image.captions)
    label_names = sorted({image.fields["label"] for image in own if "label" in image.fields})
    labelled = bool(label_names) and all("label" in image.fields for image in own)
    concepts = [image.concept(labelled, shared) for image in own]
    splits = [split_of_image(source, image, test_share) for image in own]

    def collect(split: str) -> ImageTextSet | None:
        rows = [row for row, of in enumerate(splits) if of == split]
        if not rows:
            return None
        ids = torch.tensor(rows)
        return ImageTextSet(
            torch.stack([own[i].content for i in rows]), ids, torch.zeros_like(ids), concepts, ["folder"]
        )

    train, test = collect("train"), collect("test")
    if train is None:
        raise BadDataError(f"{source}: no row is for training")
    notes = [f"{source}: {len(own)} images, {len(shared)} captions"]
    if label_names and not labelled:
        lacking = sum("label" not in image.fields for image in own)
        notes.append(f"{lacking} of {len(own)} images have no label, so that no classes are evaluated")
    label_sets = {"label": {name: [name] for name in label_names}} if labelled else {}
    templates = ("{}.", "a photo of {}.", "a picture of {}.")
    tests = {"test": test} if test is not None else {}
    return Splits("folder", train, tests, collect("validation"), label_sets, templates, 1000, notes)


@dataclass
class Captioned(Generic[T]):
    """An image, as it is kept, and what the rows say of it."""

    content: T
    captions: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)  # by language
    fields: dict[str, str] = field(default_factory=dict)  # label, group, split

    def add(self, caption: str, row: Row) -> str | None:
        """Take a row; a text says why it contradicts another row of the image, and then nothing is taken."""
        fields = {name: value for name in ("label", "group", "split") if (value := column(row, (name,)))}
        for name, value in fields.items():
            if self.fields.get(name, value) != value:
                return f"gives the image the {name} {value!r}, and a line before it {self.fields[name]!r}"
        self.fields |= fields
        if caption not in self.captions:
            self.captions.append(caption)
        if language := column(row, LANGUAGE_COLUMNS).lower():
            self.names.setdefault(language, caption)
        return None

    @property
    def group(self) -> str:
        """What the image must not be parted from: the rows' group, or the images with the same first caption."""
        return self.fields.get("group") or self.captions[0]

    def concept(self, labelled: bool, shared: Mapping[str, int]) -> Concept:
        """The concept that the image alone shows; its name is the first caption that no other image shares."""
        name = next((caption for caption in self.captions if shared[caption] == 1), self.captions[0])
        others = tuple(caption for caption in self.captions if caption != name)
        labels = {"label": self.fields["label"]} if labelled else {}
        return Concept(name, self.group, captions=others, labels=labels, names=self.names)
