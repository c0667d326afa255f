"""The report of beam_search: one step against eager PyTorch, a captioner's loop and GPT-2's against their peers."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from rich.table import Table

from benchmarks.beam_search.peers import beam_steps, captioner_loops, gpt2_loops
from benchmarks.harness.timing import bandwidth, interleaved, median

# GPT-2 of two layers by its width: at 64 its forward is about two thirds of Hugging Face's time.
GPT2 = {"GPT-2, 64 wide": 64, "GPT-2, 256 wide": 256}
# (what, dtype, B, K, V, T): the vocabularies of COCO captions, GPT-2 and larger ones; whole loops of T steps.
CELLS = [
    *(
        ("step", dtype, *size)
        for dtype in (torch.float32, torch.bfloat16)
        for size in ((16, 5, 9488, 1), (16, 5, 50257, 1), (4, 5, 128256, 1), (1, 5, 50257, 1))
    ),
    *(("captioner", torch.float32, B, 5, 9488, 16) for B in (1, 8, 32)),
    *((what, torch.float32, B, 5, 50257, 20) for what in GPT2 for B in (1, 8)),
]
QUICK = [("step", torch.float32, 16, 5, 9488, 1), ("captioner", torch.float32, 8, 5, 9488, 16)]


def measure(what: str, dtype: torch.dtype, B: int, K: int, V: int, T: int, *, seconds: float) -> list[dict[str, Any]]:
    """Every candidate at one size: median seconds; for the step also one read of the logits at the bandwidth."""
    cell = {"what": what, "dtype": str(dtype).removeprefix("torch."), "B": B, "K": K, "V": V, "T": T}
    if what == "step":
        generator = torch.Generator().manual_seed(0)
        logits = (torch.randn(B * K, V, generator=generator) * 3).to(dtype)
        scores = -torch.rand(B, K, generator=generator)
        cell["read"] = logits.nbytes / bandwidth()
        calls: dict[str, Any] = {
            name: lambda step=step: step(logits, scores) for name, step in beam_steps(dtype, "cpu").items()
        }
    elif what == "captioner":
        calls = captioner_loops(B, K, V, T, "cpu")
    else:
        calls = gpt2_loops(B, K, T, GPT2[what])
    if "the model, in Hugging Face's" in calls:
        forward = calls.pop("the model, in Hugging Face's")
        cell["forward"] = median([forward() for _ in range(9)])
    times = interleaved(calls, seconds=seconds, least=5, most=200)
    return [
        {**cell, "name": name, "seconds": median(times[name]), "best": min(times[name]), "calls": len(times[name])}
        for name in calls
    ]


def finish(results: list[dict[str, Any]]) -> None:
    """How much longer than its model alone a loop takes."""
    alone = {cell_of(r): r["seconds"] for r in results if r["name"] == "the model alone"}
    for r in results:
        if cell_of(r) in alone:
            r["over_model"] = r["seconds"] / alone[cell_of(r)] - 1


def cell_of(r: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(r[name] for name in ("what", "dtype", "B", "K", "V", "T"))


def table_of(results: list[dict[str, Any]]) -> Table:
    table = Table(title=f"Beam search, CPU, {torch.get_num_threads()} threads")
    for column in ("what", "dtype", "B x K, V, T", "search", "median ms", "x mmkernels", "note"):
        table.add_column(column, justify="right" if column in ("median ms", "x mmkernels") else "left")
    own = {cell_of(r): r["seconds"] for r in results if r["name"] == "mmkernels"}
    previous = None
    for r in results:
        cell = cell_of(r)
        if previous not in (None, cell):
            table.add_section()
        previous = cell
        note = ""
        if r["what"] == "step" and r["name"] == "mmkernels":
            note = f"one read of the logits: {r['read'] * 1e3:.2f} ms"
        elif "over_model" in r and r["name"] != "the model alone":
            note = f"the model + {r['over_model']:.0%}"
        elif "forward" in r and r["name"] == "Hugging Face":
            note = f"{r['forward'] / r['seconds']:.0%} of it in the model"
        table.add_row(
            r["what"],
            r["dtype"],
            f"{r['B']} x {r['K']}, {r['V']}, {r['T']}",
            r["name"],
            f"{r['seconds'] * 1e3:.2f}",
            f"{r['seconds'] / own[cell]:.2f}",
            note,
        )
    return table


def draw(results: list[dict[str, Any]], path: Path) -> None:
    """Bars: times of the steps and of the loops as multiples of mmkernels'."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for axes, of_kind in ((left, {"step"}), (right, {"captioner", *GPT2})):
        chosen = [r for r in results if r["what"] in of_kind]
        cells = list(dict.fromkeys(cell_of(r) for r in chosen))
        names = list(dict.fromkeys(r["name"] for r in chosen))
        own = {cell_of(r): r["seconds"] for r in chosen if r["name"] == "mmkernels"}
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            points = [(cells.index(cell_of(r)), r["seconds"] / own[cell_of(r)]) for r in chosen if r["name"] == name]
            where, heights = zip(*points, strict=True)
            bars = axes.bar([x + (i - (len(names) - 1) / 2) * width for x in where], heights, width, label=name)
            axes.bar_label(bars, fmt="%.1f", fontsize=6)
        labels = [
            f"{'bf16' if c[1] == 'bfloat16' else 'fp32'}\n{c[2]} x {c[3]}\nV={c[4]}"
            if c[0] == "step"
            else f"{c[0]}\nB={c[2]}".replace(", ", "\n")
            for c in cells
        ]
        axes.set_xticks(range(len(cells)), labels, fontsize=7)
        axes.set(ylabel="time, multiples of mmkernels'", title="one step" if of_kind == {"step"} else "the whole loop")
        axes.margins(y=0.2)
        axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper center")
        axes.grid(axis="y", alpha=0.3)
    left.set_yscale("log")
    figure.suptitle(f"Beam search, CPU with {torch.get_num_threads()} threads")
    figure.savefig(path, dpi=130)
    plt.close(figure)
