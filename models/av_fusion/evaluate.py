"""Evaluation of audio-visual fusions: what each modality is worth, and what is left of it under noise."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models import plots
from models.av_fusion import (
    FUSIONS,
    AVFusion,
    Fusion,
    FusionConfig,
    PairDataConfig,
    count_parameters,
    load_data,
    load_fusion,
    train_run,
)
from models.cli import announce
from models.data.pairs import MODALITIES, Noise, PairBatch, PairSet, PairSplits, fixed_pairs
from models.data.sets import BadDataLog
from models.metrics import accuracy
from models.training import TrainConfig, console, read_history

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
SEEN = (*MODALITIES, "class token")  # what attention falls on


@torch.no_grad()
def predict_batch(model: AVFusion, batch: PairBatch, *, without: str = "", size: int = 250) -> Tensor:
    """Log-probabilities [n, classes], with one modality taken away if it is asked for."""
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
        mel = config.mel
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
    """Of each run, the accuracy at every level of a noise; or how much it attends to the ``attended`` of `SEEN`."""
    return [
        [point["accuracy"] if attended is None else point["weights"][attended] for point in run["sweeps"][sweep]]
        for run in runs
    ]


# --- one run ---------------------------------------------------------------------------------------------------------


def sweep_tables(entries: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Table]:
    """Accuracy at each level of each noise, a row for each model, and where one attends, to what: means over seeds."""

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
        console.print(f"[dim]{note}", highlight=False, soft_wrap=True)


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
            plots.confusion(found.argmax(1), test.standard.labels, data.classes, out / "confusion.png")
            draw_sweeps({model.config.fusion: [report["sets"][name]]}, out)
            draw_examples(model, test, out / "examples.png")
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_report(report, console)
    if history := read_history(out):
        plots.curves(
            history,
            out / "curves.png",
            loss="cross-entropy",
            chance=float(torch.tensor(model.config.classes).log()),
            second=("accuracy", "accuracy on the batch", "Training accuracy"),
        )
    _announce_files(out, "curves.png", "confusion.png", "robustness.png", "weights.png", "examples.png", "report.json")
    return report


def _announce_files(out: Path, *names: str) -> None:
    written = ", ".join(str(out / name) for name in names if (out / name).exists())
    console.print(f"written: {written}", highlight=False, soft_wrap=True)


def draw_sweeps(entries: Mapping[str, Sequence[Mapping[str, Any]]], out: Path) -> None:
    """``robustness.png``, the accuracy of each model against each noise; ``weights.png`` where one attends."""

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


# --- several runs ----------------------------------------------------------------------------------------------------


def _spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values) if len(values) > 1 else 0.0:.3f}"


def finished(folder: Path, key: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a run that was trained and evaluated under the same settings; None if there is none."""
    path = folder / "result.json"
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None
    return found if found.get("settings") == json.loads(json.dumps(key)) else None


