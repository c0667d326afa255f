"""A user's own video files: a folder of classes, as Kinetics is laid out, or a list of files and labels.

A folder holds one folder per class, either at once or below ``train``, ``val`` (or ``validation``) and ``test``. A list
is a CSV with the columns ``path`` (or ``video``, ``file``, ...), ``label`` (or ``class``) and, if wanted, ``split``;
or, as Kinetics lists without a header, lines of ``path label`` or ``path,label``. Paths are relative to the list.
If no split is named, validation and test take a tenth of the files each, chosen by hash.

Frames are decoded by PyAV, whose wheel brings FFmpeg with it. A file is opened when a clip of it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from models.data.folder import IMAGE_COLUMNS, column, read_rows
from models.data.sets import BadDataError, BadDataLog, hash_share
from models.data.video import VideoSet, VideoSplits

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
VIDEO_COLUMNS = ("video", *IMAGE_COLUMNS)
LABEL_COLUMNS = ("label", "class")
SPLIT_NAMES = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}

Sampling = Literal["uniform", "dense"]


def count_frames(path: Path) -> int:
    """How many frames a file says it has; counted packet by packet where it does not say."""
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadDataError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    except (av.FFmpegError, OSError) as error:
        raise BadDataError(f"{path}: cannot be opened ({_reason(error)})") from error
    if count == 0:
        raise BadDataError(f"{path}: holds no frame")
    return count


def read_frames(path: Path, indices: Sequence[int], short_side: int | None = None) -> Tensor:
    """The frames of ``indices`` in their order, uint8 [n, 3, H, W], scaled to ``short_side``."""
    import av

    wanted, found, seen = set(indices), {}, 0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for seen, frame in enumerate(container.decode(stream), 1):
                if seen - 1 in wanted:
                    scale = short_side / min(frame.width, frame.height) if short_side else 1.0
                    width, height = round(frame.width * scale), round(frame.height * scale)
                    found[seen - 1] = frame.to_ndarray(format="rgb24", width=width, height=height)
                    if len(found) == len(wanted):
                        break
    except (av.FFmpegError, OSError, IndexError) as error:
        raise BadDataError(f"{path}: breaks off after {seen} frames ({_reason(error)})") from error
    if len(found) < len(wanted):
        raise BadDataError(f"{path}: breaks off after {seen} frames, and frame {max(wanted) + 1} was wanted")
    frames = [found[i] for i in indices]
    if len({frame.shape for frame in frames}) > 1:
        raise BadDataError(f"{path}: changes the size of its frames")
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def frame_indices(
    count: int,
    num_frames: int,
    sampling: Sampling,
    *,
    stride: int = 8,
    clip: int = 0,
    clips: int = 1,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Which of ``count`` frames make a clip.

    "uniform" cuts the video into as many parts as the clip has frames and takes one of each; "dense" takes every
    ``stride``-th from a start on. A generator draws them at random: a frame anywhere in its part, a start anywhere.
    If there is none, clip number ``clip`` of ``clips`` is spread evenly: over each part, or over the possible starts.
    The last frame of a video that is too short is repeated.
    """
    steps = torch.arange(num_frames, dtype=torch.float64)
    if sampling == "uniform":
        part = count / num_frames
        if generator is None:
            at = torch.full_like(steps, (clip + 0.5) / clips)
        else:
            at = torch.rand(num_frames, generator=generator, dtype=torch.float64)
        chosen = (steps + at) * part
    else:
        spare = max(0, count - 1 - (num_frames - 1) * stride)
        if generator is not None:
            start = int(torch.randint(spare + 1, (1,), generator=generator))
        else:
            start = spare // 2 if clips == 1 else round(clip * spare / (clips - 1))
        chosen = start + steps * stride
    return chosen.long().clamp(0, count - 1).tolist()


