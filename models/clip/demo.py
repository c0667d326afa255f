"""``make demo``: CLIP from nothing to tables and pictures in a quarter of an hour on two cores."""

from __future__ import annotations

import copy
import json
import statistics
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.table import Table

from models.clip.evaluate import evaluate_run
from models.clip.model import CLIP, PRESETS, PresetName
from models.clip.train import ClipTask, LossName, train_run
from models.common.console import console, say
from models.common.training import TrainConfig, Trainer
from models.data import Batch
from models.data.config import DataConfig

# What evaluation, plots and the comparison of the losses take after training, with a slow machine in mind.
RESERVED_MINUTES = 1.5
DEMO_STEPS = 1500
LOSSES: tuple[LossName, LossName] = ("fused", "eager")


def _median_seconds(runs: dict[LossName, list[float]]) -> dict[LossName, float]:
    return {name: statistics.median(values) for name, values in runs.items()}


def time_losses(task: ClipTask, views: int, batch: int, width: int, repeats: int) -> dict[LossName, float]:
    """Median seconds of forward and backward of the loss alone, fused and eager by turns on the same features."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(views, batch, width, generator=generator), dim=-1).requires_grad_()
    texts = F.normalize(torch.randn(batch, width, generator=generator), dim=-1).requires_grad_()
    scale = torch.tensor(20.0, requires_grad=True)
    runs: dict[LossName, list[float]] = {name: [] for name in LOSSES}
    for turn in range(repeats + 2):
        for name in LOSSES if turn % 2 else LOSSES[::-1]:  # neither always comes second
            own = ClipTask(task.plan, name, task.image_weight, task.scale_lr)
            began = time.perf_counter()
            loss = own.losses(images, texts, scale)
            torch.autograd.grad(loss, (images, texts, scale))
            if turn >= 2:  # the first turns warm up caches and allocations
                runs[name].append(time.perf_counter() - began)
    return _median_seconds(runs)


def time_steps(trainer: Trainer, task: ClipTask, repeats: int) -> dict[LossName, float]:
    """Median seconds of a whole training step (forward, backward, clipping, AdamW), fused and eager by turns.

    It runs on a copy: the trained weights stay as they are.
    """
    model = copy.deepcopy(trainer.raw_model).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    batch: Batch = task.batch(0).to(trainer.device)
    runs: dict[LossName, list[float]] = {name: [] for name in LOSSES}
    for turn in range(repeats + 1):
        for name in LOSSES if turn % 2 else LOSSES[::-1]:  # neither always comes second
            own = ClipTask(task.plan, name, task.image_weight, task.scale_lr)
            began = time.perf_counter()
            with trainer.accelerator.autocast():
                loss, _ = own.loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.config.clip)
            optimizer.step()
            optimizer.zero_grad()
            if turn >= 1:
                runs[name].append(time.perf_counter() - began)
    return _median_seconds(runs)


def compare_losses(trainer: Trainer, task: ClipTask) -> dict[str, dict[str, float]]:
    """The times of fused and eager on this run's step, on its loss alone, and on the loss of a larger batch."""
    model = trainer.raw_model
    assert isinstance(model, CLIP)
    width, plan = model.config.embed_dim, task.plan
    found = {
        f"training step, {plan.batch_size} captions x {plan.views} views": time_steps(trainer, task, 13),
        f"its loss alone, {plan.batch_size} x {plan.batch_size}": time_losses(
            task, plan.views, plan.batch_size, width, 101
        ),
        "loss alone, 4096 x 4096": time_losses(task, 1, 4096, width, 5),
    }
    return {
        what: {"fused_ms": 1e3 * t["fused"], "eager_ms": 1e3 * t["eager"], "eager_over_fused": t["eager"] / t["fused"]}
        for what, t in found.items()
    }


def print_comparison(found: dict[str, dict[str, float]]) -> None:
    """Print the times as a table."""
    table = Table(title="Fused info_nce against eager (same process, by turns, medians, forward + backward)")
    table.add_column("what")
    for column in ("fused ms", "eager ms", "eager : fused"):
        table.add_column(column, justify="right")
    for what, row in found.items():
        table.add_row(what, f"{row['fused_ms']:.2f}", f"{row['eager_ms']:.2f}", f"{row['eager_over_fused']:.2f}")
    console.print(table)


def demo_configs(data: str, minutes: float) -> tuple[PresetName, DataConfig, TrainConfig]:
    """Preset, data and training of the demo; they were chosen on the validation style fluent-flat, never on Twemoji."""
    train = TrainConfig(
        steps=DEMO_STEPS,
        lr=2e-3,
        warmup=60,
        precision="auto",
        minutes=minutes,
        checkpoint_every=250,
    )
    if data == "synthetic":
        return "nano", DataConfig(source=data, stored_size=32, batch_size=64, variant_divisor=1), train
    emoji = DataConfig(
        source=data,
        stored_size=PRESETS["tiny"].vision.image_size,
        augment=0.5,
        batch_size=512,
        views=1,
        variant_divisor=20,
        keyword_share=0.15,
    )
    return "tiny", emoji, train


def run_demo(out: Path, budget: float, data: str) -> None:
    """Train, evaluate, compare the losses, and say where everything lies, within ``budget`` minutes."""
    began = time.perf_counter()
    minutes = max(0.05, budget - RESERVED_MINUTES)
    preset, source, config = demo_configs(data, minutes)
    console.rule(f"CLIP on {data}: training for at most {minutes:.1f} minutes")
    trainer, splits = train_run(preset, source, config, out, resume=False)
    model = trainer.raw_model
    assert isinstance(model, CLIP)
    assert isinstance(trainer.task, ClipTask)
    spent = sum(row["seconds"] for row in trainer.history)
    console.rule("evaluation")
    timings = compare_losses(trainer, trainer.task)
    model.load_state_dict(trainer.weights())
    report = evaluate_run(model.eval(), splits, out, batch_size=source.batch_size)
    print_comparison(timings)
    report |= {"steps": trainer.step, "training_seconds": spent, "losses": timings}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    headline(report)
    total = (time.perf_counter() - began) / 60
    say(f"{trainer.step} steps, {spent / 60:.1f} minutes of training, {total:.1f} minutes in all; pictures in {out}")


def headline(report: dict[str, object]) -> None:
    """Say in one line how the model stands against the nearest pixel on the first test set."""
    sets = report["sets"]
    assert isinstance(sets, dict)
    name, entry = next(iter(sets.items()))
    kind, found = next(iter(entry["retrieval"].items()))
    way = found["image to text"]
    model = way["model"]["r1"]
    console.print(f"[bold]{name}, {found['size']} {kind}, image to text R@1: {model:.3f}")
    for who, value in way.items():
        if who.startswith("pixels"):
            console.print(
                f"  nearest by {who}: {value['r1']:.3f}, the model finds {model / max(value['r1'], 1e-9):.2f} x"
            )
