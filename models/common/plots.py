"""Pictures of a run: its curves, what it finds, and where it errs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font
from torch import Tensor

from models.data.sets import ImageTextSet

# For labels in Chinese and Japanese characters, whichever of these is there.
_CJK_FONTS = ("Noto Sans CJK JP", "IPAexGothic", "Hiragino Sans", "Yu Gothic", "WenQuanYi Zen Hei")
RIGHT, WRONG, INK = "#1a7f37", "#c4442b", "#333333"


def _labels(names: Sequence[str]) -> list[str]:
    """The names; a character that no font here can draw is named by its code point: 水 is U+6C34."""
    families = {*_CJK_FONTS, *matplotlib.rcParams["font.sans-serif"]} & set(font_manager.get_font_names())
    drawn = {code for family in families for code in FT2Font(font_manager.findfont(family)).get_charmap()}
    return ["".join(c if ord(c) in drawn else f"U+{ord(c):04X}" for c in name) for name in names]


def _on_white(image: Tensor) -> np.ndarray:
    x = image.float() / 255
    return (x[:3] * x[3:] + (1 - x[3:])).permute(1, 2, 0).numpy()


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
        figure.savefig(path, dpi=130)


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
        inset.imshow(_on_white(data.images[column]))
        inset.axis("off")
    axes.set_xticks([])
    axes.set_yticks(range(n), [textwrap.shorten(name, 34, placeholder="…") for name in data.names()], fontsize=8)
    axes.set_xlabel("each image's best caption: green where it is the right one, red where it is not")
    figure.colorbar(shown, ax=axes, shrink=0.6, label="cosine")
    figure.savefig(path, dpi=120, bbox_inches="tight")  # the layout engine forgets the labels beside inset axes


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
            _framed(axes, data.images[found], found == query)
    right.suptitle("image → captions", fontsize=13)
    grid = right.subplots(queries, 2, squeeze=False, width_ratios=[1, 4.5])
    for row, (picture, words) in enumerate(grid):
        words.axis("off")
        if row >= len(by_image):
            picture.axis("off")
            continue
        query = by_image[row]
        best = scores[:, query].topk(top)
        _framed(picture, data.images[query], None)
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
    figure.savefig(path, dpi=110)


def contact_sheet(found: Sequence[tuple[str, ImageTextSet, Tensor]], path: Path, *, columns: int = 8) -> None:
    """What each of some queries found: its images, best first, with their scores and captions, ``columns`` in a row."""
    columns = min(columns, max(len(data) for _, data, _ in found))
    rows = [-(-len(data) // columns) for _, data, _ in found]
    with matplotlib.rc_context({"font.sans-serif": [*_CJK_FONTS, *matplotlib.rcParams["font.sans-serif"]]}):
        figure = Figure(figsize=(1.7 * columns, 2.15 * sum(rows) + 0.35 * len(found)), layout="constrained")
        panels = np.atleast_1d(np.asarray(figure.subfigures(len(found), 1, height_ratios=rows)))
        for panel, count, (query, data, scores) in zip(panels.tolist(), rows, found, strict=True):
            panel.suptitle(_labels([query])[0], fontsize=13, parse_math=False)
            grid = panel.subplots(count, columns, squeeze=False).flatten().tolist()
            for axes in grid[len(data) :]:
                axes.axis("off")
            captions = _labels(data.names())
            for axes, image, name, score in zip(grid, data.images, captions, scores.tolist(), strict=False):
                _framed(axes, image, None)
                axes.set_title(f"{score:.3f}", fontsize=8, color="#777777")
                text = textwrap.fill(textwrap.shorten(name, 40, placeholder="…"), 20)
                axes.set_xlabel(text, fontsize=8, parse_math=False)
        figure.savefig(path, dpi=110)


def scores_over_steps(runs: Mapping[str, Sequence[Mapping[str, float]]], label: str, path: Path) -> None:
    """The validation score of some runs against the step, a line each; the rows hold ``step`` and ``score``."""
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.5, 4), layout="constrained")
        axes: Axes = figure.subplots()
        for name, rows in runs.items():
            axes.plot([row["step"] for row in rows], [row["score"] for row in rows], marker="o", ms=3, label=name)
        axes.set(xlabel="step", ylabel=label)
        axes.set_ylim(0, None)
        axes.legend(frameon=False)
        figure.savefig(path, dpi=130)


def confusion(predicted: Tensor, truth: Tensor, classes: Sequence[str], path: Path) -> None:
    """Rows are the true classes, columns what was said; each row's shares, the right ones on the diagonal."""
    n = len(classes)
    counts = torch.zeros(n, n).index_put_((truth, predicted), torch.ones(len(truth)), accumulate=True)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    with matplotlib.rc_context({"font.sans-serif": [*_CJK_FONTS, *matplotlib.rcParams["font.sans-serif"]]}):
        figure = Figure(figsize=(2.4 + 0.22 * n, 2 + 0.22 * n), layout="constrained")
        axes: Axes = figure.subplots()
        shown = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
        labels = _labels(classes)
        axes.set_xticks(range(n), labels, rotation=90, fontsize=8)
        axes.set_yticks(range(n), labels, fontsize=8)
        axes.set(xlabel="predicted", ylabel="true")
        figure.colorbar(shown, ax=axes, shrink=0.6, label="share of the true class")
        figure.savefig(path, dpi=120)


