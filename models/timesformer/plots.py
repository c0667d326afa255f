"""A picture of what TimeSformer draws on in a clip."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from models.common.plots import drawable, save_figure, wide_fonts


def draw_rollout(clip: Tensor, shares: Tensor, title: str, path: Path) -> None:
    """Draw the frames of a clip [T, C, S, S] (uint8), and below each the attention on it, [T, h, w]."""
    frames = clip.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    light = frames.mean(-1) / 255
    side = frames.shape[1]
    heat = torch.nn.functional.interpolate(shares[None].float(), (side, side), mode="bilinear")[0].numpy()
    count = len(frames)
    with wide_fonts():
        figure = Figure(figsize=(1.5 * count + 0.8, 3.8), layout="constrained")
        figure.suptitle(drawable([title])[0])
        grid = figure.subplots(2, count, squeeze=False)
        for t in range(count):
            grid[0, t].imshow(frames[t])
            grid[0, t].set_title(f"frame {t + 1}: {100 * float(shares[t].sum()):.0f} %", fontsize=8)
            grid[1, t].imshow(light[t], cmap="gray")
            grid[1, t].imshow(heat[t], cmap="inferno", alpha=0.65, vmin=0, vmax=float(heat.max()))
            for axes in grid[:, t]:
                axes.set(xticks=[], yticks=[])
        save_figure(figure, path, dpi=110)
