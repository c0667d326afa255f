"""Shards written from what the package's readers take: a captions file, or videos of classes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from models.common.checkpoint import remove_temporaries, write_text
from models.common.console import console, say
from models.data.folder import Captioned, captions_file, gather, list_captions, split_of_image
from models.data.sets import BadDataError, BadDataLog, open_image
from models.data.shards.index import read_index
from models.data.shards.names import SUFFIX
from models.data.video_files import frame_times, list_videos

PLAN = "shards.json"
# Files of these formats go into a shard as they are, anything else as PNG: what readers of shards know.
_KEPT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_THREADS = 4


@dataclass(frozen=True)
class Sample:
    """A file of the list with what is written beside it: texts by their suffixes."""

    path: Path
    size: int
    split: str
    texts: tuple[tuple[str, str], ...]


def list_images(source: Path, bad: BadDataLog, images: Path | None = None) -> list[Sample]:
    """The images of a captions file; its captions, label, group and languages go beside each image."""
    captions = captions_file(source)
    found = gather(captions, list_captions(captions, bad, images), _size, bad)
    return [
        Sample(Path(name), image.content, split_of_image(captions, image), _texts_of(image))
        for name, image in found.items()
    ]


def _texts_of(image: Captioned[int]) -> tuple[tuple[str, str], ...]:
    more: dict[str, Any] = {name: value for name, value in image.fields.items() if name != "split"}
    if len(image.captions) > 1:
        more["caption"] = image.captions
    if image.names:
        more["names"] = image.names
    written = [("json", json.dumps(more, ensure_ascii=False))] if more else []
    return (("txt", image.captions[0]), *written)


def _size(name: str) -> int:
    try:
        return os.stat(name).st_size
    except (OSError, ValueError) as error:  # a ValueError for a path with a NUL
        raise BadDataError(f"{name}: {getattr(error, 'strerror', None) or error}") from error


def list_clips(source: Path, bad: BadDataLog) -> list[Sample]:
    """The videos of a folder of classes or a list; the name and the number of its class go beside each."""
    entries = list_videos(source, bad)
    numbers = {label: number for number, label in enumerate(sorted({label for _, label, _ in entries}))}
    return [
        Sample(Path(str(path)), os.stat(str(path)).st_size, split, (("cls", str(numbers[label])), ("txt", label)))
        for path, label, split in entries
    ]


def checked_image(path: Path) -> tuple[str, bytes]:
    """The suffix and the bytes of an image file as a shard has them; raises :class:`BadDataError`."""
    data = _bytes(path)
    image = open_image(data, name=str(path))
    with Image.open(io.BytesIO(data)) as opened:
        kept = _KEPT.get(opened.format or "")
    if kept is not None:
        return kept, data
    png = io.BytesIO()
    image.save(png, "PNG")
    return "png", png.getvalue()


def checked_video(path: Path) -> tuple[str, bytes]:
    """The suffix and the bytes of a video file; raises :class:`BadDataError`."""
    frame_times(path)
    return path.suffix.lower().removeprefix("."), _bytes(path)


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise BadDataError(f"{path}: {error.strerror}") from error


def parted(samples: Sequence[Sample], count: int, size: int) -> dict[str, list[tuple[str, Sample]]]:
    """The samples of each shard with their keys, by the name of the shard: at most ``count``, and ``size`` bytes.

    They are shuffled, the same each time, so that a shard is no single class of a sorted list.
    """
    shards: dict[str, list[tuple[str, Sample]]] = {}
    mixed = random.Random(0).sample(samples, len(samples))
    for split in dict.fromkeys(sample.split for sample in samples):
        number, room = -1, 0
        own: list[tuple[str, Sample]] = []
        for key, sample in enumerate(one for one in mixed if one.split == split):
            room -= sample.size
            if not own or len(own) == count or room < 0:
                number, room, own = number + 1, size - sample.size, []
                shards[f"{split}-{number:05d}.tar"] = own
            own.append((f"{key:08d}", sample))
    return shards


def write_shards(
    samples: Sequence[Sample],
    out: Path,
    check: Callable[[Path], tuple[str, bytes]],
    bad: BadDataLog,
    *,
    count: int,
    size: int,
) -> list[Path]:
    """Write shards with their indices; those that are there already stay, so that the same call goes on after a kill.

    ``check`` gives the suffix and the bytes of a file, or refuses it; such a file is reported, and left out.
    """
    shards = parted(samples, count, size)
    out.mkdir(parents=True, exist_ok=True)
    remove_temporaries(out)
    _require_same_list(out, samples, count, size)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        job = bar.add_task("samples", total=len(samples))
        for name, own in shards.items():
            if not (out / name).exists():
                written = _write_shard(out / name, own, check, bad)
                read_index(out / name)
                say(f"written: {out / name}, {written} samples")
            bar.advance(job, len(own))
    return [out / name for name in shards]


def _write_shard(
    path: Path, samples: Sequence[tuple[str, Sample]], check: Callable[[Path], tuple[str, bytes]], bad: BadDataLog
) -> int:
    def read(sample: Sample) -> tuple[str, bytes] | BadDataError:
        try:
            return check(sample.path)
        except BadDataError as error:
            return error

    written = 0
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with ThreadPoolExecutor(_THREADS) as pool, open(temporary, "wb") as file:
            with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
                for (key, sample), found in zip(samples, pool.map(read, (s for _, s in samples)), strict=True):
                    if isinstance(found, BadDataError):
                        bad.report(str(sample.path), str(found).removeprefix(f"{sample.path}: "))
                        continue
                    texts = {suffix: text.encode() for suffix, text in sample.texts}
                    for suffix, data in sorted({**texts, found[0]: found[1]}.items()):
                        member = tarfile.TarInfo(f"{key}.{suffix}")
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
                    written += 1
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return written


def _require_same_list(out: Path, samples: Sequence[Sample], count: int, size: int) -> None:
    """Keep what the shards of a folder are made of, or refuse to mix them with those of another list."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(repr((str(sample.path), sample.size, sample.split, sample.texts)).encode(errors="replace"))
    plan = json.dumps({"samples": len(samples), "count": count, "size": size, "list": digest.hexdigest()})
    kept = out / PLAN
    if kept.is_file():
        if kept.read_text() != plan:
            raise ValueError(f"{out} holds shards of another list, or of other sizes: choose another folder")
    elif any(out.glob(f"*{SUFFIX}")):
        raise ValueError(f"{out} holds shards that another program wrote: choose another folder")
    else:
        write_text(kept, plan)
