"""Image preparation, random for training and plain for evaluation: uint8 [n, 4, S, S] -> float [n, 3, size, size]."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from models.data.share import Draws

# CLIP's own constants, so that weights from open_clip see the colours that they know.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


def normalise(rgb: Tensor) -> Tensor:
    """Shift and scale RGB in 0..1 by CLIP's mean and deviation."""
    return (rgb - rgb.new_tensor(MEAN).view(3, 1, 1)) / rgb.new_tensor(STD).view(3, 1, 1)


def prepare(images: Tensor, size: int) -> Tensor:
    """Images for evaluation: laid on white, scaled to ``size``, normalised."""
    x = images.float() / 255
    alpha = x[:, 3:]
    rgb = x[:, :3] * alpha + (1 - alpha)
    if rgb.shape[-1] != size:
        rgb = F.interpolate(rgb, (size, size), mode="bilinear", antialias=True, align_corners=False)
    return normalise(rgb).contiguous(memory_format=torch.channels_last)


@dataclass
class Augment:
    """Random frame, background, colour and erasing for training images, one vectorised pass over the batch.

    ``strength`` scales every change; 0 leaves the images as evaluation prepares them. Images are never mirrored: an
    arrow to the left is not an arrow to the right.
    """

    size: int
    strength: float = 1.0

    def __call__(self, images: Tensor, draws: torch.Generator | Draws) -> Tensor:
        """Augment a batch; every random number comes from ``draws``."""
        if self.strength == 0:
            return prepare(images, self.size)
        n, k = len(images), self.strength
        uniform = (draws if isinstance(draws, Draws) else Draws(draws, n)).uniform

        x = images.float() / 255
        x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)  # premultiplied: interpolation must not see hidden colours

        angle = uniform(-1, 1) * math.radians(18) * k
        zoom = torch.exp(uniform(-0.2, 0.28) * k)  # above 1: the drawing gets smaller
        aspect, shear = torch.exp(uniform(-0.2, 0.2) * k), uniform(-0.15, 0.15) * k
        cos, sin = torch.cos(angle) * zoom, torch.sin(angle) * zoom
        rows = [cos * aspect, (shear - sin) * aspect, uniform(-0.12, 0.12) * k]
        rows += [(sin + shear) / aspect, cos / aspect, uniform(-0.12, 0.12) * k]
        grid = F.affine_grid(torch.stack(rows, 1).view(n, 2, 3), [n, 4, self.size, self.size], align_corners=False)
        x = F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)

        # Half of the drawings lie on white, as in evaluation; the others on any colour.
        background = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, 1.0, uniform(0, 1, 3, 1, 1))
        rgb, alpha = x[:, :3], x[:, 3:]
        # Colour changes touch the drawing, not the paper.
        gain = torch.exp(uniform(-0.25, 0.25, 3, 1, 1) * k) * torch.exp(uniform(-0.3, 0.3, 1, 1, 1) * k)
        grey = (rgb * rgb.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        saturation = torch.exp(uniform(-0.5, 0.5, 1, 1, 1) * k)
        saturation = torch.where(uniform(0, 1, 1, 1, 1) < 0.1 * k, 0.0, saturation)
        rgb = ((grey + (rgb - grey) * saturation) * gain).clamp(0).minimum(alpha)
        rgb = rgb + background * (1 - alpha)

        # Erase a rectangle from a quarter of the images.
        axis = torch.linspace(0, 1, self.size)
        cx, cy, w, h = (uniform(a, b, 1, 1) for a, b in ((0, 1), (0, 1), (0.05, 0.2), (0.05, 0.2)))
        hole = ((axis.view(1, 1, -1) - cx).abs() < w) & ((axis.view(1, -1, 1) - cy).abs() < h)
        hole &= uniform(0, 1, 1, 1) < 0.25 * k
        rgb = torch.where(hole.unsqueeze(1), uniform(0, 1, 3, 1, 1), rgb)
        return normalise(rgb).contiguous(memory_format=torch.channels_last)
