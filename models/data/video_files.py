"""A user's own video files: a folder of classes, as Kinetics is laid out, or a list of files and labels.

A folder holds one folder per class, either at once or below ``train``, ``val`` (or ``validation``) and ``test``. A list
is a CSV with the columns ``path`` (or ``video``, ``file``, ...), ``label`` (or ``class``) and, if wanted, ``split``; or
Kinetics' own, with ``youtube_id``, ``time_start`` and ``time_end`` in place of a path; or has no header, but lines of
``path label`` or ``path,label``. Paths are relative to the list. If no split is named, validation and test take a tenth
of the files each, chosen by hash.

Frames are decoded by PyAV, whose wheel brings FFmpeg with it. A file is opened when a clip of it is asked for.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from models.data.folder import IMAGE_COLUMNS
from models.data.rows import (
    SPLIT_NAMES,
    Row,
    column,
    fields_of,
    header_of,
    known_split,
    lines_of,
    read_rows,
    read_text,
)
from models.data.sets import BadDataError, BadDataLog, hash_share
from models.data.shards.part import FilePart
from models.data.video import VideoSet, VideoSplits

VIDEO_SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".ts", ".webm", ".wmv")
VIDEO_COLUMNS = ("video", *IMAGE_COLUMNS)
LABEL_COLUMNS = ("label", "class")
KINETICS_COLUMNS = ("youtube_id", "time_start", "time_end")
_LONGEST_PATH = 4096  # signs, on Linux: no comma behind them ends the path of a line

Sampling = Literal["uniform", "dense"]
VideoFile = Path | FilePart  # a part is a video in a shard


def _opened(path: VideoFile) -> str | io.BytesIO:
    """What PyAV opens for a file."""
    return io.BytesIO(path.read()) if isinstance(path, FilePart) else str(path)


def frame_times(path: VideoFile) -> list[float]:
    """When each frame of a file is shown, in seconds, and last when the last one ends.

    Packet by packet, without decoding: a header may count frames that a cut left out, or not count at all. Where a file
    does not say when, its frames count as a second each.
    """
    import av

    try:
        with av.open(_opened(path), metadata_errors="replace") as container:
            if not container.streams.video:
                raise BadDataError(f"{path}: holds no video stream")
            stream = container.streams.video[0]
            # Of a packet its numbers alone are kept: together packets are the whole file.
            held = [
                (packet.pts, packet.duration, packet.is_discard) for packet in container.demux(stream) if packet.size
            ]
            if len(held) < stream.frames:
                raise BadDataError(f"{path}: breaks off after {len(held)} of {stream.frames} frames")
            packets = [(pts, duration) for pts, duration, discarded in held if not discarded]
            if not packets:
                raise BadDataError(f"{path}: holds no frame")
            shown = sorted(pts for pts, _ in packets if pts is not None)
            if len(set(shown)) < len(packets) or stream.time_base is None:
                return [float(i) for i in range(len(packets) + 1)]
            span = (shown[-1] - shown[0]) / max(1, len(shown) - 1)
            last = max((duration or 0 for pts, duration in packets if pts == shown[-1]), default=0) or span or 1
            return [float(time * stream.time_base) for time in (*shown, shown[-1] + last)]
    except (av.FFmpegError, OSError) as error:
        raise BadDataError(f"{path}: cannot be opened ({_reason(error)})") from error


def at_even_times(times: Sequence[float], slots: Sequence[int]) -> list[int]:
    """The frame that is shown in the middle of each slot, of as many equal slots of time as there are frames.

    At a constant rate that is the frame of the same number.
    """
    count = len(times) - 1
    start, length = times[0], (times[-1] - times[0]) / count
    middles = torch.tensor([start + (slot + 0.5) * length for slot in slots], dtype=torch.float64)
    frames = torch.searchsorted(torch.tensor(times[:-1], dtype=torch.float64), middles, right=True) - 1
    return frames.clamp(0, count - 1).tolist()


def read_frames(path: VideoFile, indices: Sequence[int], short_side: int | None = None) -> Tensor:
    """The frames of ``indices`` in their order, turned as players do, uint8 [n, 3, H, W], scaled to ``short_side``."""
    import av

    wanted, found, seen = set(indices), {}, 0
    try:
        with av.open(_opened(path), metadata_errors="replace") as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for seen, frame in enumerate(container.decode(stream), 1):
                if seen - 1 in wanted:
                    scale = short_side / min(frame.width, frame.height) if short_side else 1.0
                    width, height = round(frame.width * scale), round(frame.height * scale)
                    pixels = frame.to_ndarray(format="rgb24", width=width, height=height)
                    found[seen - 1] = np.rot90(pixels, round(frame.rotation / 90))  # counterclockwise, as FFmpeg counts
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
    """Which of ``count`` frames, each shown as long as any other, make a clip.

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

    paths: Sequence[VideoFile]
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

    def clips(self, rows: Sequence[int], generator: torch.Generator, own: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """A random square of each clip, uint8 [b, T, 3, size, size], from half of the frame's short side up."""
        seeds = torch.randint(2**62, (len(rows),), generator=generator)[own].tolist()
        rows = rows[own]
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

    def _clip(self, path: VideoFile, generator: torch.Generator) -> Tensor:
        times = frame_times(path)
        slots = frame_indices(len(times) - 1, self.num_frames, self.sampling, stride=self.stride, generator=generator)
        share, x, y = torch.rand(3, generator=generator).tolist()
        crop = 0.5 + 0.5 * share
        video = read_frames(path, at_even_times(times, slots), round(self.size / crop))
        top, left = (round(at * (side - self.size)) for at, side in ((y, video.shape[2]), (x, video.shape[3])))
        return video[:, :, top : top + self.size, left : left + self.size]

    def _report(self, row: int, error: BadDataError) -> None:
        if row not in self._broken:
            self._broken.add(row)
            self.bad.report(str(self.paths[row]), str(error).removeprefix(f"{self.paths[row]}: "))


def clips_of_file(
    path: VideoFile, num_frames: int, short_side: int, clips: int, *, sampling: Sampling = "uniform", stride: int = 8
) -> Tensor:
    """``clips`` clips spread over a video file, uint8 [clips, T, 3, H, W], in one pass over it."""
    times = frame_times(path)
    slots = [
        slot
        for clip in range(clips)
        for slot in frame_indices(len(times) - 1, num_frames, sampling, stride=stride, clip=clip, clips=clips)
    ]
    return read_frames(path, at_even_times(times, slots), short_side).unflatten(0, (clips, num_frames))


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
    text = read_text(source)
    is_json = source.suffix.lower() in (".json", ".jsonl", ".ndjson")
    _, names = header_of(text, (VIDEO_COLUMNS, LABEL_COLUMNS))
    if not is_json and set(names).isdisjoint((*VIDEO_COLUMNS, *KINETICS_COLUMNS)):
        return _lines_without_header(source, text, bad)
    needed = () if is_json or set(KINETICS_COLUMNS) <= set(names) else (VIDEO_COLUMNS, LABEL_COLUMNS)
    entries = []
    for number, row in read_rows(source, bad, needed):
        label, split = column(row, LABEL_COLUMNS), column(row, ("split",)).lower()
        file = column(row, VIDEO_COLUMNS) or _kinetics_file(source, row, label, split)
        if file and label:
            entries.append((source.parent / file, label, split))
        else:
            bad.report(f"{source}, line {number}", f"has no {'label' if file else 'path'}")
    return entries


def _kinetics_file(source: Path, row: Row, label: str, split: str) -> str:
    """The file of a row of Kinetics' own lists: youtube_id_start_end.mp4 beside the list, or where its tools put it."""
    if not all(row.get(name) for name in KINETICS_COLUMNS):
        return ""
    start, end = (row[name].partition(".")[0].zfill(6) for name in KINETICS_COLUMNS[1:])
    name = f"{row['youtube_id']}_{start}_{end}.mp4"
    places = [Path(name), Path(split, name), Path(label, name), Path(split, label, name)]
    return str(next((place for place in places if os.path.isfile(source.parent / place)), places[0]))


def _lines_without_header(source: Path, text: str, bad: BadDataLog) -> list[tuple[Path, str, str]]:
    """Lines of ``path label``, or with a comma or a tab between; paths and labels may hold blanks and commas.

    Of the ways to part a line, the first that names a file which is there is right.
    """
    entries = []
    for number, line in enumerate(lines_of(text), 1):
        line = line.strip()
        if not line:
            continue
        ways = [tuple(fields) for mark in "\t,;" if len(fields := fields_of(line, mark)) == 2]
        ways += [(line[:i], line[i + 1 :]) for i, sign in enumerate(line[:_LONGEST_PATH]) if sign == ","]
        ways += [(file, label) for file, blank, label in [line.rpartition(" ")] if blank]
        ways = [(file.strip(), label.strip()) for file, label in ways if file.strip() and label.strip()]
        if ways:
            file, label = next((way for way in ways if os.path.isfile(source.parent / way[0])), ways[0])
            entries.append((source.parent / file, label, ""))
        else:
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
    read = functools.partial(VideoFiles, size=size, num_frames=num_frames, sampling=sampling, stride=stride, bad=bad)
    return splits_of_videos(source, list_videos(source, bad), read)


def list_videos(source: Path, bad: BadDataLog) -> list[tuple[VideoFile, str, str]]:
    """File, label and split of every video of a folder or a list; what is not there is reported to ``bad``."""
    listed = list_folder(source) if source.is_dir() else list_file(source, bad)
    entries: list[tuple[VideoFile, str, str]] = []
    for path, label, split in listed:
        place = known_split(source, split) if split else split_by_hash(name_below(path, source))
        if os.path.isfile(path):  # Path.is_file raises for names that no file can have
            entries.append((path, label, place))
        else:
            bad.report(str(path), "is not there")
    if not entries:
        raise BadDataError(
            f"{source}: no video in it (looked for folders of classes with files {', '.join(VIDEO_SUFFIXES)}, or for "
            f"lines with a path and a label){'; ' + bad.summary() if len(bad) else ''}"
        )
    return entries


def splits_of_videos(
    source: Path | str,
    entries: Sequence[tuple[VideoFile, str, str]],
    read: Callable[[Sequence[VideoFile], Tensor, Sequence[str]], VideoFiles],
) -> VideoSplits:
    """The sets of videos whose file, label and split are known; ``read`` takes files, labels and classes."""
    classes = sorted({label for _, label, _ in entries})

    def collect(split: str) -> VideoFiles | None:
        own = [(path, classes.index(label)) for path, label, which in entries if which == split]
        if not own:
            return None
        paths, labels = [path for path, _ in own], torch.tensor([label for _, label in own])
        return read(paths, labels, classes)

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
