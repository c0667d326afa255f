"""Rows of a list that a user wrote: CSV with any usual separator, JSON lines, a JSON array, COCO's or Karpathy's JSON.

A row maps column names in lower case to texts. Nothing is dropped without a word: a row that cannot be read goes to the
log of bad data with its line number, and a list without the columns that it must have is refused with those it has.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from models.data.sets import BadDataError, BadDataLog

Row = dict[str, str]
SEPARATORS = (",", "\t", ";", "|")
SPLIT_NAMES = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


def column(row: Row, names: Sequence[str]) -> str:
    """The first of the columns ``names`` that a row fills; "" if it fills none."""
    return next((row[name].strip() for name in names if row.get(name, "").strip()), "")


def known_split(source: Path | str, name: str) -> str:
    """The split that a list or a folder means by a name; a name that means none is refused."""
    if name not in SPLIT_NAMES:
        raise BadDataError(f"{source}: unknown split {name!r}; use train, validation or test")
    return SPLIT_NAMES[name]


def read_text(path: Path) -> str:
    """A file's text, which must be UTF-8; a byte order mark at its head is left out."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadDataError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def read_rows(
    path: Path, bad: BadDataLog, needed: Sequence[Sequence[str]] = (), lists: Sequence[str] = ()
) -> Iterator[tuple[int, Row]]:
    """The rows of a list with their line numbers.

    ``needed`` holds the spellings of each column that the list must have. In a column of ``lists`` a JSON list of texts
    stands for as many rows.
    """
    text = read_text(path)
    if path.suffix.lower() == ".json" and (whole := _whole_json(text)) is not None:
        yield from _whole_rows(path, whole, lists)
    elif path.suffix.lower() in (".json", ".jsonl", ".ndjson"):
        yield from _json_lines(path, text, lists)
    else:
        yield from _csv_rows(path, text, bad, needed)


def lines_of(text: str) -> list[str]:
    """The lines of CSV text: no sign but a line feed and a carriage return ends one."""
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def fields_of(line: str, separator: str) -> list[str]:
    """The fields of one line of CSV; none where the module csv refuses it, as it does a field of 131,073 signs."""
    try:
        return next(csv.reader([line], delimiter=separator), [])
    except csv.Error:
        return []


def header_of(text: str, needed: Sequence[Sequence[str]] = ()) -> tuple[str, list[str]]:
    """The separator of CSV text and its column names in lower case, as its first line has them.

    Of the usual separators it is the one that finds the most columns of ``needed``, and then the most columns.
    """
    first = next((line for line in lines_of(text) if line.strip()), "")

    def names(separator: str) -> list[str]:
        return [name.strip().lower() for name in fields_of(first, separator)]

    def worth(separator: str) -> tuple[int, int]:
        found = names(separator)
        return sum(not set(spellings).isdisjoint(found) for spellings in needed), len(found)

    separator = max(SEPARATORS, key=worth)
    return separator, names(separator)


def records(text: str, separator: str) -> Iterator[tuple[int, list[str] | None]]:
    """The records of CSV text, each with the number of its first line; None where a quote does not end.

    A quoted field may span lines. Where its quote does not end, its first line alone is lost.
    """
    lines = lines_of(text)
    width, at = 0, 0
    while at < len(lines):
        if not lines[at].strip():
            at += 1
            continue
        reader = csv.reader((line + "\n" for line in _from(lines, at)), delimiter=separator, strict=True)
        try:
            record: list[str] | None = next(reader)
        except csv.Error:
            record = None
        used = lines[at + 1 : at + reader.line_num]
        if record is not None and used and _swallows(record, used, separator, width):
            record = None
        yield at + 1, record
        width = width or len(record or ())
        at += 1 if record is None else reader.line_num


def _from(lines: list[str], first: int) -> Iterator[str]:
    return (lines[i] for i in range(first, len(lines)))


def _swallows(record: list[str], used: list[str], separator: str, width: int) -> bool:
    """Whether a record that spans lines holds rows of their own: all of ``used`` are rows that name such a file."""

    def is_row(line: str) -> bool:
        own = fields_of(line, separator)
        suffixes = ((Path(a).suffix, Path(b).suffix) for a, b in zip(record, own, strict=False))
        return len(own) == width and any(a == b != "" for a, b in suffixes)

    return len(record) != width or all(map(is_row, used))


