"""Accuracy under noise, and pairs with what a fusion said of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from models.common.plots import INK, RIGHT, WRONG, save_figure


def sweeps(
    panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]],
    levels: Sequence[Sequence[float]],
    path: Path,
    *,
    ylabel: str,
    floor: float | None = None,
) -> None:
    """Plot numbers against levels of noise, one panel per noise: lines are means over runs, bands one deviation.

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
        save_figure(figure, path, dpi=130)


def fused(
    rows: Sequence[tuple[Tensor, Tensor, str, str, Sequence[float] | None]], parts: Sequence[str], path: Path
) -> None:
    """Draw pairs of an image [C, S, S] (-1..1) and a spectrogram [F, T], one pair per column, with the model's answer.

    Shares of attention, one for each of ``parts``, stand below as bars, if a pair has them.
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
        grid[0, i].set_title(title, color=colour, fontsize=10)
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
    save_figure(figure, path, dpi=120)
