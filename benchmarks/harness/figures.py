"""What the figures share: their style, lines and bars with labels in place of legends, and the README's picture."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

from benchmarks.harness.tables import Comparison, Row, Standing, memory_text, multiple

STYLE = Path(__file__).with_suffix(".mplstyle")
WIDTH = 9.0  # inches
OURS = "#c2410c"
PALE = "#f0b597"  # of OURS
PEERS = "#8b8f97"
INK = "#222222"
MARKERS = "osD^v"  # of the peers that a figure of dots tells apart
ARCHITECTURES = ("x86_64", "aarch64", "arm64")  # what a file has in place of a CPU's name that was not known


@contextlib.contextmanager
def drawing(
    path: Path, title: str, note: str = "", *, rows: int = 1, columns: int = 1, height: float = 3.8, **options: Any
) -> Iterator[list[Axes]]:
    """Hands out the panels of a figure and writes the figure once they are drawn; the note stands below the panels."""
    with plt.style.context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=(WIDTH, height), squeeze=False, layout="constrained", **options
        )
        figure.suptitle(title, x=0.01, ha="left")
        if note:
            figure.supxlabel(note, x=0.01, ha="left", fontsize=9, color="#666666")
        yield list(axes.flat)
        figure.savefig(path)
        plt.close(figure)


def on(machine: Mapping[str, Any]) -> str:
    """Where the numbers of a figure were measured."""
    name = machine["processor"]
    cpu = f"an {name} CPU" if name in ARCHITECTURES else f"a CPU ({name})"
    return f"Measured on {machine['threads']} threads of {cpu}."


def color(who: str) -> str:
    return OURS if who.startswith("mmkernels") else PEERS


def lines(axes: Axes, series: Mapping[str, Sequence[tuple[float, float]]], ticks: Sequence[float]) -> None:
    """A line for each name, with the name at the line's end; x is logarithmic."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks], rotation=45 if len(ticks) > 5 else 0)
    for who, points in series.items():
        ours = who.startswith("mmkernels")
        x, y = zip(*points, strict=True)
        axes.plot(x, y, marker="o", color=color(who), linewidth=2.4 if ours else 1.6, zorder=4 if ours else 3)
    _label_ends(axes, series)


def _label_ends(axes: Axes, series: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Names at the ends of their lines, moved apart where they would touch."""
    figure = axes.get_figure()
    assert figure is not None
    figure.canvas.draw()
    points_of_pixel = 72 / figure.dpi
    ends = {who: max(points) for who, points in series.items()}
    for x in sorted({end[0] for end in ends.values()}):
        here = sorted((who for who in ends if ends[who][0] == x), key=lambda who: ends[who][1])
        heights = [axes.transData.transform(ends[who])[1] * points_of_pixel for who in here]
        wanted = list(heights)
        for _ in range(50):
            for i in range(len(wanted) - 1):
                overlap = 12 - (wanted[i + 1] - wanted[i])
                if overlap > 0:
                    wanted[i] -= overlap / 2
                    wanted[i + 1] += overlap / 2
        for who, height, want in zip(here, heights, wanted, strict=True):
            axes.annotate(
                who,
                ends[who],
                (7, want - height),
                textcoords="offset points",
                va="center",
                color=OURS if who.startswith("mmkernels") else INK,
                fontweight="bold" if who.startswith("mmkernels") else "normal",
                fontsize=9,
                annotation_clip=False,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                zorder=5,
            )


def multiples(axes: Axes, comparison: Comparison, results: Sequence[Row], x: str, log: bool = False) -> None:
    """Peers' times as multiples of ours against the size: how many times faster we are."""
    cells = [cell for cell in comparison.cells(results) if comparison.peers(cell)]
    names = dict.fromkeys(who for cell in cells for who in cell if not who.startswith("mmkernels"))
    sizes = sorted({cell[comparison.ours][x] for cell in cells})
    series: dict[str, list[tuple[float, float]]] = {comparison.ours: [(size, 1.0) for size in sizes]}
    for who in names:
        series[who] = sorted((cell[who][x], comparison.ratio(cell, who)) for cell in cells if who in cell)
    largest = max(y for points in series.values() for _, y in points)
    if log:  # panels that share the axis show it up to the largest of all
        axes.set_yscale("log")
        highest = max(largest * 1.3, axes.get_ylim()[1])
        axes.set_ylim(0.8, highest)
        ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100) if tick < highest]
        axes.set_yticks(ticks, [f"{tick}" for tick in ticks])
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0, largest * 1.08)
    lines(axes, series, sizes)


def memory(axes: Axes, comparison: Comparison, results: Sequence[Row], x: str) -> None:
    """MiB against the size, both logarithmic."""
    names = dict.fromkeys([comparison.ours, *(row[comparison.who] for row in results)])
    series = {
        who: sorted(
            (row[x], row["bytes"] / 2**20)
            for row in results
            if row[comparison.who] == who and row["bytes"] is not None  # not measured of a call that is made once
        )
        for who in names
    }
    series = {who: points for who, points in series.items() if points}
    sizes = sorted({row[x] for row in results})
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    lines(axes, series, sizes)


