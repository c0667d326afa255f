"""Which shards a text names, and which split each of them is."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator
from pathlib import Path

from models.data.folder import CAPTION_FILES
from models.data.rows import SPLIT_NAMES

SUFFIX = ".tar"
_MOST = 1_000_000  # shards that braces may stand for
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBERS = re.compile(r"(\d+)\.\.(\d+)")


def expand_braces(text: str) -> Iterator[str]:
    """``a-{00..12}.tar`` and ``{train,val}.tar`` as a shell writes them out; a number keeps its zeros."""
    found = _BRACES.search(text)
    if found is None:
        yield text
        return
    before, after = text[: found.start()], text[found.end() :]
    numbers = _NUMBERS.fullmatch(found[1])
    if numbers is None and "," not in found[1]:
        raise ValueError(f"{text}: {found[0]} is neither numbers, {{000..012}}, nor a list, {{a,b}}")
    for part in _between(*numbers.groups()) if numbers is not None else found[1].split(","):
        yield from expand_braces(f"{before}{part}{after}")


def _between(first: str, last: str) -> Iterator[str]:
    if abs(int(last) - int(first)) >= _MOST:
        raise ValueError(f"{{{first}..{last}}} stands for more than {_MOST:,} shards")
    step = 1 if int(first) <= int(last) else -1
    width = len(first) if first.startswith("0") or last.startswith("0") else 0
    return (f"{number:0{width}d}" for number in range(int(first), int(last) + step, step))


def are_shards(source: str) -> bool:
    """Whether a text names shards: files (by braces or a pattern, too) that end in .tar, or a folder with some.

    In a folder with a captions file an archive is none of them.
    """
    folder = Path(source)
    if source.endswith(SUFFIX) or not folder.is_dir():
        return source.endswith(SUFFIX)
    return any(_in_folder(folder)) and not any((folder / name).is_file() for name in CAPTION_FILES)


def _in_folder(folder: Path) -> Iterator[Path]:
    """The shards of a folder, or of the folders of splits in it."""
    yield from folder.glob(f"*{SUFFIX}")
    yield from (path for path in folder.glob(f"*/*{SUFFIX}") if path.parent.name.lower() in SPLIT_NAMES)


def shard_paths(source: str) -> list[Path]:
    """The shards that a text names, in the order of their names; one that is written out must be there."""
    if Path(source).is_dir():
        return sorted(_in_folder(Path(source)))
    paths: set[Path] = set()
    for name in [source] if Path(source).is_file() else expand_braces(source):
        found = [name] if Path(name).is_file() else glob.glob(name)
        if not found:
            raise FileNotFoundError(f"{source}: there is no shard {name}")
        paths.update(map(Path, found))
    return sorted(paths)


def split_of(path: Path) -> str:
    """The split that a word of a shard's name says, as in imagenet-val-000003.tar, or its folder; "" if none does."""
    words = [*re.split(r"[^a-z]+", path.stem.lower()), path.parent.name.lower()]
    return next((SPLIT_NAMES[word] for word in words if word in SPLIT_NAMES), "")


def splits_of(paths: list[Path]) -> dict[Path, str]:
    """The split of each shard: where any names one, those that name none are for training."""
    found = {path: split_of(path) for path in paths}
    return {path: split or "train" for path, split in found.items()} if any(found.values()) else found