def attention(clip: Tensor, shares: Tensor, title: str, path: Path) -> None:
    """The frames of a clip [T, C, S, S] (uint8), and below each the attention on it, [T, h, w]; one scale for all."""
    frames = clip.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    light = frames.mean(-1) / 255
    side = frames.shape[1]
    heat = torch.nn.functional.interpolate(shares[None].float(), (side, side), mode="bilinear")[0].numpy()
    count = len(frames)
    with matplotlib.rc_context({"font.sans-serif": [*_CJK_FONTS, *matplotlib.rcParams["font.sans-serif"]]}):
        figure = Figure(figsize=(1.5 * count + 0.8, 3.8), layout="constrained")
        figure.suptitle(_labels([title])[0])
        grid = figure.subplots(2, count, squeeze=False)
        for t in range(count):
            grid[0, t].imshow(frames[t])
            grid[0, t].set_title(f"frame {t + 1}: {100 * float(shares[t].sum()):.0f} %", fontsize=8)
            grid[1, t].imshow(light[t], cmap="gray")
            grid[1, t].imshow(heat[t], cmap="inferno", alpha=0.65, vmin=0, vmax=float(heat.max()))
            for axes in grid[:, t]:
                axes.set(xticks=[], yticks=[])
        figure.savefig(path, dpi=110)


def word_attention(rows: Sequence[tuple[Tensor, Sequence[str], Tensor]], path: Path) -> None:
    """Images [4, S, S], a row each, with where a captioner looked at each word: shares [words, h, w], a scale a row."""
    columns = 1 + max(len(words) for _, words, _ in rows)
    figure = Figure(figsize=(1.35 * columns, 1.65 * len(rows)), layout="constrained")
    for axes_row, (image, words, shares) in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        picture = _on_white(image)
        side = picture.shape[0]
        heat = torch.nn.functional.interpolate(shares[None].float(), (side, side), mode="bilinear")[0].numpy()
        axes_row[0].imshow(picture)
        for axes, word, own in zip(axes_row[1:], words, heat, strict=False):
            axes.imshow(picture.mean(-1), cmap="gray", vmin=0, vmax=1)
            axes.imshow(own, cmap="inferno", alpha=0.65, vmin=0, vmax=float(heat.max()))
            axes.set_title(word, fontsize=9)
        for axes in axes_row:
            axes.axis("off")
    figure.savefig(path, dpi=110)


def captions(cells: Mapping[str, Sequence[tuple[Tensor, str, str, float]]], path: Path) -> None:
    """Images with the caption written, the right one and the score, a column for each title."""
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
            _framed(picture, image, None)
            words.axis("off")
            colour = RIGHT if text == right else WRONG
            words.text(0, 0.8, textwrap.fill(text, 50), color=colour, fontsize=10, va="center", parse_math=False)
            shown = textwrap.fill(f"right: {right}", 56)
            words.text(0, 0.35, shown, color=INK, fontsize=9, va="center", parse_math=False)
            words.text(0, 0.02, f"CIDEr {score:.2f}", color="#777777", fontsize=8, va="center")
    figure.savefig(path, dpi=110)


