"""The losses side by side: the same encoders, batches, steps and seed, trained by each."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from models.common.cli import announce, bad_log
from models.common.console import console, say
from models.common.gallery import WAYS, recalls
from models.common.plots import save_figure
from models.common.runs import read_history
from models.common.schedule import TrainConfig
from models.retrieval.data import RetrievalData
from models.retrieval.evaluate import retriever_encoder, spoken_retrieval
from models.retrieval.model import RetrieverConfig
from models.retrieval.train import LossConfig, load_retriever, train_run


def compare_losses(
    config: RetrieverConfig,
    data: RetrievalData,
    train: TrainConfig,
    out: Path,
    *,
    margin: float = LossConfig.margin,
    mining_warmup: int | None = None,
    resume: bool = True,
    cpu: bool = False,
) -> None:
    """Train a model by each loss, print one table, and write ``compare.json`` and a plot to ``out``.

    A run is evaluated at each of its checkpoints; one that is finished is not repeated.
    """
    bad = bad_log("skip")
    splits = data.load(bad)
    announce(splits.notes, bad)
    sets = splits.all_sets()
    del sets["train"]
    losses = {
        "triplet, all": LossConfig(mining="all", margin=margin),
        "triplet, semi-hard": LossConfig(mining="semi_hard", margin=margin),
        "triplet, hardest": LossConfig(mining="hardest", margin=margin),
        "triplet, all then hardest": LossConfig(
            "triplet", "hardest", margin, mining_warmup or max(1, train.steps // 4)
        ),
        "InfoNCE": LossConfig("info_nce"),
        "SigLIP": LossConfig("siglip"),
    }
    rows: list[dict[str, Any]] = []
    for name, loss in losses.items():
        console.rule(name)
        folder = out / name.lower().replace(",", "").replace(" ", "-")
        trainer, _ = train_run(
            config,
            data,
            train,
            loss,
            folder,
            splits=splits,
            evaluate_every=train.checkpoint_every,
            resume=resume,
            cpu=cpu,
        )
        model, tokens, _ = load_retriever(folder)
        encoder = retriever_encoder(model, tokens)
        found = {
            which: spoken_retrieval(encoder, part.gallery(limit=splits.gallery_limit, variants=False))
            for which, part in sets.items()
        }
        took = sorted(row["seconds"] for row in trainer.history)[len(trainer.history) // 2]
        scores = read_history(folder, "validation.jsonl")
        rows.append({"loss": name, "config": asdict(loss), "step_seconds": took, "scores": scores, "sets": found})
        (out / "compare.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print_comparison(rows, console)
    if splits.validation is not None:
        scores_over_steps(
            {row["loss"]: row["scores"] for row in rows}, "R@1 on the validation set", out / "compare.png"
        )
    say(f"written: {out / 'compare.json'}")


def print_comparison(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print the losses side by side: base galleries, each number the mean over the languages."""
    table = Table(title="Base galleries, the mean over the languages, after equal steps")
    for column in (
        "set",
        "loss",
        *(f"{way} {k}" for way in ("I→T", "T→I") for k in ("R@1", "R@5", "R@10")),
        "s a step",
    ):
        table.add_column(column, justify="left" if column in ("set", "loss") else "right")
    for name in rows[0]["sets"]:
        for row in rows:
            spoken = row["sets"][name].values()
            means = []
            for way in WAYS:
                own = [found["ways"][way]["model"] for found in spoken]
                means += recalls({k: sum(value[k] for value in own) / len(own) for k in ("r1", "r5", "r10")})
            first, last = row is rows[0], row is rows[-1]
            table.add_row(name if first else "", row["loss"], *means, f"{row['step_seconds']:.2f}", end_section=last)
    console.print(table)


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
        save_figure(figure, path, dpi=130)