def _csv_rows(path: Path, text: str, bad: BadDataLog, needed: Sequence[Sequence[str]]) -> Iterator[tuple[int, Row]]:
    separator, names = header_of(text, needed)
    for spellings in needed:
        if set(spellings).isdisjoint(names):
            raise BadDataError(
                f"{path}: has no column {' or '.join(spellings)}; its first line has {', '.join(map(repr, names))}"
            )
    for place, (number, record) in enumerate(records(text, separator)):
        where = f"{path}, line {number}"
        if record is None:
            bad.report(where, "begins a quote that does not end")
        elif place and len(record) > len(names):
            bad.report(
                where, f"has {len(record)} fields for {len(names)} columns (a field with {separator!r} wants quotes)"
            )
        elif place:
            yield number, {name: mend(value) for name, value in zip(names, record, strict=False)}


def _json_lines(path: Path, text: str, lists: Sequence[str]) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), 1):  # no other sign ends a line of JSON lines
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # a ValueError of its own for numbers of thousands of digits
            reason = "too deep" if isinstance(error, RecursionError) else getattr(error, "msg", str(error))
            raise BadDataError(f"{path}, line {number}: not JSON ({reason})") from error
        yield from object_rows(f"{path}, line {number}", number, row, lists)


def _whole_json(text: str) -> dict[str, Any] | list[Any] | None:
    """The one array or object that a file is; None if it has an object on each line."""
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return whole if isinstance(whole, dict | list) else None


def _whole_rows(path: Path, whole: dict[str, Any] | list[Any], lists: Sequence[str]) -> Iterator[tuple[int, Row]]:
    if isinstance(whole, dict) and "annotations" in whole:
        yield from _coco_rows(path, whole)
        return
    if isinstance(whole, dict) and isinstance(whole.get("images"), list):
        yield from _karpathy_rows(path, whole["images"])
        return
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield from object_rows(f"{path}, object {number}", number, row, lists)


def object_rows(where: str, number: int, row: Any, lists: Sequence[str]) -> Iterator[tuple[int, Row]]:
    """The rows of one JSON object: one for each text of a list of texts, as BLIP's annotations have."""
    if not isinstance(row, dict):
        raise BadDataError(f"{where}: expected an object, got {type(row).__name__}")
    fields = {str(name).strip().lower(): value for name, value in row.items()}
    texts = {name: text for name, value in fields.items() if (text := _text(value))}
    many = next((name for name in lists if isinstance(fields.get(name), list)), "")
    if not many:
        yield number, texts
    for value in fields[many] if many else ():
        yield number, {**texts, many: _text(value)}


def _text(value: Any) -> str:
    """A JSON value as text; "" for what is missing (null, pandas' NaN) and for lists and objects."""
    if isinstance(value, float) and math.isnan(value):
        return ""
    return mend(str(value)) if isinstance(value, str | int | float) else ""


def _coco_rows(path: Path, whole: dict[str, Any]) -> Iterator[tuple[int, Row]]:
    """The annotations of COCO's captions as rows; the number is the place in the list, from 1."""
    try:
        files = {image["id"]: image for image in whole["images"]}
        for number, annotation in enumerate(whole["annotations"], 1):
            image = files.get(annotation["image_id"])
            # An annotation of an image that is not listed names none; the reader says so.
            row = {"caption": _text(annotation["caption"])}
            if image is not None:
                row |= {"image": _text(image["file_name"]), "split": _text(image.get("split"))}
            yield number, row
    except (AttributeError, KeyError, TypeError) as error:
        raise BadDataError(
            f"{path}: not COCO captions: expected images with id and file_name, annotations with image_id and caption "
            f"({type(error).__name__}: {error})"
        ) from error


def _karpathy_rows(path: Path, images: list[Any]) -> Iterator[tuple[int, Row]]:
    """The sentences of Karpathy's lists (COCO, Flickr8k, Flickr30k) as rows; the number is the place of the image."""
    try:
        for number, image in enumerate(images, 1):
            file = "/".join(part for part in (_text(image.get("filepath")), _text(image["filename"])) if part)
            split = {"restval": "train"}.get(image["split"], _text(image["split"]))  # what COCO's validation had left
            for sentence in image["sentences"]:
                yield number, {"image": file, "caption": _text(sentence["raw"]), "split": split}
    except (AttributeError, KeyError, TypeError) as error:
        raise BadDataError(
            f"{path}: neither COCO captions (images and annotations) nor Karpathy's (images with filename, split and "
            f"sentences with raw) ({type(error).__name__}: {error})"
        ) from error


def mend(text: str) -> str:
    """A text with U+FFFD for each lone surrogate, which JSON may hold and UTF-8 cannot."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
