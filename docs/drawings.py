"""The drawn schedules of the pages, and one call from Python to the register.

python -m docs.drawings [FOLDER]     # docs/figures
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from benchmarks.harness.figures import INK, OURS, PEERS, drawing

LIGHT = "#fbe4d8"  # of OURS
PALE = "#eceef1"  # of PEERS
TEXT = 9


def bare(axes: Axes, width: float, height: float, title: str) -> None:
    """A panel to draw on: y grows downwards, as rows of a matrix do."""
    axes.set(xlim=(0, width), ylim=(height, 0), title=title)
    axes.set_axis_off()


def box(axes: Axes, x: float, y: float, width: float, height: float, text: str = "", **options: str | float) -> None:
    style = {"facecolor": "white", "edgecolor": "#9aa0a8", "linewidth": 0.9} | options
    axes.add_patch(Rectangle((x, y), width, height, **style))  # type: ignore[arg-type]
    if text:
        axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=TEXT)


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str = INK, bend: float = 0.0
) -> None:
    shape = FancyArrowPatch(
        start, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=1.3, connectionstyle=f"arc3,rad={bend}"
    )
    axes.add_patch(shape)


def memories(axes: Axes, rows: Sequence[tuple[str, str]], title: str = "What lies where") -> None:
    """The memories from the nearest to the farthest, and what each holds."""
    bare(axes, 10, len(rows), title)
    for y, (name, held) in enumerate(rows):
        nowhere = name == "nowhere"
        box(axes, 0.05, y + 0.08, 9.9, 0.84, facecolor="white" if nowhere else PALE, linestyle="--" if nowhere else "-")
        axes.text(0.3, y + 0.5, name, va="center", fontsize=TEXT, fontweight="bold")
        axes.text(2.7, y + 0.5, held, va="center", fontsize=TEXT)


def wavefront(panels: int, chunks: int, threads: int) -> list[list[tuple[int, int]]]:
    """(thread, step) of every tile: a thread takes the next panel, and enters a chunk after the panel above has."""
    free = [1] * threads
    steps: list[list[tuple[int, int]]] = []
    for panel in range(panels):
        thread = min(range(threads), key=free.__getitem__)
        row: list[tuple[int, int]] = []
        for chunk in range(chunks):
            step = free[thread]
            if panel > 0:
                step = max(step, steps[panel - 1][chunk][1] + 1)
            row.append((thread, step))
            free[thread] = step + 1
        steps.append(row)
    return steps


def info_nce(path: Path) -> None:
    """Which tiles of the logits two threads visit at which step, and what stays in which memory."""
    now = 9
    with drawing(path, "info_nce on two threads: which tile when, and what stays where", columns=2, height=3.7) as (
        left,
        right,
    ):
        bare(left, 7.6, 7.4, f"The logits in tiles, and their steps (now: {now})")
        for panel, row in enumerate(wavefront(6, 6, 2)):
            for chunk, (thread, step) in enumerate(row):
                done = {0: LIGHT, 1: PALE}[thread] if step <= now else "white"
                box(left, 1.2 + chunk, 0.8 + panel, 1, 1, str(step), facecolor=done)
        for panel, row in enumerate(wavefront(6, 6, 2)):
            for chunk, (thread, step) in enumerate(row):
                if step == now:
                    color = (OURS, INK)[thread]
                    box(left, 1.2 + chunk, 0.8 + panel, 1, 1, facecolor="none", edgecolor=color, linewidth=2.4)
        left.text(1.2, 0.45, "keys, in chunks of 256", fontsize=TEXT, va="center")
        arrow(left, (4.8, 0.45), (7.2, 0.45))
        left.text(0.45, 3.8, "queries, in panels of 256", fontsize=TEXT, rotation=90, ha="center", va="center")
        for panel in range(6):
            thread = wavefront(6, 6, 2)[panel][0][0]
            left.text(0.95, 1.3 + panel, "AB"[thread], ha="center", va="center", fontsize=TEXT, fontweight="bold")
        left.text(
            1.2, 7.15, "threads A (orange) and B (grey); B follows one chunk behind A", fontsize=TEXT, va="center"
        )
        memories(
            right,
            [
                ("registers", "8 keys x 32 queries of sums, 1 KiB"),
                ("L1", "32 queries x 256 features, 32 KiB"),
                ("L2", "of each thread: the tile 272 KiB, its panel\n512 KiB; backward dQ of the panel, 512 KiB"),
                ("RAM", "features and gradients 16 MiB each,\nthree floats of each row and column"),
                ("RAM, in turn", "column statistics and dK of a chunk:\npanel 0 first, then panel 1, ..."),
                ("nowhere", "the logits, 256 MiB"),
            ],
            "What lies where, 8192 pairs, D = 512, float32",
        )


def divided_attention(path: Path) -> None:
    """Which tokens a task reads along each axis, and where its scores lie."""
    with drawing(
        path, "divided_attention: which tokens a task reads, and where its scores lie", columns=3, height=4.1
    ) as (grid, short, long):
        bare(grid, 10.4, 11.6, "The tokens as qkv has them")
        box(grid, 1.2, 0.9, 0.9, 0.8, "cls", facecolor=PALE)
        for position in range(8):
            for frame in range(8):
                color = OURS if position == 2 else LIGHT if position == 3 else PEERS if frame == 5 else "white"
                box(grid, 1.2 + 0.9 * frame, 2.1 + 0.8 * position, 0.9, 0.8, facecolor=color)
        grid.text(1.2, 0.45, "frames t = 0 .. 7", fontsize=TEXT, va="center")
        grid.text(0.6, 5.3, "positions n", rotation=90, fontsize=TEXT, ha="center", va="center")
        for y, text in (
            (9.1, "orange: a task along time, one position;\nlight: the next, fetched meanwhile"),
            (10.5, "grey: a task along space, one frame\nand the class token"),
        ):
            grid.text(1.2, y, text, fontsize=TEXT, va="center")

        bare(short, 10.4, 11.6, "Time, T = 8: in registers")
        for key in range(8):
            for lane in range(16):
                color = LIGHT if lane < 8 else PALE
                box(short, 1.3 + 0.55 * lane, 2.1 + 0.8 * key, 0.55, 0.8, facecolor=color, linewidth=0.5)
        box(short, 1.3, 2.1 + 0.8 * 3, 0.55 * 16, 0.8, facecolor="none", edgecolor=OURS, linewidth=2.4)
        short.text(1.3, 1.6, "head 0", fontsize=TEXT, va="center")
        short.text(5.7, 1.6, "head 1", fontsize=TEXT, va="center")
        short.text(0.7, 5.3, "keys", rotation=90, fontsize=TEXT, ha="center", va="center")
        short.text(
            1.3,
            9.8,
            "outlined: one vector, the scores of a key\n"
            "with 8 queries of each head; softmax runs\n"
            "down the keys, and nothing is stored",
            fontsize=TEXT,
            va="center",
        )

        bare(long, 10.4, 11.6, "Space, 197 tokens: in L1 and L2")
        for strip in range(16):
            color = OURS if strip == 5 else LIGHT if strip < 5 else "white"
            box(long, 1.3, 2.1 + 0.4 * strip, 8.4, 0.4, facecolor=color, linewidth=0.5)
        box(long, 1.3, 2.1, 8.4, 3.2, facecolor="none", edgecolor=INK, linewidth=2)
        long.text(1.3, 1.6, "keys of the frame", fontsize=TEXT, va="center")
        long.text(0.7, 5.3, "queries", rotation=90, fontsize=TEXT, ha="center", va="center")
        long.text(
            1.3,
            9.8,
            "orange: 8 rows of scores, which stay in L1\n"
            "through the softmax; outlined: up to 64 rows,\n"
            "then O = P V, dV, dK and dQ from L2",
            fontsize=TEXT,
            va="center",
        )


def beam_search(path: Path) -> None:
    """How a row of logits is read once, and how histories are kept."""
    largest = [0.9, 2.1, 1.4, 0.6, 3.3, 1.1, 1.7, 0.4, 2.6, 1.2, 0.8, 2.9, 1.5, 0.7, 1.9, 1.0]
    bound = sorted(largest)[-4]
    with drawing(
        path, "beam_search: one read of the logits, no copy of a history", columns=2, height=4.0, width_ratios=(1.1, 1)
    ) as (row, trellis):
        bare(row, 17.6, 10.6, "A step: one row of V logits in blocks of 256")
        for i, value in enumerate(largest):
            color = OURS if value >= bound else "#c3c6cb"
            box(row, 0.8 + i, 5.2 - value, 0.8, value, facecolor=color, edgecolor="white")
        row.axhline(5.2 - bound, color=INK, linestyle=":", linewidth=1.2)
        row.text(0.8, 0.9, "largest of each block; dotted: the 4th largest, with C = 4", fontsize=TEXT, va="center")
        for y, text in (
            (6.2, "1  read the row from memory: its largest, the largest of each block"),
            (7.1, "2  read it from the cache: the sum of e^(x - largest), exact, in any order"),
            (8.0, "3  look into the orange blocks alone: no other holds one of the C best"),
            (8.9, "4  the thread that reads an item's last row merges the item's K lists"),
            (9.8, "5  ends become hypotheses, the K best others run on"),
        ):
            row.text(0.8, y, text, fontsize=TEXT, va="center")

        bare(trellis, 10.4, 10.6, "Kept: a token and a parent of each beam and step")
        tokens = ["a c b EOS", "b a a c", "c b d b"]
        # The parent of beam k at step t + 1.
        parents = [(0, 0, 1), (1, 0, 1), (0, 0, 2)]
        walked = {(3, 0), (2, 0), (1, 1), (0, 0)}
        for beam, line in enumerate(tokens):
            trellis.text(0.1, 2.1 + 1.5 * beam, f"beam {beam}", fontsize=TEXT, va="center")
            for step, token in enumerate(line.split()):
                color = LIGHT if (step, beam) in walked else "white"
                box(trellis, 1.8 + 2.3 * step, 1.6 + 1.5 * beam, 1.2, 1.0, token, facecolor=color)
        for step, of_step in enumerate(parents):
            for beam, parent in enumerate(of_step):
                on_path = (step + 1, beam) in walked and (step, parent) in walked
                start = (1.8 + 2.3 * (step + 1), 2.1 + 1.5 * beam)
                arrow(trellis, start, (3.05 + 2.3 * step, 2.1 + 1.5 * parent), OURS if on_path else PEERS)
        for step in range(4):
            trellis.text(2.4 + 2.3 * step, 1.0, f"t = {step}", fontsize=TEXT, ha="center", va="center")
        for y, text in (
            (6.7, "A hypothesis is (score, t, beam, token): where in the trellis it ends."),
            (7.6, "One walk back along the parents at the end spells it: O(T)."),
            (8.5, "The state's rows move by parent; tokens and parents never do."),
        ):
            trellis.text(0.1, y, text, fontsize=TEXT, va="center")


def architecture(path: Path) -> None:
    """One call of info_nce, floor by floor, and the data that each hands down."""
    # Where it runs, the shade, the files with what each does, and what is handed to the next floor.
    floors = [
        (
            "Python",
            "white",
            [
                ("mmkernels/info_nce/api.py", "checks, autocast"),
                ("mmkernels/_backends.py", "chooses the implementation: cpu"),
            ],
            "tensors",
        ),
        ("", "white", [("mmkernels/info_nce/ops.py", "autograd.Function: what backward needs")], "tensors, options"),
        (
            "torch",
            PALE,
            [
                ("torch.ops.mmkernels", "the dispatcher finds the C++ function"),
                ("mmkernels/_library.py", "registered its schema at import"),
            ],
            "tensors",
        ),
        (
            "C++ with torch",
            PALE,
            [("csrc/info_nce/cpu.cpp", "allocates, picks the variant, starts threads")],
            "pointers",
        ),
        (
            "C++ alone,\nonce for each\ninstruction set",
            LIGHT,
            [("csrc/common/engine.cpp", "panels of queries, chunks of keys, tiles")],
            "",
        ),
        (
            "",
            LIGHT,
            [
                ("csrc/common/tiles.h", "multiply: 8 keys x 32 queries of sums"),
                ("csrc/info_nce/cpu_kernels.cpp", "epilogue: statistics, or gradients"),
            ],
            "",
        ),
        ("", LIGHT, [("csrc/common/simd/", "fma, exp, max: one instruction set's own")], ""),
    ]
    # What the engine hands to both of its helpers, and these to the vectors: floor, place, words.
    inner = [
        (4, 3.6, "packed words"),
        (4, 10.6, "a tile, 256 x 256"),
        (5, 3.6, "registers of 16 floats"),
        (5, 10.6, ""),
    ]
    with drawing(path, "One call of info_nce on a CPU, from Python to the vector register", height=5.0) as (axes,):
        bare(axes, 20, 8.35, "")
        tops, y = [], 0.1
        for floor, (where, shade, files, _) in enumerate(floors):
            height = 0.7 if len(files) == 1 else 1.05
            tops.append((y, y + height))
            axes.text(0.1, y + 0.13, where, va="top", fontsize=TEXT, fontweight="bold")
            for x, (file, does) in zip((3.0, 10.0), files, strict=False):
                alone = len(files) == 1
                box(axes, x, y, 13.6 if alone else 6.6, height, facecolor=shade)
                axes.text(x + 0.2, y + (0.35 if alone else 0.3), file, va="center", fontsize=TEXT, family="monospace")
                axes.text(*((9.2, y + 0.35) if alone else (x + 0.2, y + 0.75)), does, va="center", fontsize=TEXT)
            y += height + (0.6 if floor in (4, 5) else 0.25)
        for floor, (_, _, _, handed) in enumerate(floors):
            if handed:
                start, end = (sum(tops[at]) / 2 for at in (floor, floor + 1))
                arrow(axes, (17.1, start + 0.05), (17.1, end - 0.05), OURS)
                axes.text(17.4, (start + end) / 2, handed, va="center", fontsize=TEXT, color=OURS)
        asked, registered = tops[0][0] + 0.52, tops[2][0] + 0.52
        arrow(axes, (9.55, asked), (10.05, asked), OURS)
        arrow(axes, (10.05, registered), (9.55, registered), OURS)
        for floor, x, words in inner:
            start, end = tops[floor][1] + 0.03, tops[floor + 1][0] - 0.03
            arrow(axes, (x, start), (x, end), OURS)
            axes.text(x + 0.3, (start + end) / 2, words, va="center", fontsize=TEXT, color=OURS)


DRAWINGS = {
    "architecture": architecture,
    "info_nce_schedule": info_nce,
    "divided_attention_schedule": divided_attention,
    "beam_search_schedule": beam_search,
}


def main(folder: Path) -> None:
    mpl.use("Agg")
    for name, draw in DRAWINGS.items():
        draw(folder / f"{name}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "figures")