def bars(axes: Axes, values: Mapping[str, float], text: Callable[[float], str]) -> None:
    """A bar for each name, ours coloured, the value at its end."""
    names = list(values)
    drawn = axes.barh(names, list(values.values()), color=[color(who) for who in names], height=0.62)
    axes.bar_label(drawn, [text(value) for value in values.values()], padding=4, fontsize=10)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.margins(x=0.18)


def spread(axes: Axes, comparison: Comparison, cells: Sequence[tuple[str, Mapping[str, Row]]], named: int = 1) -> None:
    """A line for each cell: all peers as multiples of ours, the fastest dark; the `named` fastest at the right.

    Where a line has more peers than are named, each peer has a marker of its own, and a legend below tells them apart.
    """
    axes.set_xscale("log")
    axes.axvline(1, color=OURS, linewidth=2.4)
    names = dict.fromkeys(who for _, cell in cells for who in sorted(comparison.peers(cell)))
    unnamed = any(len(comparison.peers(cell)) > named for _, cell in cells)
    markers = dict(zip(names, MARKERS if unnamed else "o" * len(names), strict=False))
    for y, (_, cell) in enumerate(cells):
        peers = comparison.peers(cell)
        ratios = [comparison.ratio(cell, who) for who in peers]
        axes.plot([1, max(ratios)], [y, y], color="#dddddd", linewidth=1.2, zorder=1)
        for who, ratio in zip(peers, ratios, strict=True):
            fastest = who == peers[0]
            color, size, above = ("#4b5563", 6.5, 3) if fastest else ("#a9adb5", 5, 2)
            axes.plot(ratio, y, markers[who], color=color, markersize=size, zorder=above)
        said = ", ".join(f"{multiple(ratio)} {who}" for ratio, who in zip(ratios[:named], peers, strict=False))
        axes.text(1.03, y, said, transform=axes.get_yaxis_transform(), va="center", fontsize=9)
    axes.set_yticks(range(len(cells)), [label for label, _ in cells])
    axes.set_ylim(len(cells) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(axis="y", visible=False)
    lowest, highest = axes.get_xlim()
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20) if lowest <= tick <= highest]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if unnamed:
        keys = [Line2D([], [], color=PEERS, marker=marker, linestyle="", label=who) for who, marker in markers.items()]
        axes.legend(handles=keys, loc="upper left", bbox_to_anchor=(0, -0.09), ncols=2, frameon=False, fontsize=9)


def front(standings: Sequence[Standing], machine: Mapping[str, Any], path: Path) -> None:
    """The README's picture: how many times faster than what users run, and in what share of its memory."""
    shown = sorted(standings, key=lambda s: -s.faster)
    shares = [s.bytes[0] / s.bytes[1] for s in shown if s.bytes is not None]
    title = (
        f"{shown[-1].faster:.2g} to {shown[0].faster:.2g} times faster than what you run now; "
        f"{sum(share <= 0.01 for share in shares)} calls in a hundredth of its memory or less"
    )
    note = f"{on(machine)} All in float32."
    height, widths = 1.1 + 0.42 * len(shown), (1.25, 1)
    with drawing(path, title, note, columns=2, height=height, sharey=True, width_ratios=widths) as (left, right):
        left.set(
            title="Times faster than what it replaces\n(dark part: than the fastest peer)",
            xlim=(0, 1.7 * shown[0].faster),
        )
        right.set(title="Memory beyond inputs and gradients\n(grey: what it replaces)", xscale="log", xlim=(2e-5, 1e5))
        for y, s in enumerate(shown):
            left.barh(y, s.faster, color=PALE, height=0.56)
            left.barh(y, s.faster_than_best, color=OURS, height=0.56)
            said = f"{multiple(s.faster)}  {s.headline.replaced}"
            left.annotate(said, (s.faster, y), (6, 0), textcoords="offset points", va="center", fontsize=9)
            if s.bytes is not None:
                _memory_of(right, y, *s.bytes)
        left.axvline(1, color=PEERS, linewidth=1.4, zorder=0)
        left.set_yticks(range(len(shown)), [f"{s.headline.call}\n{s.headline.size}" for s in shown], fontsize=9)
        left.set_xticks([1, 5, 10, 20], ["1", "5", "10", "20"])
        left.invert_yaxis()
        right.set_xticks([0.1, 10, 1000], ["0.1", "10", "1000 MiB"])
        right.xaxis.set_minor_locator(NullLocator())
        for axes in (left, right):
            axes.grid(axis="y", visible=False)
            axes.tick_params(axis="y", length=0, labelcolor=INK)


def _memory_of(axes: Axes, y: float, ours: int, theirs: int) -> None:
    """Ours and theirs as two dots, and the share between them."""
    left, right = ours / 2**20, theirs / 2**20
    axes.plot([left, right], [y, y], color="#dddddd", linewidth=3, zorder=1)
    axes.plot(right, y, "o", color=PEERS, markersize=8)
    axes.plot(left, y, "o", color=OURS, markersize=8)
    texts = (
        (memory_text(theirs), right, (8, 0), "left"),
        (memory_text(ours), left, (-8, 0), "right"),
        (f"1/{float(f'{theirs / ours:.3g}'):.0f}", (left * right) ** 0.5, (0, 7), "center"),
    )
    for text, x, offset, side in texts:
        weight = "bold" if side == "center" else "normal"
        axes.annotate(
            text, (x, y), offset, textcoords="offset points", ha=side, va="center", fontsize=9, fontweight=weight
        )
