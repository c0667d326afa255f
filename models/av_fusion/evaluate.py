"""Evaluation of audio-visual fusions: what each modality is worth, and what is left of it under noise."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.av_fusion import plots
from models.av_fusion.data import log_mel
from models.av_fusion.model import MODALITIES, AVFusion, FusionConfig, count_parameters
from models.common.console import console, say
from models.common.metrics import accuracy
from models.common.plots import confusion, curves
from models.common.runs import announce_files, read_history
from models.data.pairs import Noise, PairBatch, PairSet, PairSplits, fixed_pairs

# One level is the same for all examples of a point of a curve; the other levels are drawn as in training.
SWEEPS: Mapping[str, Sequence[float]] = {
    "snr": (21.0, 15.0, 9.0, 3.0, -3.0, -9.0, -15.0),
    "sigma": (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5),
    "hidden": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6),
}
LABELS = {
    "snr": "signal-to-noise ratio of the sound, dB",
    "sigma": "deviation of the image's noise",
    "hidden": "share of the image that is hidden",
}
SEEN = (*MODALITIES, "class token")  # what the class token attends to


@torch.no_grad()
def predict_batch(model: AVFusion, batch: PairBatch, *, without: str = "", size: int = 250) -> Tensor:
    """Log-probabilities [n, classes]; ``without`` names a modality that the model may not see."""
    device, found = next(model.parameters()).device, []
    for part in batch.split(size):
        seen = part.to(device)
        present = seen.present.clone()
        if without:
            present[:, MODALITIES.index(without)] = False
        found.append(model(seen.images, seen.spectrograms, present).float().log_softmax(-1).cpu())
    return torch.cat(found)


def batch_weights(model: AVFusion, batch: PairBatch, size: int = 250) -> Tensor:
    """The attention on image, sound and class token of every example, [n, 3]."""
    device = next(model.parameters()).device
    parts = (part.to(device) for part in batch.split(size))
    return torch.cat([model.weights(part.images, part.spectrograms, part.present).cpu() for part in parts])


@dataclass
class DrawnSet:
    """A set drawn once for all the models that are compared: at the standard noise, and at each level of it."""

    data: PairSet
    standard: PairBatch
    sweeps: dict[str, list[PairBatch]]

    @staticmethod
    def draw(data: PairSet, config: FusionConfig, noise: Noise, examples: int, sweep: int) -> DrawnSet:
        """``examples`` at the standard noise and ``sweep`` at each level, the same for every model and seed."""
        mel = log_mel(config)
        sweeps = {
            name: [fixed_pairs(data, sweep, noise.fixed(**{name: level}), mel, seed=1) for level in levels]
            for name, levels in SWEEPS.items()
        }
        return DrawnSet(data, fixed_pairs(data, examples, noise, mel), sweeps)


def pick_sets(splits: PairSplits, validation: bool) -> Mapping[str, PairSet]:
    """The sets to report on."""
    sets = splits.tests
    if validation:
        if splits.validation is None:
            raise ValueError("this data has no validation set")
        sets = {"validation": splits.validation}
    if not sets:
        raise ValueError("this data has no test set")
    return sets


def evaluate(model: AVFusion, test: DrawnSet) -> tuple[dict[str, Any], Tensor]:
    """The entry of a set in the report, and the log-probabilities behind it."""
    model.eval()
    fused, attends = len(model.config.modalities) > 1, model.config.fusion == "attention"
    labels, classes = test.standard.labels, len(test.data.classes)
    found = predict_batch(model, test.standard)
    scores = accuracy(found.argmax(1), labels, classes)
    entry: dict[str, Any] = {
        "examples": len(labels),
        "chance": scores.chance,
        "majority": scores.majority,
        "accuracy": scores.micro,
        "macro": scores.macro,
        "nll": float(F.nll_loss(found, labels)),
    }
    if fused:
        for name in MODALITIES:
            without = predict_batch(model, test.standard, without=name)
            entry[f"without {name}"] = accuracy(without.argmax(1), labels, classes).micro
    if attends:
        entry["weights"] = batch_weights(model, test.standard).mean(0).tolist()
    entry["sweeps"] = {}
    for name, batches in test.sweeps.items():
        points = []
        for level, batch in zip(SWEEPS[name], batches, strict=True):
            right = (predict_batch(model, batch).argmax(1) == batch.labels).double().mean()
            point: dict[str, Any] = {"level": level, "accuracy": float(right)}
            if attends:
                point["weights"] = batch_weights(model, batch).mean(0).tolist()
            points.append(point)
        entry["sweeps"][name] = points
    return entry, found


def sweep_values(runs: Sequence[Mapping[str, Any]], sweep: str, attended: int | None = None) -> list[list[float]]:
    """The accuracy of each run at every level of a noise; or how much the run attends to `SEEN[attended]`."""
    return [
        [point["accuracy"] if attended is None else point["weights"][attended] for point in run["sweeps"][sweep]]
        for run in runs
    ]


def sweep_tables(entries: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Table]:
    """Accuracy at each level of each noise, one row per model, and where attention lies: means over seeds."""

    def table(title: str, name: str, rows: Mapping[str, Any]) -> Table:
        found = Table(title=f"{title} against the {LABELS[name]}")
        found.add_column("")
        for level in SWEEPS[name]:
            found.add_column(f"{level:g}", justify="right")
        for who, values in rows.items():
            found.add_row(who, *(f"{value:.3f}" for value in torch.tensor(values).mean(0).tolist()))
        return found

    for name in SWEEPS:
        yield table("Accuracy", name, {who: sweep_values(runs, name) for who, runs in entries.items()})
        if "attention" in entries:
            shares = {seen: sweep_values(entries["attention"], name, i) for i, seen in enumerate(SEEN)}
            yield table("Mean attention", name, shares)


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the tables of a report."""
    fusion = report["fusion"]
    table = Table(title=f"{fusion} fusion, {report['parameters']:,} parameters, accuracy at the standard noise")
    table.add_column("set")
    table.add_column("")
    table.add_column("accuracy", justify="right")
    table.add_column("macro", justify="right")
    for name, entry in report["sets"].items():
        table.add_row(f"{name}: {entry['examples']} examples", "[bold]model", *_figures(entry))
        for other in MODALITIES:
            if f"without {other}" in entry:
                table.add_row("", f"the same without the {other}", f"{entry[f'without {other}']:.3f}", "")
        table.add_row("", "always the largest class", f"{entry['majority']:.3f}", "")
        table.add_row("", "chance", f"{entry['chance']:.3f}", "", end_section=True)
    console.print(table)
    for entry in report["sets"].values():
        for table in sweep_tables({fusion: [entry]}):
            console.print(table)
    for note in report["notes"]:
        say(note, "dim")


