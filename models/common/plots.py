"""Pictures that several models draw of a run: its curves, what it finds, and where it errs."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text
from torch import Tensor

from models.data.sets import ImageTextSet

# Labels in Chinese and Japanese characters take whichever of these fonts is there.
_CJK_FONTS = ("Noto Sans CJK JP", "IPAexGothic", "Hiragino Sans", "Yu Gothic", "WenQuanYi Zen Hei")
RIGHT, WRONG, INK = "#1a7f37", "#c4442b", "#333333"


def save_figure(figure: Figure, path: Path, dpi: int = 110, **options: Any) -> None:
    """Write a picture, in a folder that is made where it is not there; a $ in its texts begins no formula."""
    for text in figure.findobj(Text):
        text.set_parse_math(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, **options)


def drawable(names: Sequence[str]) -> list[str]:
    """The names; a character that no font here can draw is named by its code point: 水 is U+6C34."""
    families = {*_CJK_FONTS, *matplotlib.rcParams["font.sans-serif"]} & set(font_manager.get_font_names())
    drawn = {code for family in families for code in FT2Font(font_manager.findfont(family)).get_charmap()}
    return ["".join(c if ord(c) in drawn else f"U+{ord(c):04X}" for c in name) for name in names]


def on_white(image: Tensor) -> np.ndarray:
    """An image [4, S, S] (uint8) laid on white, [S, S, 3] in 0..1."""
    x = image.float() / 255
    return (x[:3] * x[3:] + (1 - x[3:])).permute(1, 2, 0).numpy()


def framed(axes: Axes, image: Tensor, right: bool | None) -> None:
    """An image in a frame: green if right, red if wrong, grey if it is the query."""
    axes.imshow(on_white(image))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color("#999999" if right is None else RIGHT if right else WRONG)
        spine.set_linewidth(1 if right is None else 2.6)


def wide_fonts() -> AbstractContextManager[None]:
    """Within this context labels may hold Chinese and Japanese characters, if a font here has them."""
    return matplotlib.rc_context({"font.sans-serif": [*_CJK_FONTS, *matplotlib.rcParams["font.sans-serif"]]})


def _smooth(values: Sequence[float], width: int) -> np.ndarray:
    """A running mean over ``width`` steps, shorter at the ends."""
    kernel = np.ones(min(width, len(values)))
    y = np.asarray(values, dtype=float)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones_like(y), kernel, "same")


def curves(
    history: Sequence[dict[str, float]],
    path: Path,
    *,
    loss: str,
    chance: float | None = None,
    second: tuple[str, str, str],
) -> None:
    """The loss (each step and its running mean) and a second number of the history, against the step.

    ``second`` is its key, the label of its axis, and its title; ``chance`` is the loss of a model that knows nothing.
    """
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        left, right = figure.subplots(1, 2)
        steps = [row["step"] + 1 for row in history]
        for axes, key, label, title in ((left, "loss", loss, "Loss"), (right, *second)):
            values = [row[key] for row in history]
            smooth = _smooth(values, max(1, len(values) // 50))
            axes.plot(steps, values, color="#9db7d5", linewidth=0.7, label="each step")
            axes.plot(steps, smooth, color="#1f4e8c", linewidth=1.8, label="running mean")
            axes.set(xlabel="step", ylabel=label, title=title)
        if chance is not None:
            left.axhline(chance, color=INK, linewidth=0.8, linestyle="--", label="chance")
        left.set_ylim(0, None)
        left.legend(frameon=False)
        save_figure(figure, path, dpi=130)


def similarity(images: Tensor, texts: Tensor, data: ImageTextSet, path: Path) -> None:
    """Cosines of a test batch: captions down, images across; the diagonal should stand out."""
    n = len(data)
    cosines = (texts @ images.T).numpy()
    figure = Figure(figsize=(3.4 + 0.34 * n, 1.2 + 0.34 * n), layout="constrained")
    axes: Axes = figure.subplots()
    limit = max(0.1, float(np.abs(cosines).max()))
    shown = axes.imshow(cosines, cmap="RdBu_r", vmin=-limit, vmax=limit)
    for column in range(n):
        best = int(cosines[:, column].argmax())
        colour = RIGHT if best == column else WRONG
        axes.add_patch(
            matplotlib.patches.Rectangle((column - 0.5, best - 0.5), 1, 1, fill=False, edgecolor=colour, linewidth=2)
        )
        inset = axes.inset_axes((column / n, 1.005, 1 / n, 1 / n))
        inset.imshow(on_white(data.images[column]))
        inset.axis("off")
    axes.set_xticks([])
    axes.set_yticks(range(n), [textwrap.shorten(name, 34, placeholder="…") for name in data.names()], fontsize=8)
    axes.set_xlabel("each image's best caption: green where it is the right one, red where it is not")
    figure.colorbar(shown, ax=axes, shrink=0.6, label="cosine")
    save_figure(figure, path, dpi=120, bbox_inches="tight")  # the layout engine forgets the labels beside inset axes


def retrievals(
    images: Tensor, texts: Tensor, data: ImageTextSet, path: Path, *, queries: int = 8, top: int = 5, seed: int = 0
) -> None:
    """Random captions with the images they find, and random images with the captions they find."""
    n = len(data)
    top = min(top, n)
    picked = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: 2 * queries].tolist()
    by_text, by_image = picked[:queries], picked[queries:]
    scores = texts @ images.T
    names = data.names()
    figure = Figure(figsize=(15, 1.25 * queries + 0.9), layout="constrained")
    panels = np.asarray(figure.subfigures(1, 2, width_ratios=[1.15, 1]))
    left, right = panels.tolist()
    left.suptitle("caption → images (green frame: the right one)", fontsize=13)
    grid = left.subplots(queries, top + 1, squeeze=False, width_ratios=[2.2] + [1] * top)
    for row, axes_row in enumerate(grid):
        axes_row[0].axis("off")
        if row >= len(by_text):
            for axes in axes_row:
                axes.axis("off")
            continue
        query = by_text[row]
        axes_row[0].text(1, 0.5, textwrap.fill(names[query], 22), ha="right", va="center", fontsize=10)
        for axes, found in zip(axes_row[1:], scores[query].topk(top).indices.tolist(), strict=True):
            framed(axes, data.images[found], found == query)
    right.suptitle("image → captions", fontsize=13)
    grid = right.subplots(queries, 2, squeeze=False, width_ratios=[1, 4.5])
    for row, (picture, words) in enumerate(grid):
        words.axis("off")
        if row >= len(by_image):
            picture.axis("off")
            continue
        query = by_image[row]
        best = scores[:, query].topk(top)
        framed(picture, data.images[query], None)
        for line, (score, found) in enumerate(zip(best.values.tolist(), best.indices.tolist(), strict=True)):
            text = f"{score:.2f}  {textwrap.shorten(names[found], 52, placeholder='…')}"
            mark, colour = ("✓", RIGHT) if found == query else ("✗", WRONG)
            words.text(
                0,
                0.92 - 0.21 * line,
                f"{mark} {text}",
                color=colour,
                fontsize=9.5,
                va="center",
                weight="bold" if found == query else "normal",
            )
    save_figure(figure, path, dpi=110)


def contact_sheet(found: Sequence[tuple[str, ImageTextSet, Tensor]], path: Path, *, columns: int = 8) -> None:
    """What each of some queries found: its images, best first, with their scores and captions, ``columns`` in a row."""
    columns = min(columns, max(len(data) for _, data, _ in found))
    rows = [-(-len(data) // columns) for _, data, _ in found]
    with wide_fonts():
        figure = Figure(figsize=(1.7 * columns, 2.15 * sum(rows) + 0.35 * len(found)), layout="constrained")
        panels = np.atleast_1d(np.asarray(figure.subfigures(len(found), 1, height_ratios=rows)))
        for panel, count, (query, data, scores) in zip(panels.tolist(), rows, found, strict=True):
            panel.suptitle(drawable([query])[0], fontsize=13)
            grid = panel.subplots(count, columns, squeeze=False).flatten().tolist()
            for axes in grid[len(data) :]:
                axes.axis("off")
            captions = drawable(data.names())
            for axes, image, name, score in zip(grid, data.images, captions, scores.tolist(), strict=False):
                framed(axes, image, None)
                axes.set_title(f"{score:.3f}", fontsize=8, color="#777777")
                text = textwrap.fill(textwrap.shorten(name, 40, placeholder="…"), 20)
                axes.set_xlabel(text, fontsize=8)
        save_figure(figure, path, dpi=110)


def confusion(predicted: Tensor, truth: Tensor, classes: Sequence[str], path: Path) -> None:
    """Rows are the true classes, columns what was said; each row's shares, the right ones on the diagonal."""
    n = len(classes)
    counts = torch.zeros(n, n).index_put_((truth, predicted), torch.ones(len(truth)), accumulate=True)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    with wide_fonts():
        figure = Figure(figsize=(2.4 + 0.22 * n, 2 + 0.22 * n), layout="constrained")
        axes: Axes = figure.subplots()
        shown = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        labels = drawable(classes)
        axes.set_xticks(range(n), labels, rotation=90, fontsize=8)
        axes.set_yticks(range(n), labels, fontsize=8)
        axes.set(xlabel="predicted", ylabel="true")
        figure.colorbar(shown, ax=axes, shrink=0.6, label="share of the true class")
        save_figure(figure, path, dpi=120)