def sweeps(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    levels: Sequence[Sequence[float]],
    path: Path,
    *,
    ylabel: str,
    floor: float | None = None,
) -> None:
    """Numbers against a level of something, a panel for each: lines are means over runs, bands one deviation.

    ``panels`` maps the label of an axis to named series, each with the values of every run at ``levels``; the better
    levels stand on the left. ``floor`` is what guessing reaches.
    """
    with matplotlib.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4.3 * len(panels), 3.9), layout="constrained")
        grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (xlabel, series), at in zip(grid, panels.items(), levels, strict=True):
            for i, (name, runs) in enumerate(series.items()):
                values = np.asarray(runs, dtype=float)
                mean, spread = values.mean(0), values.std(0)
                axes.plot(at, mean, color=f"C{i}", marker="o", markersize=3.5, linewidth=1.6, label=name)
                axes.fill_between(at, mean - spread, mean + spread, color=f"C{i}", alpha=0.18, linewidth=0)
            if floor is not None:
                axes.axhline(floor, color=INK, linewidth=0.8, linestyle="--", label="chance")
            axes.set(xlabel=xlabel, ylim=(0, 1))
            axes.set_xlim(at[0], at[-1])  # the same way round as the levels
        grid[0].set_ylabel(ylabel)
        handles, names = grid[0].get_legend_handles_labels()
        figure.legend(handles, names, frameon=False, loc="outside upper center", ncols=len(names))
        figure.savefig(path, dpi=130)


def fused(
    rows: Sequence[tuple[Tensor, Tensor, str, str, Sequence[float] | None]], parts: Sequence[str], path: Path
) -> None:
    """Pairs of an image [C, S, S] (-1..1) and a spectrogram [F, T], a column each, with what was said of them.

    Where there are shares of attention, one for each of ``parts``, they stand below as bars.
    """
    bars = any(shares is not None for *_, shares in rows)
    figure = Figure(figsize=(1.5 * len(rows) + 0.4, 5.0 if bars else 3.6), layout="constrained")
    heights = [1.2, 1.2, 0.9] if bars else [1, 1]
    grid = figure.subplots(len(heights), len(rows), squeeze=False, height_ratios=heights)
    for i, (image, spectrogram, said, right, shares) in enumerate(rows):
        picture = ((image + 1) / 2).clamp(0, 1).permute(1, 2, 0).numpy()
        grid[0, i].imshow(picture if picture.shape[2] == 3 else picture[..., 0], cmap="gray", vmin=0, vmax=1)
        mark, colour = ("✓", RIGHT) if said == right else ("✗", WRONG)
        title = f"{mark} {said}" if said == right else f"{mark} {said}\n({right})"
        grid[0, i].set_title(title, color=colour, fontsize=10, parse_math=False)
        grid[1, i].imshow(spectrogram.numpy(), origin="lower", aspect="auto", cmap="magma")
        for axes in grid[:2, i]:
            axes.set(xticks=[], yticks=[])
        if shares is not None:
            grid[2, i].bar(range(len(parts)), shares, color=[f"C{k}" for k in range(len(parts))])
            grid[2, i].set(ylim=(0, 1), yticks=[0, 1] if i == 0 else [])
            grid[2, i].set_xticks(range(len(parts)), parts, rotation=45, ha="right", fontsize=8)
    grid[0, 0].set_ylabel("image")
    grid[1, 0].set_ylabel("sound, log-mel")
    if bars:
        grid[2, 0].set_ylabel("attention")
    figure.savefig(path, dpi=120)


def _framed(axes: Axes, image: Tensor, right: bool | None) -> None:
    """An image in a frame: green if right, red if wrong, grey if it is the query."""
    axes.imshow(_on_white(image))
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_color("#999999" if right is None else RIGHT if right else WRONG)
        spine.set_linewidth(1 if right is None else 2.6)
