"""Where each sample of a shard lies: found once by a walk over the headers of the tar file, and kept beside it.

A shard is a tar file as webdataset writes it. Members that differ only behind the first dot of their names are one
sample: its image (``.jpg``, ``.png``, ``.webp``, ...) or video (``.mp4``, ...), its text (``.txt``), its fields
(``.json``) and its class (``.cls``). Names may come in any order; other members are passed over.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from models.common.console import warn
from models.data.cache import read_cache, write_cache
from models.data.sets import BadDataError, hash_share
from models.data.video_files import VIDEO_SUFFIXES

IMAGE, VIDEO, TEXT, FIELDS, CLASS = KINDS = range(5)
_KINDS = {
    **dict.fromkeys((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"), IMAGE),
    **dict.fromkeys(VIDEO_SUFFIXES, VIDEO),
    ".txt": TEXT,
    ".json": FIELDS,
    ".cls": CLASS,
}
_NAMES = ("images", "videos", "texts", "JSON files", "classes")
_VERSION = "1"
_BLOCK = tarfile.BLOCKSIZE
_LONGEST_HEAD = 2**20  # bytes: nothing behind them in a name, a list of attributes or a label is read
_EXTENSIONS = (
    *(tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK),
    *(tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE),
)
# webdataset's own rule; a name without a key (".hidden", "notes") is of no sample.
_KEY = re.compile(r"((?:.*/|)[^.]+)(\.[^/]*)", re.DOTALL)


class Member(NamedTuple):
    """A file in a tar file."""

    name: str
    start: int
    size: int


@dataclass
class Index:
    """The samples of one shard. ``places`` [n, 5, 2] holds start and size of each kind, -1 where there is none."""

    path: Path
    places: Tensor
    shares: Tensor  # [n], a number in 0..1 from the hash of each key, to split by
    labels: list[str]  # the text of each video's class; empty where there are no videos
    faults: list[str]
    names: bytes
    ends: Tensor  # [n], where each key ends in `names`

    def __len__(self) -> int:
        return len(self.places)

    def key(self, sample: int) -> str:
        """The key of a sample, as an error names it."""
        first = int(self.ends[sample - 1]) if sample else 0
        return self.names[first : int(self.ends[sample])].decode(errors="replace")

    def name(self, sample: int) -> str:
        """A sample by its shard and its key, as if the shard were a folder."""
        return f"{self.path}/{self.key(sample)}"


def index_path(shard: Path) -> Path:
    """The file beside a shard that holds its index."""
    return shard.with_name(f"{shard.name}.index")


def read_index(shard: Path) -> Index:
    """The index of a shard: the one beside it, or a new one where that is of another size or time of the shard."""
    try:
        stat = shard.stat()
        state = {"version": _VERSION, "bytes": str(stat.st_size), "time": str(stat.st_mtime_ns)}

        def understand(tensors: dict[str, Tensor], metadata: dict[str, str]) -> Index:
            if any(metadata[name] != value for name, value in state.items()):
                raise ValueError("the shard has changed since")
            names, texts = tensors["names"].numpy().tobytes(), json.loads(metadata["texts"])
            return Index(
                shard, tensors["places"], tensors["shares"], texts["labels"], texts["faults"], names, tensors["ends"]
            )

        kept = read_cache(index_path(shard), understand, warn)
        if kept is not None:
            return kept
        with open(shard, "rb") as file:
            index = make_index(shard, file)
    except OSError as error:
        raise BadDataError(f"{shard}: cannot be read ({error.strerror or error})") from error
    tensors = {
        "places": index.places,
        "shares": index.shares,
        "ends": index.ends,
        "names": torch.frombuffer(bytearray(index.names), dtype=torch.uint8) if index.names else torch.empty(0).byte(),
    }
    try:
        texts = json.dumps({"labels": index.labels, "faults": index.faults})
        write_cache(index_path(shard), tensors, state | {"texts": texts})
    except OSError as error:
        warn(f"{index_path(shard)} cannot be kept ({error.strerror or error}): each run makes the index anew")
    return index


def make_index(shard: Path, file: BinaryIO) -> Index:
    """Walk over a shard's headers and group its members to samples."""
    faults: list[str] = []
    samples: dict[str, list[Member | None]] = {}
    for member in members(file, faults):
        found = _KEY.fullmatch(member.name)
        kind = _KINDS.get(found[2].lower()) if found is not None else None
        if found is None or kind is None:
            continue
        sample = samples.setdefault(found[1], [None] * len(KINDS))
        if sample[kind] is not None:
            faults.append(f"has two {_NAMES[kind]} of {found[1]!r}: the last one counts")
        sample[kind] = member
    whole = [[(m.start, m.size) if m is not None else (-1, -1) for m in sample] for sample in samples.values()]
    keys = [key.encode(errors="surrogateescape") for key in samples]
    labels = [label_of(file, sample) if sample[VIDEO] is not None else "" for sample in samples.values()]
    return Index(
        shard,
        torch.tensor(whole, dtype=torch.long).view(-1, len(KINDS), 2),
        torch.tensor([hash_share(key.decode(errors="replace")) for key in keys], dtype=torch.float64),
        labels if any(labels) else [],
        faults,
        b"".join(keys),
        torch.tensor([len(key) for key in keys], dtype=torch.long).cumsum(0),
    )