def compare_runs(
    model: FusionConfig,
    data: PairDataConfig,
    train: TrainConfig,
    out: Path,
    *,
    rates: Mapping[Fusion, float],
    seeds: int,
    smoothing: float = 0.0,
    validation: bool = False,
    examples: int = 4000,
    sweep: int = 1000,
    bad: BadDataLog | None = None,
    resume: bool = True,
    cpu: bool = False,
) -> dict[str, Any]:
    """Train and evaluate every fusion for every seed, on the same batches and the same test examples; print the tables.

    Each fusion has its own of the learning ``rates``.

    Beside them stands what needs no training of its own: the decisions of the two models of one modality, averaged and
    multiplied. The product is Bayes' rule: image and sound of a class, and their noises, are independent here.
    """
    bad = bad if bad is not None else BadDataLog()
    splits = load_data(data, model, bad)
    announce(splits.notes, bad)
    name, test_data = next(iter(pick_sets(splits, validation).items()))
    test = DrawnSet.draw(test_data, model, data.noise, examples, sweep)
    entries: dict[str, list[dict[str, Any]]] = {}
    for seed in range(seeds):
        alone: dict[str, Tensor] = {}
        drawn: dict[int, PairBatch] = {}  # the batches of this seed, drawn once for all its runs
        for fusion in FUSIONS:
            folder = out / f"{fusion}-{seed}"
            config = replace(model, fusion=fusion)
            own_data, own_train = replace(data, seed=seed), replace(train, seed=seed, lr=rates[fusion])
            settings = {
                "model": asdict(config),
                "data": asdict(own_data),
                "train": asdict(own_train),
                "smoothing": smoothing,
                "evaluated": [name, examples, sweep, {k: list(v) for k, v in SWEEPS.items()}],
            }
            result = finished(folder, settings) if resume else None
            if result is None:
                console.rule(f"{fusion}, seed {seed}")
                trainer, _ = train_run(
                    config,
                    own_data,
                    own_train,
                    folder,
                    smoothing=smoothing,
                    splits=splits,
                    drawn=drawn,
                    resume=resume,
                    cpu=cpu,
                )
                trained = trainer.raw_model
                assert isinstance(trained, AVFusion)
                trained.load_state_dict(trainer.weights())
                entry, found = evaluate(trained, test)
                entry |= {"parameters": count_parameters(trained), "seconds": trainer.seconds}
                result = {"settings": settings, "entry": entry}
                if fusion in MODALITIES:
                    result["log_probabilities"] = [[round(x, 4) for x in row] for row in found.tolist()]
                (folder / "result.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
                console.print(f"accuracy {entry['accuracy']:.3f}")
            entries.setdefault(fusion, []).append(result["entry"])
            if fusion in MODALITIES:
                alone[fusion] = torch.tensor(result["log_probabilities"])
        labels = test.standard.labels
        for who, joined in (
            ("both alone, averaged", alone["image"].exp() + alone["audio"].exp()),
            ("both alone, multiplied", alone["image"] + alone["audio"]),
        ):
            right = float((joined.argmax(1) == labels).double().mean())
            entries.setdefault(who, []).append({"accuracy": right})
    report = {
        "data": splits.name,
        "set": name,
        "noise": asdict(data.noise),
        "seeds": seeds,
        "steps": train.steps,
        "notes": list(splits.notes),
        "runs": entries,
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "compare.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_comparison(report, console)
    draw_sweeps({str(fusion): entries[fusion] for fusion in FUSIONS}, out)
    attention, _, _ = load_fusion(out / "attention-0")
    draw_examples(attention, test, out / "examples.png")
    _announce_files(out, "compare.json", "robustness.png", "weights.png", "examples.png")
    return report


def print_comparison(report: Mapping[str, Any], console: Console) -> None:
    """Print the tables of a comparison."""
    entries = report["runs"]
    first = entries["attention"][0]
    table = Table(
        title=f"{report['set']}: {first['examples']} examples, {report['steps']} steps, mean ± standard deviation over "
        f"{report['seeds']} seed(s); chance {first['chance']:.3f}, largest class {first['majority']:.3f}"
    )
    table.add_column("fusion", no_wrap=True)
    for column in ("k parameters", "s a run", "accuracy", "attention ahead by", "without image", "without audio"):
        table.add_column(column, justify="right")
    best = [run["accuracy"] for run in entries["attention"]]
    for who, runs in entries.items():
        own = [run["accuracy"] for run in runs]
        ahead = "" if who == "attention" else _spread([b - a for a, b in zip(own, best, strict=True)])
        trained = "parameters" in runs[0]
        table.add_row(
            who,
            f"{runs[0]['parameters'] / 1e3:.1f}" if trained else "",
            f"{statistics.mean(run['seconds'] for run in runs):.0f}" if trained else "",
            f"[bold]{_spread(own)}" if trained else _spread(own),
            ahead,
            *(_spread([run[f"without {m}"] for run in runs]) if f"without {m}" in runs[0] else "" for m in MODALITIES),
            end_section=who in ("audio", "attention"),
        )
    console.print(table)
    for table in sweep_tables({fusion: entries[fusion] for fusion in FUSIONS}):
        console.print(table)
    for note in report["notes"]:
        console.print(f"[dim]{note}", highlight=False, soft_wrap=True)
