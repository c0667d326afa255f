"""Every fusion for several seeds, on the same batches and the same test examples."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.av_fusion.data import PairDataConfig, load_data
from models.av_fusion.evaluate import SWEEPS, DrawnSet, draw_examples, draw_sweeps, evaluate, pick_sets, sweep_tables
from models.av_fusion.model import FUSIONS, MODALITIES, AVFusion, Fusion, FusionConfig, count_parameters
from models.av_fusion.train import load_fusion, train_run
from models.common.cli import announce
from models.common.console import console, say
from models.common.runs import announce_files
from models.common.schedule import TrainConfig, pick_precision
from models.data.pairs import PairBatch
from models.data.sets import BadDataLog


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

    ``rates`` holds the learning rate of each fusion.

    Two rows of the tables need no training of their own: the decisions of the two models of one modality, averaged and
    multiplied. The product is Bayes' rule: image and sound of a class, and their noises, are independent here.
    """
    bad = bad if bad is not None else BadDataLog()
    train = replace(train, precision=pick_precision(train.precision))  # they tell a finished run
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
    announce_files(out, "compare.json", "robustness.png", "weights.png", "examples.png")
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
        say(note, "dim")
