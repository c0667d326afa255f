"""What every video data source hands out, and how clips become batches: chosen, augmented, normalised."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from models.data.batches import generator_of
from models.data.share import ALL, Draws, Share

# TimeSformer's own constants, so that its weights see the colours that they know.
MEAN, STD = 0.45, 0.225


class VideoSet(Protocol):
    """Labelled videos."""

    classes: Sequence[str]
    labels: Tensor  # [n]

    def __len__(self) -> int: ...

    def clips(self, rows: Sequence[int], generator: torch.Generator, own: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Clips for training, uint8 [b, T, C, S, S], and their labels; what is random comes from ``generator``.

        Of ``rows`` only those of ``own`` are wanted, and what is random is drawn for all.
        """

    def views(self, row: int, clips: int) -> Tensor:
        """Clips for evaluation, uint8 [k, T, C, H, W]: at most ``clips``, spread over the video."""


@dataclass
class TensorVideos:
    """Clips in memory, uint8 [n, T, C, S, S]; each has just the frames of one clip."""

    videos: Tensor
    labels: Tensor
    classes: Sequence[str]

    def __len__(self) -> int:
        return len(self.videos)

    def clips(self, rows: Sequence[int], generator: torch.Generator, own: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """The clips of ``rows``."""
        index = torch.as_tensor(rows)[own]
        return self.videos[index], self.labels[index]

    def views(self, row: int, clips: int) -> Tensor:
        """The one clip of a row."""
        return self.videos[row : row + 1]


@dataclass
class VideoSplits:
    """A training set and the sets that go with it; hyper-parameters are chosen on ``validation`` alone.

    ``factors`` names groups of classes that are reported for themselves: for each class the group it belongs to.
    """

    name: str
    train: VideoSet
    tests: Mapping[str, VideoSet]
    validation: VideoSet | None = None
    factors: Mapping[str, list[int]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def normalise(videos: Tensor) -> Tensor:
    """Grey or RGB in 0..1, [..., C, H, W] -> what the model reads, [..., 3, H, W]."""
    x = (videos - MEAN) / STD
    return x.expand(*x.shape[:-3], 3, *x.shape[-2:])


def resize(videos: Tensor, size: int) -> Tensor:
    """float [..., C, S, S] -> [..., C, size, size]."""
    if videos.shape[-1] == size:
        return videos
    flat = videos.flatten(0, -4) if videos.ndim > 4 else videos
    flat = F.interpolate(flat, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return flat.view(*videos.shape[:-2], size, size)


def prepare(videos: Tensor, size: int) -> Tensor:
    """Square clips for evaluation: uint8 [b, T, C, S, S] -> float [b, T, 3, size, size]."""
    return normalise(resize(videos.float() / 255, size))


def crops(video: Tensor, count: int) -> Tensor:
    """Square crops as high (or wide) as the frames, spread along the longer side: [..., H, W] -> [count, ..., s, s].

    One crop is the central one; square frames have only one.
    """
    height, width = video.shape[-2:]
    side, spare = min(height, width), abs(height - width)
    count = 1 if spare == 0 else count
    starts = [spare // 2] if count == 1 else [round(i * spare / (count - 1)) for i in range(count)]
    return torch.stack([video.narrow(-1 if width > height else -2, start, side) for start in starts])


@dataclass
class ClipAugment:
    """Random framing and light for training clips, the same for all frames of a clip, one pass over the batch.

    ``strength`` scales every change; 0 leaves clips as evaluation prepares them. Clips are never mirrored, neither in
    space nor in time: a stroke to the left is not a stroke to the right. Turns stay far below half the angle between
    the eight directions.
    """

    size: int
    strength: float = 1.0

    def __call__(self, videos: Tensor, draws: torch.Generator | Draws) -> Tensor:
        """uint8 [b, T, C, S, S] -> float [b, T, 3, size, size]; every random number comes from ``draws``."""
        if self.strength == 0:
            return prepare(videos, self.size)
        n, k = len(videos), self.strength
        uniform = (draws if isinstance(draws, Draws) else Draws(draws, n)).uniform

        angle = uniform(-1, 1) * math.radians(8) * k
        zoom, aspect = torch.exp(uniform(-0.2, 0.15) * k), torch.exp(uniform(-0.12, 0.12) * k)
        shear = uniform(-0.12, 0.12) * k
        cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        rows = [cos * aspect, (shear - sin) * aspect, uniform(-0.12, 0.12) * k]
        rows += [(sin + shear) / aspect, cos / aspect, uniform(-0.12, 0.12) * k]
        x = videos.flatten(1, 2).float() / 255  # all frames of a clip are channels: one frame for all
        grid = F.affine_grid(
            torch.stack(rows, 1).view(n, 2, 3), [n, x.shape[1], self.size, self.size], align_corners=False
        )
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)
        x = x.unflatten(1, videos.shape[1:3])
        gain, shift = torch.exp(uniform(-0.2, 0.2, 1, 1, 1, 1) * k), uniform(-0.1, 0.1, 1, 1, 1, 1) * k
        return normalise((x * gain + shift).clamp(0, 1))


@dataclass
class ClipBatch:
    """``videos`` [B, T, 3, S, S], normalised, and ``labels`` [B]."""

    videos: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> ClipBatch:
        """The same batch on ``device``."""
        return ClipBatch(self.videos.to(device), self.labels.to(device))


class ClipPlan:
    """Training batches as a function of (seed, step); an epoch is one pass over the videos in a fresh order.

    ``share`` says which rows of each batch are wanted here.
    """

    def __init__(self, data: VideoSet, augment: ClipAugment, *, batch_size: int, seed: int = 0) -> None:
        self.data, self.augment, self.batch_size, self.seed = data, augment, batch_size, seed
        self.share: Share = ALL
        self.steps_per_epoch = len(data) // batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"batch size {batch_size} exceeds the {len(data)} videos of an epoch: choose a smaller")
        self._epoch: tuple[int, Tensor] | None = None

    def __call__(self, step: int) -> ClipBatch:
        """The batch of one step."""
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, torch.randperm(len(self.data), generator=generator_of(self.seed, 1, epoch))
        rows = self._epoch[1][index * self.batch_size : (index + 1) * self.batch_size]
        generator = generator_of(self.seed, 2, step)
        own = self.share.rows(len(rows))
        videos, labels = self.data.clips(rows.tolist(), generator, own)
        return ClipBatch(self.augment(videos, Draws(generator, len(rows), own)), labels)