@dataclass
class VideoFiles:
    """Video files with labels, decoded as they are asked for.

    A file that cannot be read is reported to ``bad`` once, and the next good one of the list takes its place in the
    batch.
    """

    paths: list[Path]
    labels: Tensor
    classes: Sequence[str]
    size: int
    num_frames: int
    sampling: Sampling = "uniform"
    stride: int = 8
    bad: BadDataLog = field(default_factory=BadDataLog)
    threads: int = 4

    def __post_init__(self) -> None:
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self.paths)

    def clips(self, rows: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random square of each clip, uint8 [b, T, 3, size, size], from half of the frame's short side up."""
        seeds = torch.randint(2**62, (len(rows),), generator=generator).tolist()
        with ThreadPoolExecutor(self.threads) as pool:
            read = list(pool.map(self._try, rows, seeds))
        clips, labels = [], []
        for row, seed, got in zip(rows, seeds, read, strict=True):
            tries = 0
            while isinstance(got, BadDataError):
                self._report(row, got)
                tries += 1
                if tries == len(self):
                    raise BadDataError(f"none of the {len(self)} videos can be read: {self.bad.summary()}")
                row = (row + 1) % len(self)
                got = self._try(row, seed)
            clips.append(got)
            labels.append(int(self.labels[row]))
        return torch.stack(clips), torch.tensor(labels)

    def views(self, row: int, clips: int) -> Tensor:
        """Whole frames of ``clips`` clips, uint8 [clips, T, 3, H, W], scaled to the short side ``size``."""
        return clips_of_file(
            self.paths[row], self.num_frames, self.size, clips, sampling=self.sampling, stride=self.stride
        )

    def _try(self, row: int, seed: int) -> Tensor | BadDataError:
        try:
            if row in self._broken:
                raise BadDataError(f"{self.paths[row]}: is broken")
            return self._clip(self.paths[row], torch.Generator().manual_seed(seed))
        except BadDataError as error:
            return error

    def _clip(self, path: Path, generator: torch.Generator) -> Tensor:
        chosen = frame_indices(
            count_frames(path), self.num_frames, self.sampling, stride=self.stride, generator=generator
        )
        share, x, y = torch.rand(3, generator=generator).tolist()
        crop = 0.5 + 0.5 * share
        video = read_frames(path, chosen, round(self.size / crop))
        top, left = (round(at * (side - self.size)) for at, side in ((y, video.shape[2]), (x, video.shape[3])))
        return video[:, :, top : top + self.size, left : left + self.size]

    def _report(self, row: int, error: BadDataError) -> None:
        if row not in self._broken:
            self._broken.add(row)
            self.bad.report(str(self.paths[row]), str(error).removeprefix(f"{self.paths[row]}: "))


def clips_of_file(
    path: Path, num_frames: int, short_side: int, clips: int, *, sampling: Sampling = "uniform", stride: int = 8
) -> Tensor:
    """``clips`` clips spread over a video file, uint8 [clips, T, 3, H, W], in one pass over it."""
    count = count_frames(path)
    chosen = [
        frame_indices(count, num_frames, sampling, stride=stride, clip=clip, clips=clips) for clip in range(clips)
    ]
    return read_frames(path, [i for clip in chosen for i in clip], short_side).unflatten(0, (clips, num_frames))


def list_folder(root: Path, suffixes: Sequence[str] = VIDEO_SUFFIXES) -> list[tuple[Path, str, str]]:
    """File, label and split ("" where the folder has none) of every file below ``root`` that ends so."""
    tops = sorted(path for path in root.iterdir() if path.is_dir())
    splits = {path: SPLIT_NAMES[path.name.lower()] for path in tops if path.name.lower() in SPLIT_NAMES}
    entries = []
    for base, split in splits.items() if splits else [(root, "")]:
        for folder in sorted(path for path in base.iterdir() if path.is_dir()):
            files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
            entries += [(path, folder.name, split) for path in files]
    return entries


def list_file(source: Path, bad: BadDataLog) -> list[tuple[Path, str, str]]:
    """File, label and split of every line of a list; lines without them are reported to ``bad``."""
    with open(source, encoding="utf-8-sig", errors="replace") as lines:
        first = {name.strip().lower() for name in lines.readline().split(",")}
    entries = []
    if first & set(VIDEO_COLUMNS):
        for number, row in read_rows(source):
            file, label = column(row, VIDEO_COLUMNS), column(row, LABEL_COLUMNS)
            if file and label:
                entries.append((source.parent / file, label, row.get("split", "").strip().lower()))
            else:
                bad.report(f"{source}, line {number}", f"has no {'label' if file else 'path'}")
        return entries
    for number, line in enumerate(source.read_text(encoding="utf-8-sig").splitlines(), 1):
        file, separator, label = line.strip().rpartition("," if "," in line else " ")
        if separator:
            entries.append((source.parent / file.strip(), label.strip(), ""))
        elif line.strip():
            bad.report(f"{source}, line {number}", "is no 'path label' or 'path,label'")
    return entries


def load_video_files(
    source: Path,
    size: int,
    num_frames: int,
    *,
    sampling: Sampling = "uniform",
    stride: int = 8,
    bad: BadDataLog | None = None,
) -> VideoSplits:
    """The videos of a folder or a list; files that are not there are reported to ``bad`` at once."""
    bad = bad if bad is not None else BadDataLog()
    listed = list_folder(source) if source.is_dir() else list_file(source, bad)
    entries = []
    for path, label, split in listed:
        if split and split not in SPLIT_NAMES:
            raise BadDataError(f"{source}: unknown split {split!r}; use train, validation or test")
        if path.is_file():
            entries.append((path, label, SPLIT_NAMES[split] if split else split_by_hash(name_below(path, source))))
        else:
            bad.report(str(path), "is not there")
    if not entries:
        raise BadDataError(
            f"{source}: no video in it (looked for folders of classes with files {', '.join(VIDEO_SUFFIXES)}, or for "
            f"lines with a path and a label){'; ' + bad.summary() if len(bad) else ''}"
        )
    classes = sorted({label for _, label, _ in entries})

    def collect(split: str) -> VideoFiles | None:
        own = [(path, classes.index(label)) for path, label, which in entries if which == split]
        if not own:
            return None
        paths, labels = [path for path, _ in own], torch.tensor([label for _, label in own])
        return VideoFiles(paths, labels, classes, size, num_frames, sampling, stride, bad)

    train, validation, test = (collect(split) for split in ("train", "validation", "test"))
    if train is None:
        raise BadDataError(f"{source}: no video is for training")
    # Kinetics has labels for its validation videos alone, so these are the test set.
    tests: dict[str, VideoSet] = (
        {"test": test} if test is not None else {"validation": validation} if validation is not None else {}
    )
    notes = [f"{source}: {len(entries)} videos of {len(classes)} classes"]
    return VideoSplits("files", train, tests, validation, {}, notes)


def split_by_hash(name: str) -> str:
    """A tenth of all names each is for test and validation."""
    share = hash_share(name)
    return "test" if share < 0.1 else "validation" if share < 0.2 else "train"


def name_below(path: Path, source: Path) -> str:
    """A file by its path below the folder or the list that names it, so that a split stays when both move."""
    root = source if source.is_dir() else source.parent
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.as_posix()