def _figures(entry: Mapping[str, Any]) -> tuple[str, str]:
    return f"{entry['accuracy']:.3f}", f"{entry['macro']:.3f}"


def evaluate_run(
    model: AVFusion,
    splits: PairSplits,
    noise: Noise,
    out: Path,
    *,
    validation: bool = False,
    examples: int = 4000,
    sweep: int = 1000,
) -> dict[str, Any]:
    """Print the tables of a model, and write ``report.json`` and the pictures to ``out``."""
    report: dict[str, Any] = {
        "fusion": model.config.fusion,
        "parameters": count_parameters(model),
        "data": splits.name,
        "noise": asdict(noise),
        "notes": list(splits.notes),
        "sets": {},
    }
    out.mkdir(parents=True, exist_ok=True)
    for i, (name, data) in enumerate(pick_sets(splits, validation).items()):
        test = DrawnSet.draw(data, model.config, noise, examples, sweep)
        report["sets"][name], found = evaluate(model, test)
        if i == 0:
            confusion(found.argmax(1), test.standard.labels, data.classes, out / "confusion.png")
            draw_sweeps({model.config.fusion: [report["sets"][name]]}, out)
            draw_examples(model, test, out / "examples.png")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_report(report, console)
    if history := read_history(out):
        curves(
            history,
            out / "curves.png",
            loss="cross-entropy",
            chance=float(torch.tensor(model.config.classes).log()),
            second=("accuracy", "accuracy on the batch", "Training accuracy"),
        )
    announce_files(out, "curves.png", "confusion.png", "robustness.png", "weights.png", "examples.png", "report.json")
    return report


def draw_sweeps(entries: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> None:
    """Draw ``robustness.png``, the accuracy of each model against each noise, and ``weights.png`` of attention."""

    panels = {LABELS[name]: {who: sweep_values(runs, name) for who, runs in entries.items()} for name in SWEEPS}
    levels, chance = list(SWEEPS.values()), next(iter(entries.values()))[0]["chance"]
    plots.sweeps(panels, levels, out / "robustness.png", ylabel="accuracy", floor=chance)
    if "attention" in entries:
        panels = {
            LABELS[name]: {seen: sweep_values(entries["attention"], name, i) for i, seen in enumerate(SEEN)}
            for name in SWEEPS
        }
        plots.sweeps(panels, levels, out / "weights.png", ylabel="mean attention")


def _rank(values: Tensor) -> Tensor:
    return values.argsort().argsort()


def draw_examples(model: AVFusion, test: DrawnSet, path: Path) -> None:
    """Two examples each with both modalities good, the sound bad, the image bad, and both: what is seen and said."""
    batch = test.standard
    image, sound = _rank(_rank(batch.sigma) + _rank(batch.hidden)), _rank(-batch.snr)  # the last is the worst
    rows: list[int] = []
    for sign_image, sign_sound in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        rows += (sign_image * image + sign_sound * sound).argsort()[:2].tolist()
    part = PairBatch(**{name: value[torch.tensor(rows)] for name, value in vars(batch).items()})
    said = predict_batch(model, part).argmax(1)
    shares = batch_weights(model, part).tolist() if model.config.fusion == "attention" else [None] * len(rows)
    classes = test.data.classes
    plots.fused(
        [
            (part.images[i], part.spectrograms[i, 0], classes[int(said[i])], classes[int(part.labels[i])], shares[i])
            for i in range(len(rows))
        ],
        SEEN,
        path,
    )
