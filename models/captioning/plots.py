"""Captions beside their images, and where the captioner looked at each word."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor

from models.common.plots import INK, RIGHT, WRONG, framed, on_white, save_figure


def word_attention(rows: Sequence[tuple[Tensor, Sequence[str], Tensor]], path: Path) -> None:
    """Draw where a captioner looked at each word: an image [4, S, S] and shares [words, h, w] per row and scale."""
    columns = 1 + max(len(words) for _, words, _ in rows)
    figure = Figure(figsize=(1.35 * columns, 1.65 * len(rows)), layout="constrained")
    for axes_row, (image, words, shares) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        picture = on_white(image)
        side = picture.shape[0]
        heat = torch.nn.functional.interpolate(shares[None].float(), (side, side), mode="bilinear")[0].numpy()
        axes_row[0].imshow(picture)
        for axes, word, own in zip(axes_row[1:], words, heat, strict=False):
            axes.imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=1)
            axes.imshow(own, cmap="inferno", alpha=0.65, vmin=0, vmax=float(heat.max()))
            axes.set_title(word, fontsize=9)
        for axes in axes_row:
            axes.axis("off")
    save_figure(figure, path, dpi=110)


def captions(cells: Mapping[str, Sequence[tuple[Tensor, str, str, float]]], path: Path) -> None:
    """Draw images with the written caption, the right one and the score, one column per title."""
    count = max(len(column) for column in cells.values())
    figure = Figure(figsize=(6.2 * len(cells), 1.05 * count + 0.6), layout="constrained")
    panels = np.atleast_1d(np.asarray(figure.subfigures(1, len(cells))))
    for panel, (title, column) in zip(panels.tolist(), cells.items(), strict=True):
        panel.suptitle(title, fontsize=13)
        grid = panel.subplots(count, 2, squeeze=False, width_ratios=[1, 4.6])
        for picture, words in grid[len(column) :]:
            picture.axis("off")
            words.axis("off")
        for (picture, words), (image, text, right, score) in zip(grid, column, strict=False):
            framed(picture, image, None)
            words.axis("off")
            colour = RIGHT if text == right else WRONG
            words.text(0, 0.8, textwrap.fill(text, 50), color=colour, fontsize=10, va="center")
            shown = textwrap.fill(f"right: {right}", 56)
            words.text(0, 0.35, shown, color=INK, fontsize=9, va="center")
            words.text(0, 0.02, f"CIDEr {score:.2f}", color="#777777", fontsize=8, va="center")
    save_figure(figure, path, dpi=110)
