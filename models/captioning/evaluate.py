"""Evaluation of captions: greedy against beams on every test set, beside the nearest training image's captions."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from models.captioning import plots
from models.captioning.model import Captioner
from models.captioning.scores import caption_scores, cider_of_each
from models.captioning.write import Written, draw_looks, references, write_captions
from models.common.console import console, say
from models.common.metrics import PixelBaseline
from models.common.plots import curves
from models.common.runs import announce_files, read_history
from models.data import ImageTextSet, Splits, Vocabulary

BEAMS = (1, 2, 3, 5, 10)  # tried on the first test set; the others try greedy and `SHOWN`
SHOWN = 5  # the beams whose captions the pictures show


def nearest_captions(splits: Splits, data: ImageTextSet) -> dict[str, list[str]]:
    """The caption of the training image whose pixels are most alike, for every image; framed, and as drawn."""
    train, names = splits.train, [c.name for c in splits.train.concepts]
    found = {"nearest image": (train.images, data.images)}
    if train.plain is not None and data.plain is not None:
        found["nearest image, unframed"] = (train.plain, data.plain)
    return {
        who: [names[c] for c in PixelBaseline(known, train.concept_ids, names).nearest_concepts(asked)]
        for who, (known, asked) in found.items()
    }


def evaluate_set(
    model: Captioner,
    vocabulary: Vocabulary,
    data: ImageTextSet,
    baselines: Mapping[str, list[str]],
    *,
    beams_tried: Sequence[int] = BEAMS,
    length_penalty: float = 1.0,
) -> tuple[dict[str, Any], list[Written]]:
    """The scores of a set, of all its images and of those without variants, and the captions of `SHOWN` beams."""
    right = references(data)
    plain = [row for row, c in enumerate(data.concept_ids.tolist()) if not data.concepts[c].variant]
    parts = {"all": list(range(len(data)))} | ({"base": plain} if 0 < len(plain) < len(data) else {})
    entry: dict[str, Any] = {kind: {"size": len(rows), "by": {}} for kind, rows in parts.items()}

    def enter(who: str, texts: list[str], more: dict[str, float]) -> None:
        for kind, rows in parts.items():
            scores = caption_scores([texts[row] for row in rows], [right[row] for row in rows])
            entry[kind]["by"][who] = asdict(scores) | more

    shown: list[Written] = []
    for beams in beams_tried:
        began = time.perf_counter()
        written = write_captions(model, vocabulary, data.images, beams=beams, length_penalty=length_penalty)
        more = {"ms_per_image": 1e3 * (time.perf_counter() - began) / len(data)}
        if beams > 1:
            more["certified"] = sum(w.certified for w in written) / len(written)
        who = "greedy" if beams == 1 else f"{beams} beams"
        enter(who, [w.text for w in written], more)
        console.print(f"[dim]{len(data)} images, {who}: CIDEr {entry['all']['by'][who]['cider']:.3f}")
        shown = written if beams == SHOWN else shown
    for who, texts in baselines.items():
        enter(who, texts, {})
    return entry, shown


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the table of a report."""
    table = Table(title="Captions (CIDEr-D from 0 to 10; certified: no better caption was missed by stopping early)")
    for column in ("set", "images", "", "BLEU-1", "BLEU-4", "CIDEr", "exact", "ms per image", "certified"):
        table.add_column(column, justify="left" if column in ("set", "") else "right")
    for name, entry in report["sets"].items():
        for kind, found in entry.items():
            for i, (who, value) in enumerate(found["by"].items()):
                table.add_row(
                    name if i == 0 and kind == "all" else "",
                    f"{found['size']} {kind}" if i == 0 else "",
                    who,
                    *(f"{value[k]:.3f}" if value[k] == value[k] else "-" for k in ("bleu1", "bleu4", "cider", "exact")),
                    f"{value['ms_per_image']:.2f}" if "ms_per_image" in value else "",
                    f"{value['certified']:.3f}" if "certified" in value else "",
                    end_section=i == len(found["by"]) - 1,
                )
    console.print(table)
    for note in report["notes"]:
        say(note, "dim")


def evaluate_run(
    model: Captioner,
    vocabulary: Vocabulary,
    splits: Splits,
    out: Path,
    *,
    validation: bool = False,
    length_penalty: float = 1.0,
) -> dict[str, Any]:
    """Print the table of a model, and write ``report.json`` and the pictures to ``out``."""
    sets = splits.tests
    if validation:
        assert splits.validation is not None
        sets = {"validation": splits.validation}
    if not sets:
        raise ValueError("this data has no test set")
    model.eval()
    report: dict[str, Any] = {"data": splits.name, "notes": list(splits.notes), "length_penalty": length_penalty}
    report["sets"] = {}
    out.mkdir(parents=True, exist_ok=True)
    for name, data in sets.items():
        first = not report["sets"]
        report["sets"][name], written = evaluate_set(
            model,
            vocabulary,
            data,
            nearest_captions(splits, data),
            beams_tried=BEAMS if first else (1, SHOWN),
            length_penalty=length_penalty,
        )
        if first:
            draw(model, vocabulary, data, written, out)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_report(report, console)
    if history := read_history(out):
        curves(
            history,
            out / "curves.png",
            loss="cross-entropy",
            second=("words", "share of words right", "Training words"),
        )
    announce_files(out, "curves.png", "captions.png", "attention.png", "report.json")
    return report


def draw(model: Captioner, vocabulary: Vocabulary, data: ImageTextSet, written: list[Written], out: Path) -> None:
    """The best and the worst captions of a set, and where the model looked for some of them, drawn by chance."""
    right = references(data)
    scores = cider_of_each([w.text for w in written], right)
    order = torch.tensor(scores).argsort(stable=True).tolist()
    # Many captions are exact and many have nothing right: each kind shows a random draw, not the first of the list.
    count = min(8, len(order) // 2)
    generator = torch.Generator().manual_seed(0)

    def draw_of(rows: list[int]) -> list[int]:
        return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:count].tolist()]

    worst = draw_of([row for row in order if scores[row] <= scores[order[count - 1]]])
    best = draw_of([row for row in order if scores[row] >= min(scores[order[-count]], 10 - 1e-6)])
    cells = {
        title: [(data.images[row], written[row].text, right[row][0], scores[row]) for row in rows]
        for title, rows in (("best", best), ("worst", worst))
    }
    plots.captions(cells, out / "captions.png")
    if model.config.attention:
        rows = torch.randperm(len(data), generator=generator)[:5].tolist()
        draw_looks(model, vocabulary, [data.images[r] for r in rows], [written[r] for r in rows], out / "attention.png")