def members(file: BinaryIO, faults: list[str]) -> Iterator[Member]:
    """The files of a tar file; what is damaged or cut off is passed over and said in ``faults``.

    tarfile ends without a word at a header that is damaged in the middle. Here the walk goes on at the next whole one.
    """
    size, at, ended = file.seek(0, os.SEEK_END), 0, False
    broken: int | None = None  # where headers began to be unreadable
    extended: dict[str, str] = {}  # what a header says of the next one
    while at + _BLOCK <= size:
        block = _read(file, at, _BLOCK)
        ended = block.count(0) == _BLOCK
        if ended:  # a further archive may follow
            at += _BLOCK
            continue
        head = _header(block)
        if head is None:
            broken = at if broken is None else broken
            at += _BLOCK
            continue
        if broken is not None:
            faults.append(f"has no readable header from byte {broken} to {at}: what lies there is lost")
            broken, extended = None, {}
        name, length, start = extended.get("path", head.name), head.size, at + _BLOCK
        if head.isreg() and extended.get("size", "").isdecimal():
            length = int(extended["size"])
        elif not head.isreg() and head.type in tarfile.SUPPORTED_TYPES and head.type not in _EXTENSIONS:
            length = 0  # a folder, a link
        at = start + -(-length // _BLOCK) * _BLOCK
        if start + length > size:
            faults.append(f"breaks off in {name!r}, at byte {size}")
            return
        if head.type in _EXTENSIONS:
            extended = extended | _extension(head.type, _read(file, start, min(length, _LONGEST_HEAD)))
            continue
        extended = {}
        if head.isreg() and not head.issparse():
            yield Member(name, start, length)
    if broken == 0:
        faults.append("is no tar file" + (" (it is compressed: unpack it)" if _compressed(file) else ""))
    elif broken is not None:
        faults.append(f"has no readable header from byte {broken} on: what lies there is lost")
    elif size == 0:
        faults.append("is empty")
    elif not ended:
        faults.append(f"has no end mark: it may be cut off, at byte {size}")


def _header(block: bytes) -> tarfile.TarInfo | None:
    try:
        head = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return None
    return head if head.size >= 0 else None


def _extension(kind: bytes, data: bytes) -> dict[str, str]:
    """What a header of names or attributes says of the member behind it."""
    if kind == tarfile.GNUTYPE_LONGNAME:
        return {"path": _text(data.rstrip(b"\0"))}
    return _attributes(data) if kind in (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE) else {}


def _read(file: BinaryIO, start: int, size: int) -> bytes:
    file.seek(start)
    return file.read(size)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _compressed(file: BinaryIO) -> bool:
    return _read(file, 0, 4).startswith((b"\x1f\x8b", b"BZh", b"\xfd7zX", b"\x28\xb5\x2f\xfd"))


def _attributes(data: bytes) -> dict[str, str]:
    """The records of a POSIX extended header: "length name=value", each with a line feed."""
    found = {}
    while record := re.match(rb"(\d{1,7}) ([^=]+)=", data):
        length = int(record[1])
        found[_text(record[2])] = _text(data[record.end() : length - 1])
        data = data[max(1, length) :]
    return found


def label_of(file: BinaryIO, sample: Sequence[Member | None]) -> str:
    """The class of a video: its text, the "label" of its fields, or its number."""
    for kind in (TEXT, FIELDS, CLASS):
        member = sample[kind]
        if member is None or member.size > _LONGEST_HEAD:
            continue
        text = _read(file, member.start, member.size).decode("utf-8-sig", "replace").strip()
        if kind == FIELDS:
            try:
                fields = json.loads(text)
            except (ValueError, RecursionError):
                continue
            text = str(fields.get("label", "")) if isinstance(fields, dict) else ""
        if text:
            return text
    return ""
