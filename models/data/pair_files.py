"""A user's own pairs of an image and a sound: a folder of classes, or a list of files and labels.

A folder holds one folder per class, either at once or below ``train``, ``val`` (or ``validation``) and ``test``; a pair
is two files of one name, ``seven/12.png`` and ``seven/12.wav``. A list is a CSV (or JSON lines) with the columns
``image`` (or ``file``, ``path``, ...), ``audio`` (or ``sound``, ``wav``), ``label`` (or ``class``) and, if wanted,
``split`` and ``speaker``; paths are relative to the list. If no split is named, validation and test take a
tenth of the pairs each, chosen by hash; the pairs of a named speaker stay together.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from models.data.audio import read_audio
from models.data.folder import IMAGE_COLUMNS
from models.data.pairs import PairSet, PairSplits
from models.data.rows import column, known_split, read_rows
from models.data.sets import BadDataError, BadDataLog, read_image
from models.data.video_files import LABEL_COLUMNS, list_folder, name_below, split_by_hash

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp")
AUDIO_SUFFIXES = (".flac", ".mp3", ".ogg", ".wav")
AUDIO_COLUMNS = ("audio", "sound", "wav")
SPEAKER_COLUMNS = ("speaker", "voice")

# Image, sound, label, split ("" where none is named) and speaker (likewise).
Entry = tuple[Path, Path, str, str, str]


def read_picture(path: Path, size: int, channels: int = 3) -> Tensor:
    """An image file on black, uint8 [channels, size, size], in colour or grey; raises :class:`BadDataError`."""
    image = read_image(path, size).float()
    colours = image[:3] * image[3:] / 255
    return (colours if channels == 3 else colours.mean(0, keepdim=True)).round().to(torch.uint8)


def pairs_of_folder(root: Path, bad: BadDataLog) -> list[Entry]:
    """The pairs of a folder of classes; files without a partner are reported to ``bad``."""
    images = list_folder(root, IMAGE_SUFFIXES)
    sounds = {path.with_suffix(""): path for path, _, _ in list_folder(root, AUDIO_SUFFIXES)}
    entries = []
    for path, label, split in images:
        sound = sounds.pop(path.with_suffix(""), None)
        if sound is None:
            bad.report(str(path), f"has no sound beside it (looked for {path.stem} with {', '.join(AUDIO_SUFFIXES)})")
        else:
            entries.append((path, sound, label, split, ""))
    for sound in sounds.values():
        if not any(sound.with_suffix("") == path.with_suffix("") for path, *_ in entries):
            bad.report(str(sound), f"has no image beside it (looked for {sound.stem} with {', '.join(IMAGE_SUFFIXES)})")
    return entries


def pairs_of_list(source: Path, bad: BadDataLog) -> list[Entry]:
    """The pairs of a list; lines that name no image, no sound or no label are reported to ``bad``."""
    entries = []
    for number, row in read_rows(source, bad, (IMAGE_COLUMNS, AUDIO_COLUMNS, LABEL_COLUMNS)):
        image, sound, label = (column(row, names) for names in (IMAGE_COLUMNS, AUDIO_COLUMNS, LABEL_COLUMNS))
        lacking = [what for what, value in (("image", image), ("sound", sound), ("label", label)) if not value]
        if lacking:
            bad.report(f"{source}, line {number}", f"has no {' and no '.join(lacking)}")
            continue
        split = row.get("split", "").strip().lower()
        entries.append((source.parent / image, source.parent / sound, label, split, column(row, SPEAKER_COLUMNS)))
    return entries


def load_pair_files(source: Path, size: int, samples: int, bad: BadDataLog | None = None) -> PairSplits:
    """Read all the pairs; those of which a file cannot be read are skipped with a count, or stop the run (``bad``)."""
    bad = bad if bad is not None else BadDataLog()
    listed = pairs_of_folder(source, bad) if source.is_dir() else pairs_of_list(source, bad)
    found: dict[str, list[tuple[Tensor, Tensor, int, str, str]]] = {"train": [], "validation": [], "test": []}
    for image, sound, label, split, speaker in listed:
        place = known_split(source, split) if split else split_by_hash(speaker or name_below(image, source))
        try:
            pixels = read_picture(image, size)
            clip, length = read_audio(sound, samples)
        except BadDataError as error:
            name, _, reason = str(error).partition(": ")
            bad.report(name, reason)
            continue
        found[place].append((pixels, clip, length, label, speaker or "unnamed"))
    if not any(found.values()):
        raise BadDataError(
            f"{source}: no pair in it (looked for folders of classes with name.png and name.wav, or for lines with an "
            f"image, a sound and a label){'; ' + bad.summary() if len(bad) else ''}"
        )
    classes = sorted({label for pairs in found.values() for *_, label, _ in pairs})

    def collect(split: str) -> PairSet | None:
        if not found[split]:
            return None
        images, clips, lengths, labels, speakers = zip(*found[split], strict=True)
        each = torch.arange(len(images))
        numbers = torch.tensor([classes.index(label) for label in labels])
        return PairSet(
            torch.stack(images), numbers, each, torch.stack(clips), torch.tensor(lengths), each, speakers, classes
        )

    train, validation, test = (collect(split) for split in ("train", "validation", "test"))
    if train is None:
        raise BadDataError(f"{source}: no pair is for training")
    notes = [f"{source}: {sum(map(len, found.values()))} pairs of {len(classes)} classes"]
    return PairSplits("files", train, {"test": test} if test is not None else {}, validation, notes)
