"""The tables and the figure of the cost over ranks: what was measured stands apart from what a model says."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from benchmarks.harness.figures import INK, OURS, PEERS, drawing
from benchmarks.harness.tables import Row, Table, provenance
from benchmarks.over_ranks.cost import H100, Time, hiding_rows, matrices_of, memory_of, time_of
from benchmarks.over_ranks.measure import TERMS, fit, fitted

# GPUs and pairs in all.
SHAPES = ((8, 2**16), (64, 2**18), (512, 2**20), (4096, 2**22))
WIDTHS = (512, 1024)
# Inf-CL (Cheng et al. 2024, arXiv:2410.17243), table 1: GB of the loss with ViT-L/14, 768 features, by pairs; the
# loss of CLIP, open_clip's local loss, and theirs.
PUBLISHED = {
    8: {
        "CLIP": {2**15: 16.67, 2**16: 66.11},
        "open_clip": {2**15: 2.27, 2**16: 8.63, 2**17: 33.64},
        "Inf-CL": {2**15: 0.18, 2**16: 0.36, 2**17: 0.72, 2**18: 1.45, 2**20: 6.53},
    },
    32: {
        "CLIP": {2**15: 16.66, 2**16: 66.11},
        "open_clip": {2**15: 0.71, 2**16: 2.45, 2**17: 8.98, 2**18: 34.35},
        "Inf-CL": {2**15: 0.05, 2**16: 0.09, 2**17: 0.18, 2**18: 0.35, 2**20: 1.44},
    },
}
PUBLISHED_WIDTH = 768


def schedules(world: int, total: int, d: int) -> dict[str, Time]:
    """Forward and backward of each schedule on H100s."""
    n = total // world
    return {
        "flat ring": time_of(n, d, world, 1),
        "nodes gathered, ring over nodes": time_of(n, d, max(1, world // 8), 8),
        "all gathered": time_of(n, d, 1, world),
    }


def tables(results: Sequence[Row]) -> dict[str, Table]:
    return {
        "over ranks measured": _measured(results),
        "over ranks predicted": _predicted(),
        "over ranks memory": _memory(),
    }


def blocks(results: Sequence[Row], machine: Mapping[str, Any]) -> dict[str, str]:
    """What stands between the marks of docs/distributed_cost.md."""
    found = {name: table.markdown() for name, table in tables(results).items()}
    return found | {"over ranks machine": provenance(machine) + "\n", "over ranks fit": said(fit(results)) + ".\n"}


def _measured(results: Sequence[Row]) -> Table:
    terms = fit(results)
    rows = []
    for row in results:
        size = row["n"], row["d"], row["outer"], row["inner"]
        model = fitted(terms, *size)
        rows.append(
            (
                f"{row['outer']} x {row['inner']}",
                f"{row['n']:,} x {row['d']}",
                f"{1e3 * row['seconds']:.1f} ms",
                f"{1e3 * model:.1f} ms ({100 * (model / row['seconds'] - 1):+.0f} %)",
                f"{row['bytes'] / 2**20:.1f} MiB",
                f"{memory_of(*size, e=4) / 2**20:.1f} MiB",
            )
        )
    return Table(("ring x circle", "rows x features", "CPU time, measured", "fit", "memory, measured", "model"), rows)


def said(terms: Mapping[str, float]) -> str:
    """The terms of a fit in words."""
    flop, step, exchange, byte, call = (terms[term] for term in TERMS)
    rate = f"{1e-9 / flop:.0f} GFLOP/s" if flop else "no time for products"
    return (
        f"{rate}, {1e3 * step:.1f} ms for a step of the ring, {1e3 * exchange:.1f} ms to join blocks and bring their "
        f"parts home, {1e9 * byte:.1f} ns for a byte that a rank sends and {1e3 * call:.1f} ms for a call"
    )


def _predicted() -> Table:
    rows = []
    for d in WIDTHS:
        for world, total in SHAPES:
            of = schedules(world, total, d)
            times = [f"{1e3 * time.total:.1f}" for time in of.values()]
            n = total // world
            held = [memory_of(n, d, world, 1), memory_of(n, d, max(1, world // 8), 8), memory_of(n, d, 1, world)]
            rows.append(
                (
                    f"{world:,}",
                    f"{total:,}",
                    f"{n:,} x {d}",
                    f"{1e3 * of['flat ring'].products:.1f}",
                    *times,
                    " / ".join(f"{size / 1e9:.2f}" for size in held),
                    f"{matrices_of('open_clip', n, world) / 1e9:.0f}",
                )
            )
    columns = ("GPUs", "pairs", "rows x features", "products", "flat ring", "ring over nodes", "all gathered")
    return Table((*columns, "GB: the three", "GB: open_clip"), rows)


def _memory() -> Table:
    rows = []
    for world, published in PUBLISHED.items():
        for total in sorted(published["Inf-CL"]):
            n = total // world
            ours = memory_of(n, PUBLISHED_WIDTH, world, 1) / 1e9
            cells = []
            for who in ("CLIP", "open_clip"):
                stated = f"{published[who][total]:.2f}" if total in published[who] else "does not fit"
                cells.append(f"{stated} ({matrices_of(who, n, world) / 1e9:.2f})")
            rows.append((f"{world}", f"{total:,}", *cells, f"{published['Inf-CL'][total]:.2f}", f"({ours:.3f})"))
    return Table(("GPUs", "pairs", "CLIP", "open_clip", "Inf-CL", "flat ring here"), rows)


def draw(results: Sequence[Row], machine: Mapping[str, Any], path: Path) -> None:
    """Dots are measured here, rings are published by others, dashes are the model."""
    note = (
        f"Dots: measured, CPU seconds on {machine['processor']}. Rings: published for 8 A800 (arXiv:2410.17243).\n"
        "Dashes: the model; no GPU was measured here."
    )
    with drawing(path, "A loss over ranks: what it costs", note, rows=2, columns=2, height=7.2) as axes:
        _draw_fit(axes[0], results)
        _draw_times(axes[1])
        _draw_hidden(axes[2])
        _draw_memory(axes[3])


def _logs(axes: Axes, ticks: Sequence[float], labels: Sequence[str]) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(ticks, labels)


def _name(axes: Axes, x: float, y: float, text: str, color: str, up: float = 0) -> None:
    """A label to the right of a point, so many points higher where it would touch another."""
    axes.annotate(text, (x, y), xytext=(7, up), textcoords="offset points", va="center", color=color, fontsize=9)


def _draw_fit(axes: Axes, results: Sequence[Row]) -> None:
    terms = fit(results)
    worlds = (1, 2, 4)
    _logs(axes, worlds, [str(world) for world in worlds])
    rings = [row for row in results if row["inner"] == 1]
    for n, d in dict.fromkeys((row["n"], row["d"]) for row in rings):
        own = [row for row in rings if (row["n"], row["d"]) == (n, d)]
        model = [1e3 * fitted(terms, n, d, world, 1) for world in worlds]
        axes.plot(worlds, model, "--", color=OURS, linewidth=1.2)
        axes.plot([row["outer"] for row in own], [1e3 * row["seconds"] for row in own], "o", color=INK, markersize=4.5)
        _name(axes, worlds[-1], model[-1], f"{n} x {d}", INK, up=5 if d > n else -5)
    axes.set(title="On this machine: ms of a rank, rows x features", xlabel="ranks of a flat ring (gloo)")
    axes.set_xlim(worlds[0] * 0.8, worlds[-1] * 2.2)


def _draw_times(axes: Axes) -> None:
    worlds = [world for world, _ in SHAPES]
    _logs(axes, worlds, [f"{world:,}\n{total // 2**10:,} k" for world, total in SHAPES])
    found = [schedules(world, total, 512) for world, total in SHAPES]
    axes.plot(worlds, [1e3 * of["flat ring"].products for of in found], "--", color=PEERS, linewidth=1.4)
    _name(axes, worlds[-1], 1e3 * found[-1]["flat ring"].products, "products alone", PEERS)
    for name in found[0]:
        times = [1e3 * of[name].total for of in found]
        axes.plot(worlds, times, "--", color=OURS, linewidth=1.8)
        _name(axes, worlds[-1], times[-1], name.replace(", ", ",\n"), OURS, up={"all gathered": 6}.get(name, -4))
    axes.set(title="H100s by the model: ms, 512 features", xlabel="GPUs, pairs in all")
    axes.set_xlim(worlds[0] * 0.7, worlds[-1] * 40)


def _draw_hidden(axes: Axes) -> None:
    rows = [2**k for k in range(8, 16)]
    _logs(axes, rows[::2], [f"{n:,}" for n in rows[::2]])
    for name, world, color, at in (("8 GPUs,\nNVLink", 8, PEERS, 0), ("64 GPUs, a card each", 64, OURS, 2)):
        times = [time_of(n, 512, world, 1) for n in rows]
        shares = [time.total / time.products for time in times]
        axes.plot(rows, shares, "--", color=color, linewidth=1.8)
        _name(axes, rows[at], shares[at], name, color, up=6 if at else -75)
        axes.axvline(hiding_rows(H100.nvlink if world == 8 else H100.nic), color=color, linewidth=0.8)
    axes.set_yticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set(title="A flat ring by the model: times its products\n(line: transfers are hidden from here on)")
    axes.set_xlabel("rows of a rank")


def _draw_memory(axes: Axes) -> None:
    world, published = 8, PUBLISHED[8]
    totals = sorted(published["Inf-CL"])
    _logs(axes, totals, [f"{total // 2**10:,} k" for total in totals])
    for who in ("CLIP", "open_clip"):
        model = [matrices_of(who, total // world, world) / 1e9 for total in totals]
        axes.plot(totals, model, "--", color=PEERS, linewidth=1.4)
        _name(axes, totals[-1], model[-1], who, PEERS)
    ours = [memory_of(total // world, PUBLISHED_WIDTH, world, 1) / 1e9 for total in totals]
    axes.plot(totals, ours, "--", color=OURS, linewidth=1.8)
    _name(axes, totals[-1], ours[-1], "flat ring here", OURS, up=-4)
    for points in published.values():
        axes.plot(list(points), list(points.values()), "o", color=INK, markerfacecolor="none", markersize=6)
    _name(axes, totals[-1], published["Inf-CL"][totals[-1]], "Inf-CL", INK, up=4)
    axes.set(title="Memory of the loss on 8 GPUs, GB, 768 features", xlabel="pairs in all")
    axes.set_xlim(totals[0] * 0.7, totals[-1] * 6)
