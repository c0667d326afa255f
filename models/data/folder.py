"""A user's own folder of images with a captions file.

The captions file is CSV with a header, JSON lines, or COCO's captions as one JSON object. Each row names an image
(``image``, ``file``, ``file_name``, ``filename``, ``filepath`` or ``path``, relative to the captions file) and its
caption (``caption``, ``text`` or ``title``). Optional columns: ``split`` ("train", "validation", "test"), ``label`` (a
class for zero-shot evaluation), ``group`` (rows that must not be split) and ``language`` ("de": what the caption is
written in; the first caption of an image in each language is its name there). If no row has a ``split``, a tenth of
the groups, chosen by hash, is the test set.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from models.data.sets import BadDataError, BadDataLog, Concept, ImageTextSet, Splits, hash_share, read_image

IMAGE_COLUMNS = ("image", "file", "file_name", "filename", "filepath", "path")
CAPTION_COLUMNS = ("caption", "text", "title")
LANGUAGE_COLUMNS = ("language", "lang")
CAPTION_FILES = ("captions.csv", "captions.jsonl", "captions.json", "metadata.csv", "metadata.jsonl")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """The rows of a captions file or another list with their line numbers, keys in lower case."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    if path.suffix.lower() == ".json" and (whole := _whole_json(text)) is not None:
        yield from coco_rows(path, whole)
    elif path.suffix.lower() in (".jsonl", ".ndjson", ".json"):
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadDataError(f"{path}, line {number}: not JSON ({error.msg})") from error
            if not isinstance(row, dict):
                raise BadDataError(f"{path}, line {number}: expected an object, got {type(row).__name__}")
            yield number, {str(k).lower(): str(v) for k, v in row.items() if v is not None}
    else:
        reader = csv.DictReader(text.splitlines(keepends=True))
        for row in reader:
            yield reader.line_num, {k.strip().lower(): v for k, v in row.items() if k is not None and v is not None}


def _whole_json(text: str) -> dict[str, Any] | None:
    """The one object that a file is, as COCO's; None if it has one on each line."""
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return None
    return whole if isinstance(whole, dict) and "annotations" in whole else None


def coco_rows(path: Path, whole: dict[str, Any]) -> Iterator[tuple[int, dict[str, str]]]:
    """The annotations of COCO's captions as rows; the number is the place in the list, from 1."""
    try:
        files = {image["id"]: image for image in whole["images"]}
        for number, annotation in enumerate(whole["annotations"], 1):
            image = files.get(annotation["image_id"])
            # An annotation of an image that is not listed names none; the reader says so.
            row = {"caption": str(annotation["caption"]).strip()}
            if image is not None:
                row |= {"image": str(image["file_name"]), "split": str(image.get("split", ""))}
            yield number, row
    except (KeyError, TypeError) as error:
        raise BadDataError(
            f"{path}: not COCO captions: expected images with id and file_name, annotations with image_id and caption "
            f"({type(error).__name__}: {error})"
        ) from error


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


def column(row: dict[str, str], names: tuple[str, ...]) -> str:
    """The first of the columns ``names`` that a row fills; "" if it fills none."""
    return next((row[name].strip() for name in names if row.get(name, "").strip()), "")


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
    folder = images_folder(source, images)
    pictures: list[torch.Tensor] = []
    image_concepts: list[int] = []
    image_splits: list[str] = []
    texts: list[list[str]] = []  # the captions of each concept
    spoken: list[dict[str, str]] = []  # the concept's name in each language
    labels: list[str] = []
    groups: list[str] = []
    by_caption: dict[str, int] = {}
    by_file: dict[str, int] = {}  # the row of an image that was read already
    for number, row in read_rows(source):
        where = f"{source}, line {number}"
        file, caption = column(row, IMAGE_COLUMNS), column(row, CAPTION_COLUMNS)
        language = column(row, LANGUAGE_COLUMNS).lower()
        if not file:
            bad.report(where, f"names no image (looked for the columns {', '.join(IMAGE_COLUMNS)})")
            continue
        if not caption:
            bad.report(where, f"has no caption (looked for the columns {', '.join(CAPTION_COLUMNS)})")
            continue
        if file in by_file:
            # A further caption of an image that is there already.
            concept = image_concepts[by_file[file]]
            if language:
                spoken[concept].setdefault(language, caption)
            if caption not in texts[concept]:
                texts[concept].append(caption)
                by_caption.setdefault(caption, concept)
            continue
        try:
            image = read_image(folder / file, size)
        except BadDataError as error:
            name = str(folder / file)
            bad.report(name, str(error).removeprefix(f"{name}: "))
            continue
        if caption not in by_caption:
            by_caption[caption] = len(texts)
            texts.append([caption])
            spoken.append({language: caption} if language else {})
            labels.append(row.get("label", "").strip())
            groups.append(row.get("group", "").strip() or caption)
        by_file[file] = len(pictures)
        pictures.append(image)
        image_concepts.append(by_caption[caption])
        image_splits.append(row.get("split", "").strip().lower())
    if not pictures:
        raise BadDataError(f"{source}: no usable image and caption in it" + (f" ({bad.summary()})" if len(bad) else ""))

    label_names = sorted({label for label in labels if label})
    labelled = bool(label_names) and all(labels)
    concepts = [
        Concept(
            own[0],
            groups[i],
            captions=tuple(own[1:]),
            labels={"label": labels[i]} if labelled else {},
            names=spoken[i],
        )
        for i, own in enumerate(texts)
    ]

    def split_of(row: int) -> str:
        if image_splits[row]:
            return {"val": "validation", "valid": "validation"}.get(image_splits[row], image_splits[row])
        return "test" if hash_share(groups[image_concepts[row]]) < test_share else "train"

    def collect(split: str) -> ImageTextSet | None:
        rows = [i for i in range(len(pictures)) if split_of(i) == split]
        if not rows:
            return None
        ids = torch.tensor([image_concepts[i] for i in rows])
        return ImageTextSet(torch.stack([pictures[i] for i in rows]), ids, torch.zeros_like(ids), concepts, ["folder"])

    unknown = {split_of(i) for i in range(len(pictures))} - {"train", "validation", "test"}
    if unknown:
        raise BadDataError(f"{source}: unknown split {sorted(unknown)[0]!r}; use train, validation or test")
    train, test = collect("train"), collect("test")
    if train is None:
        raise BadDataError(f"{source}: no row is for training")
    notes = [f"{source}: {len(pictures)} images, {len(concepts)} captions"]
    label_sets = {"label": {name: [name] for name in label_names}} if labelled else {}
    templates = ("{}.", "a photo of {}.", "a picture of {}.")
    tests = {"test": test} if test is not None else {}
    return Splits("folder", train, tests, collect("validation"), label_sets, templates, 1000, notes)
