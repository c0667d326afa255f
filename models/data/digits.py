"""Handwritten digits that move over a torus: the class is the direction and the speed, which no single frame shows.

The digits are scikit-learn's (1,797 images of 8 x 8). Each clip starts at a random place, has a speed within a quarter
of a pixel per frame of its class's, digits that stand still beside the one that moves, and noise. Training, validation
and test have different images of digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from models.data.batches import generator_of
from models.data.video import TensorVideos, VideoSplits

DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
SPEEDS = (1.0, 2.0, 3.0, 4.0)  # pixels per frame
CLASSES = [f"{direction}, {speed:.0f} px" for direction in DIRECTIONS for speed in SPEEDS]


def velocities() -> Tensor:
    """How many pixels per frame a class moves to the right and downwards, [classes, 2]."""
    angles = torch.arange(len(DIRECTIONS)) * (2 * math.pi / len(DIRECTIONS))
    units = torch.stack([angles.cos(), angles.sin()], 1)
    return (units[:, None] * torch.tensor(SPEEDS)[:, None]).flatten(0, 1)


@dataclass
class MovingDigits:
    """Clips drawn as they are asked for: row r is image r // 32 in class r % 32; the rest is the generator's.

    ``easier`` leaves the standing digit out of half of the clips, and draws their noise from 0 to ``noise``: a model
    that trains on such clips finds the motion much sooner.
    """

    images: Tensor  # [n, 8, 8] in 0..1
    size: int = 32
    num_frames: int = 8
    noise: float = 0.1
    easier: bool = False
    classes: Sequence[str] = field(default_factory=lambda: list(CLASSES))

    def __post_init__(self) -> None:
        self.labels = torch.arange(len(CLASSES)).repeat(len(self.images))

    def __len__(self) -> int:
        return len(self.labels)

    def clips(self, rows: Sequence[int], generator: torch.Generator, own: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Draw the clips of ``rows``, uint8 [b, T, 1, S, S]."""
        index = torch.as_tensor(rows)
        labels, b, T = index % len(CLASSES), len(index), self.num_frames

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand((b, *shape), generator=generator) * (high - low) + low

        velocity = velocities()[labels]
        velocity = velocity * (1 + uniform(-0.25, 0.25, 1) / velocity.norm(dim=1, keepdim=True))
        start, moment = uniform(0, self.size, 1, 2), torch.arange(T).view(1, T, 1)
        moving = self._draw(self.images[index // len(CLASSES)], start + velocity[:, None] * moment)
        others = torch.randint(len(self.images), (b,), generator=generator)
        still = self._draw(self.images[others], uniform(0, self.size, 1, 2))
        noise = torch.full((b, 1, 1, 1), self.noise)
        if self.easier:
            still, noise = still * (uniform(0, 1, 1, 1, 1) < 0.5), noise * uniform(0, 1, 1, 1, 1)
        x = torch.maximum(moving, still)  # [b, T, S, S]
        x = x * uniform(0.6, 1.0, 1, 1, 1) + noise * torch.randn(x.shape, generator=generator)
        return (255 * x[own].clamp(0, 1)).to(torch.uint8).unsqueeze(2), labels[own]

    def views(self, row: int, clips: int) -> Tensor:
        """One clip, the same each time."""
        return self.clips([row], generator_of(row, 3))[0]

    def _draw(self, images: Tensor, centres: Tensor, radius: float = 7.0) -> Tensor:
        """Digits [b, 8, 8] around centres [b, t, 2] on the torus: [b, t, S, S], placed to fractions of a pixel."""
        b, t = centres.shape[:2]
        axis = torch.arange(self.size)
        offset = axis - centres[..., None]  # [b, t, 2, S]
        offset = (offset + self.size / 2) % self.size - self.size / 2
        x, y = (offset[:, :, i] / radius for i in (0, 1))
        grid = torch.stack(
            [x[:, :, None, :].expand(-1, -1, self.size, -1), y[..., None].expand(-1, -1, -1, self.size)], -1
        )
        found = F.grid_sample(images[:, None], grid.flatten(1, 2), mode="bilinear", align_corners=False)
        return found.view(b, t, self.size, self.size)


def load_digits(size: int, num_frames: int, *, test_clips: int = 2048, seed: int = 0) -> VideoSplits:
    """1,197 images for training, 200 and 400 for validation and test clips, which are drawn once."""
    from sklearn import datasets

    images = torch.from_numpy(datasets.load_digits().images).float() / 16
    images = images[torch.randperm(len(images), generator=generator_of(seed, 11))]
    parts = {"train": images[:1197], "validation": images[1197:1397], "test": images[1397:]}

    def fixed(name: str, count: int, key: int) -> TensorVideos:
        drawer = MovingDigits(parts[name], size, num_frames)
        generator = generator_of(seed, key)
        rows = torch.randperm(len(drawer), generator=generator)[:count]
        return TensorVideos(*drawer.clips(rows.tolist(), generator), CLASSES)

    factors = {
        "direction": [i // len(SPEEDS) for i in range(len(CLASSES))],
        "speed": [i % len(SPEEDS) for i in range(len(CLASSES))],
    }
    images_of = ", ".join(f"{name} {len(own)}" for name, own in parts.items())
    notes = [
        f"digits on a torus: {len(DIRECTIONS)} directions x {len(SPEEDS)} speeds, one digit that stands and noise in "
        f"every clip (half of the training clips are without); no image of a digit is in two of the sets ({images_of})"
    ]
    train = MovingDigits(parts["train"], size, num_frames, easier=True)
    tests = {"digits": fixed("test", test_clips, 13)}
    return VideoSplits("digits", train, tests, fixed("validation", 1024, 12), factors, notes)
