"""Evaluation of retrieval: both directions on every test set, in each language; searches by keywords."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import mmkernels
from models.common.console import console, say
from models.common.gallery import (
    WAYS,
    Baselines,
    Encoder,
    draw_gallery,
    evaluate_galleries,
    pick_sets,
    print_retrieval,
    recalls,
    retrieval,
    save_report,
)
from models.common.plots import curves
from models.common.runs import announce_files, read_history
from models.data import ImageTextSet, Splits, Subwords
from models.retrieval.model import Retriever

TOP = 5  # images of a search by keywords that are looked at


def retriever_encoder(model: Retriever, tokens: Subwords) -> Encoder:
    """The encoder of a trained model."""
    return Encoder(model, tokens, model.config.image_size)


def spoken_retrieval(encoder: Encoder, gallery: ImageTextSet) -> dict[str, Any]:
    """Both directions of a gallery in each language, over the images whose name is known in it.

    A gallery without languages gives one entry, "".
    """
    images, found = encoder.images(gallery.images), {}
    for language in gallery.languages() or [""]:
        known = [
            row
            for row, c in enumerate(gallery.concept_ids.tolist())
            if not language or language in gallery.concepts[c].names
        ]
        names = gallery.select(torch.tensor(known)).names(language or None)
        found[language] = {"size": len(known), "ways": retrieval(images[known], encoder.texts(names), {})}
    return found


def best_images(encoder: Encoder, gallery: ImageTextSet, queries: Sequence[str], top: int) -> tuple[Tensor, Tensor]:
    """Scores and rows [queries, top] of the images that match each text best, the best first."""
    return mmkernels.retrieval_topk(encoder.texts(queries), encoder.images(gallery.images), min(top, len(gallery)))


def keyword_queries(gallery: ImageTextSet) -> dict[str, dict[str, list[int]]]:
    """Searches by one keyword and by two, and the rows that have them all: at least TOP, at most a tenth of the rows.

    A thousand queries of each kind at most are taken, evenly from all in alphabetical order.
    """
    having: dict[str, set[int]] = defaultdict(set)
    for row, c in enumerate(gallery.concept_ids.tolist()):
        for keyword in gallery.concepts[c].keywords:
            having[keyword].add(row)
    pairs = {
        f"{one} {other}": having[one] & having[other]
        for c in gallery.concept_ids.tolist()
        for one, other in itertools.combinations(sorted(gallery.concepts[c].keywords), 2)
    }
    found = {}
    for name, queries in (("one keyword", having), ("two keywords", pairs)):
        asked = [query for query, rows in sorted(queries.items()) if TOP <= len(rows) <= len(gallery) // 10]
        found[name] = {query: sorted(queries[query]) for query in asked[:: max(1, len(asked) // 1000)]}
    return found


def search_precision(encoder: Encoder, gallery: ImageTextSet) -> dict[str, Any]:
    """Shares of the images found that have all keywords of a search: of the first image, and of the first TOP."""
    report = {}
    for name, queries in keyword_queries(gallery).items():
        if not queries:
            continue
        _, rows = best_images(encoder, gallery, list(queries), TOP)
        hits = torch.tensor(
            [[row in own for row in best] for best, own in zip(rows.tolist(), queries.values(), strict=True)]
        )
        report[name] = {
            "queries": len(queries),
            "first": float(hits[:, 0].double().mean()),
            "top": float(hits.double().mean()),
            "chance": sum(map(len, queries.values())) / len(queries) / len(gallery),
        }
    return report


def evaluate(encoder: Encoder, splits: Splits, sets: Mapping[str, ImageTextSet]) -> dict[str, Any]:
    """The report: for every set its galleries, and its base gallery in each language, as plain numbers."""
    baselines = Baselines(splits.train)
    report: dict[str, Any] = {"data": splits.name, "notes": list(splits.notes), "sets": {}}
    for name, data in sets.items():
        full = data.gallery()
        images, texts = encoder.images(full.images), encoder.texts(full.names())
        report["sets"][name] = {
            "retrieval": evaluate_galleries(data, splits.gallery_limit, images, texts, baselines),
            "languages": spoken_retrieval(encoder, data.gallery(limit=splits.gallery_limit, variants=False)),
            "search": search_precision(encoder, data.gallery(variants=False)),
        }
    return report


def print_languages(report: Mapping[str, Any], console: Console) -> None:
    """Print the table of the languages, if a name is known in more than one."""
    if all(len(entry["languages"]) < 2 for entry in report["sets"].values()):
        return
    table = Table(title="Base gallery in each language")
    columns = ("set", "language", "gallery", *(f"{way} {k}" for way in ("I→T", "T→I") for k in ("R@1", "R@5", "R@10")))
    for column in columns:
        table.add_column(column, justify="left" if column in ("set", "language") else "right")
    for name, entry in report["sets"].items():
        last = list(entry["languages"])[-1]
        for i, (language, found) in enumerate(entry["languages"].items()):
            both = [text for way in WAYS for text in recalls(found["ways"][way]["model"])]
            row = (name if i == 0 else "", language or "all", str(found["size"]), *both)
            table.add_row(*row, end_section=language == last)
    console.print(table)


def print_search(report: Mapping[str, Any], console: Console) -> None:
    """Print how searches by keywords do, if there are any."""
    table = Table(title="Search by English keywords in all base images")
    for column in ("set", "query", "queries", "the first has them", f"of the first {TOP}", "chance"):
        table.add_column(column, justify="left" if column in ("set", "query") else "right")
    for name, entry in report["sets"].items():
        for i, (query, found) in enumerate(entry["search"].items()):
            shares = (f"{found[key]:.3f}" for key in ("first", "top", "chance"))
            table.add_row(name if i == 0 else "", query, str(found["queries"]), *shares)
    if table.row_count:
        console.print(table)


def evaluate_run(encoder: Encoder, splits: Splits, out: Path, *, validation: bool = False) -> dict[str, Any]:
    """Print the tables of a model, and write ``report.json`` and the pictures to ``out``."""
    sets = pick_sets(splits, validation)
    report = evaluate(encoder, splits, sets)
    out.mkdir(parents=True, exist_ok=True)
    save_report(report, out / "report.json")
    print_retrieval(report, console)
    print_languages(report, console)
    print_search(report, console)
    for note in report["notes"]:
        say(note, "dim")
    draw_gallery(encoder, next(iter(sets.values())), splits.gallery_limit, out)
    if history := read_history(out):
        curves(history, out / "curves.png", loss="loss", second=("r1", "R@1 in the batch", "Training batches"))
    announce_files(out, "curves.png", "similarity.png", "retrieval.png", "report.json")
    return report
