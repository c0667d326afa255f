"""Kanji as they are written: KanjiVG's strokes in their order, the class is the radical.

The strokes (package ``kanjivg``, by Ulrich Apel and others, CC BY-SA 3.0) were traced from human writing. A clip shows
a kanji grow stroke by stroke, an eighth of its ink per frame. Each kanji is one clip, in one split.
"""

from __future__ import annotations

import importlib.metadata
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from models.data.sets import BadDataError, BadDataLog, hash_share
from models.data.video import TensorVideos, VideoSplits

BOX = 109  # the side of KanjiVG's drawings
_KVG = "{http://kanjivg.tagaini.net}"
_RADICALS = 20


def kanji_files() -> list[Path]:
    """The files of the kanji themselves, without variant ways of writing them, in the order of Unicode."""
    try:
        files = importlib.metadata.files("kanjivg") or []
    except importlib.metadata.PackageNotFoundError as error:
        raise ModuleNotFoundError("--data kanji needs the package kanjivg: pip install kanjivg") from error
    found = [Path(str(f.locate())) for f in files if re.fullmatch(r"[0-9a-f]{5}\.svg", f.name)]
    return sorted(path for path in found if _is_kanji(int(path.stem, 16)))


def _is_kanji(code: int) -> bool:
    return 0x3400 <= code <= 0x9FFF or 0xF900 <= code <= 0xFAFF or code >= 0x20000


def curve_points(path: str, steps: int = 8) -> np.ndarray:
    """The points [n, 2] of an SVG path of cubic curves (M, C, S, in either case), ``steps`` to a curve."""
    tokens = re.findall(r"[A-Za-z]|-?(?:\d+\.?\d*|\.\d+)(?:[eE]-?\d+)?", path)
    at, control = np.zeros(2), np.zeros(2)
    points, command, i = [at], "", 0
    share = np.linspace(0, 1, steps + 1)[1:, None]
    while i < len(tokens):
        if tokens[i].isalpha():
            command, i = tokens[i], i + 1
        count = {"M": 2, "C": 6, "S": 4}.get(command.upper(), 0)
        numbers = tokens[i : i + count]
        if not count or len(numbers) < count or any(n.isalpha() for n in numbers):
            raise ValueError(f"cannot read the path at {command!r}")
        values = np.array(numbers, dtype=float).reshape(-1, 2) + (at if command.islower() else 0)
        i += count
        if command.upper() == "M":
            at = control = values[0]
            points = [at]
            continue
        first = values[0] if command.upper() == "C" else 2 * at - control
        control, end = values[-2], values[-1]
        a, b, c, d = (1 - share) ** 3, 3 * (1 - share) ** 2 * share, 3 * (1 - share) * share**2, share**3
        points.extend(a * at + b * first + c * control + d * end)
        at = end
    return np.array(points)


def read_kanji(path: Path) -> tuple[str, list[np.ndarray]]:
    """The radical ("" if the file names none) and the strokes of a kanji; raises :class:`BadDataError`."""
    try:
        text = path.read_text(encoding="utf-8")
        root = ElementTree.fromstring(text)
        radicals = {
            group.get(f"{_KVG}radical"): group.get(f"{_KVG}element", "")
            for group in root.iter()
            if group.get(f"{_KVG}radical")
        }
        strokes = [curve_points(p.get("d", "")) for p in root.iter("{http://www.w3.org/2000/svg}path")]
    except (OSError, ValueError, ElementTree.ParseError) as error:
        raise BadDataError(f"{path}: {error}") from error
    if not strokes:
        raise BadDataError(f"{path}: holds no stroke")
    return radicals.get("general") or radicals.get("tradit") or "", strokes


def draw_strokes(strokes: list[np.ndarray], size: int, num_frames: int, width: float = 4.0) -> Tensor:
    """White ink on black, uint8 [T, 1, size, size]: frame t shows the first (t + 1) / T of the ink."""
    scale = 4 * size / BOX  # drawn large and scaled down: smooth edges
    canvas = Image.new("L", (4 * size, 4 * size))
    pen, line = ImageDraw.Draw(canvas), max(1, round(width * scale))
    segments = list(_segments(strokes, scale))
    total = sum(length for *_, length in segments)
    frames, drawn, next_segment = [], 0.0, 0
    for t in range(num_frames):
        goal = total * (t + 1) / num_frames
        while next_segment < len(segments) and drawn < goal - 1e-9:
            start, end, length = segments[next_segment]
            pen.line([*start, *end], fill=255, width=line)
            for x, y in (start, end):  # round joints and ends
                pen.ellipse((x - line / 2, y - line / 2, x + line / 2, y + line / 2), fill=255)
            drawn, next_segment = drawn + length, next_segment + 1
        frames.append(np.array(canvas.resize((size, size), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(frames)).unsqueeze(1)


def _segments(strokes: list[np.ndarray], scale: float) -> Iterator[tuple[np.ndarray, np.ndarray, float]]:
    for stroke in strokes:
        for start, end in zip(stroke[:-1] * scale, stroke[1:] * scale, strict=True):
            yield start, end, float(np.hypot(*(end - start)))


def load_kanji(size: int, num_frames: int, bad: BadDataLog | None = None) -> VideoSplits:
    """The kanji of the twenty most frequent radicals: 70 % for training, 10 % validation, 20 % test, by hash."""
    bad = bad if bad is not None else BadDataLog()
    kanji: list[tuple[str, str, list[np.ndarray]]] = []
    for path in kanji_files():
        try:
            radical, strokes = read_kanji(path)
        except BadDataError as error:
            bad.report(str(path), str(error).removeprefix(f"{path}: "))
            continue
        if radical:
            kanji.append((chr(int(path.stem, 16)), radical, strokes))
    common = [radical for radical, _ in Counter(radical for _, radical, _ in kanji).most_common(_RADICALS)]
    chosen = [entry for entry in kanji if entry[1] in common]

    def split_of(character: str) -> str:
        share = hash_share(character)
        return "train" if share < 0.7 else "validation" if share < 0.8 else "test"

    def collect(split: str) -> TensorVideos:
        own = [entry for entry in chosen if split_of(entry[0]) == split]
        videos = torch.stack([draw_strokes(strokes, size, num_frames) for *_, strokes in own])
        return TensorVideos(videos, torch.tensor([common.index(radical) for _, radical, _ in own]), common)

    train, validation, test = (collect(split) for split in ("train", "validation", "test"))
    notes = [
        f"KanjiVG: {len(chosen)} kanji of the {_RADICALS} most frequent radicals, split by kanji "
        f"({len(train)} train, {len(validation)} validation, {len(test)} test)"
    ]
    return VideoSplits("kanji", train, {"kanji": test}, validation, {}, notes)
