"""The report of beam_search: one step against eager PyTorch, a captioner's loop and GPT-2's against their peers."""

import functools
import importlib.util
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

import torch

from benchmarks.beam_search.peers import Step, beam_steps, captioner_loops, gpt2_loops
from benchmarks.harness import figures
from benchmarks.harness.bench_cases import DTYPES, BenchCase
from benchmarks.harness.cpu_runs import timed
from benchmarks.harness.tables import Comparison, Headline, Table, duration, multiple, name_of
from benchmarks.harness.timing import bandwidth, median
from mmkernels.testing import peak_allocated

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
COMPARISON = Comparison(("what", "dtype", "B", "K", "V", "T"), "name")
HEADLINES = [
    Headline(
        "beam_search_step",
        "16 x 5 beams x 50257 tokens",
        {"what": "step"},
        {"what": "step", "dtype": "float32", "B": 16, "V": 50257},
        "eager",
        "beam_search.md",
    ),
    Headline(
        "beam_search",
        "8 x 5 beams of a small GPT-2",
        {"what": "GPT-2, 64 wide"},
        {"what": "GPT-2, 64 wide", "B": 8},
        "Hugging Face",
        "beam_search.md",
    ),
]
QUICK = [("step", torch.float32, 16, 5, 9488, 1), ("captioner", torch.float32, 8, 5, 9488, 16)]


def inputs(dtype: torch.dtype, B: int, K: int, V: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a step and the scores of its beams."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(B * K, V, generator=generator) * 3).to(dtype)
    return logits, -torch.rand(B, K, generator=generator)


def measure(
    what: str, dtype: torch.dtype, B: int, K: int, V: int, T: int, *, seconds: float, skip: Container[str] = ()
) -> list[dict[str, Any]]:
    """Every candidate at one size: median seconds; for the step also its memory, and one read at the bandwidth."""
    cell: dict[str, Any] = {"what": what, "dtype": name_of(dtype), "B": B, "K": K, "V": V, "T": T}
    if what == "step":
        logits, scores = inputs(dtype, B, K, V)
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
    rows = [cell | row for row in timed(calls, "name", seconds=seconds, skip=skip, least=5, most=200)]
    if what == "step":
        for row in rows:
            row["bytes"] = peak_allocated(calls[row["name"]])
    return rows


def finish(results: list[dict[str, Any]]) -> None:
    """How much longer than its model alone a loop takes."""
    for cell in COMPARISON.cells(results):
        if (alone := cell.get("the model alone")) is not None:
            for row in cell.values():
                row["over_model"] = row["seconds"] / alone["seconds"] - 1


def bench_cases() -> list[BenchCase]:
    """Steps of two vocabularies, and the loops; a model is made when its case runs."""

    def make_step(step: Step, *size: Any) -> Callable[[], Any]:
        return functools.partial(step, *inputs(*size))

    found = [
        BenchCase(f"step 16 x 5 x {v} {name_of(dtype)}", who, functools.partial(make_step, step, dtype, 16, 5, v), 20)
        for v in (9488, 50257)
        for dtype in DTYPES
        for who, step in beam_steps(dtype).items()
    ]
    found += [
        BenchCase("captioner 32 x 5 x 9488", who, lambda who=who: captioner_loops(32, 5, 9488, 16)[who])  # type: ignore[misc]
        for who in ("mmkernels", "the model alone", "eager")
    ]
    packages = {"mmkernels": "transformers", "Hugging Face": "transformers", "CTranslate2": "ctranslate2"}
    found += [
        BenchCase("GPT-2 8 x 5 x 50257", who, lambda who=who: gpt2_loops(8, 5, 20, 64)[who])  # type: ignore[misc]
        for who, package in packages.items()
        if importlib.util.find_spec(package) is not None
    ]
    return found


def size_of(row: dict[str, Any]) -> str:
    return f"{row['B']} x {row['K']} x {row['V']}"


def tables(results: list[dict[str, Any]]) -> dict[str, Table]:
    steps = [row for row in results if row["what"] == "step"]
    peers = {"eager": "eager", "torch.compile": "`torch.compile` of it", "eager in float32": "eager in float32"}
    of_steps = COMPARISON.table(steps, ("B x K x V, dtype", lambda row: f"{size_of(row)} {row['dtype']}"), peers, peers)
    heads = list(of_steps.columns)
    heads.insert(2, "one read of the logits")
    reads = [duration(cell["mmkernels"]["read"]) for cell in COMPARISON.cells(steps)]
    rows = [[*row[:2], read, *row[2:]] for row, read in zip(of_steps.rows, reads, strict=True)]
    loops = [row for row in results if row["what"] != "step"]
    return {"beam_search_step": Table(heads, rows), "beam_search": _table_of_loops(loops)}


def _table_of_loops(results: list[dict[str, Any]]) -> Table:
    heads = ("loop", "mmkernels", "the model alone", "eager loop", "Hugging Face", "CTranslate2")
    rows = []
    for cell in COMPARISON.cells(results):
        ours = cell["mmkernels"]

        def against(who: str, cell: dict[str, dict[str, Any]] = cell) -> str:
            if who not in cell:
                return "-"
            row = cell[who]
            in_model = f"; {row['forward'] / row['seconds']:.0%} in the model" if who == "Hugging Face" else ""
            return f"{duration(row['seconds'])} ({multiple(COMPARISON.ratio(cell, who))}){in_model}"

        added = f" (+{ours['over_model']:.0%})" if "over_model" in ours else ""
        alone = cell.get("the model alone")
        rows.append(
            (
                f"{ours['what']}, {size_of(ours)}, {ours['T']} steps",
                f"**{duration(ours['seconds'])}**{added}",
                "-" if alone is None else duration(alone["seconds"]),
                *map(against, ("eager", "Hugging Face", "CTranslate2")),
            )
        )
    return Table(heads, rows)


def draw(results: list[dict[str, Any]], machine: dict[str, Any], path: Path) -> None:
    """How many times ours every peer takes in float32: a step, and whole loops; the tables have bfloat16 too."""
    title = "Beam search in float32 (items x beams x tokens), time as a multiple of mmkernels'"
    with figures.drawing(path, title, figures.on(machine), rows=2, height=4.6) as panels:
        for axes, is_step in zip(panels, (True, False), strict=True):
            chosen = [row for row in results if (row["what"] == "step") == is_step and row["dtype"] == "float32"]
            cells = COMPARISON.cells(chosen)
            labels = []
            for cell in cells:
                row = cell["mmkernels"]
                labels.append(size_of(row) if is_step else f"{row['what']}, {row['B']} x {row['K']}")
            axes.set(title="one step; dark: the fastest peer" if is_step else "the whole loop; dark: the fastest peer")
            figures.spread(axes, COMPARISON, list(zip(labels, cells, strict=True)), named=2)
