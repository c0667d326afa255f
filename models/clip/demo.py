"""``make demo``: CLIP from nothing to tables, pictures and a search in your own words, in ten minutes on two cores."""

from __future__ import annotations

import functools
import os
import shlex
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

import mmkernels
from mmkernels.testing import peak_allocated
from models.clip.evaluate import clip_encoder, draw, evaluate, print_report, search
from models.clip.model import CLIP, PresetName
from models.clip.text import FrozenText, TextEncoderName
from models.clip.train import ClipTask, LossName, clip_trainer, eager_info_nce, read_ahead
from models.common.console import console, say
from models.common.gallery import Encoder, save_report
from models.common.plots import contact_sheet
from models.common.schedule import TrainConfig
from models.common.training import Trainer
from models.data import ImageTextSet, Splits
from models.data.config import DataConfig
from models.data.emoji.styles import load_style
from models.data.sets import BadDataLog

# How much of the budget each phase may take; training has the rest, and what the others leave.
SHARES = {"drawings": 0.22, "text": 0.1, "evaluation": 0.07, "losses": 0.05, "pictures": 0.03}
# What training gets beyond the budget, as a share of it, where another job slows the machine down.
SPARE = 0.35
AFTER_TRAINING = ("evaluation", "losses", "pictures")
DEMO_STEPS = 1500
HEARTBEAT_SECONDS = 15
RETRY_SECONDS = 40
# Styles that are worth their drawings: the others of the demo are OpenMoji's own again, without lines or colours.
NEEDED_STYLES = ("twemoji", "openmoji", "noto")
# Searches in words that no caption has.
SEARCHES = ("something to drink from", "a place to spend the night", "it makes music")
PAIRS = (512, 4096, 8192)


@dataclass
class Clock:
    """The time of the whole demo, parted into phases that are announced."""

    budget: float  # seconds
    began: float = field(default_factory=time.monotonic)

    def box(self, phase: str) -> float:
        """The seconds that a phase may take."""
        return SHARES[phase] * self.budget

    @property
    def spent(self) -> float:
        """The seconds that are gone."""
        return time.monotonic() - self.began

    @property
    def training(self) -> float:
        """The seconds for training: what is left, but for what comes after it; some steps are taken in any case."""
        return max(0.05 * self.budget, self.budget - self.spent - sum(map(self.box, AFTER_TRAINING)))

    @contextmanager
    def phase(self, title: str, seconds: float, *, heartbeat: bool = True) -> Iterator[float]:
        """Announce a phase, say now and then that it is under way, and give the time at which it should end."""
        console.rule(f"{title}: at most {seconds:.0f} s")
        began, over = time.monotonic(), threading.Event()

        def beat() -> None:
            while not over.wait(HEARTBEAT_SECONDS):
                say(f"{title}: {time.monotonic() - began:.0f} s so far", "dim")

        thread = threading.Thread(target=beat, daemon=True)
        if heartbeat:
            thread.start()
        try:
            yield began + seconds
        finally:
            over.set()
            if heartbeat:
                thread.join()
        say(f"{title}: {time.monotonic() - began:.0f} s, {self.spent / 60:.1f} minutes in all", "dim")


class Threads:
    """Lets training run with all threads or with one, whichever takes a step in less time.

    Where another job has a core, two threads wait for each other longer than one works. Both are tried at the start,
    and the slower again now and then, for such jobs come and go. If one thread wins twice, training gets ``spare``
    minutes more, once. Called after each step (``on_step`` of ``Trainer.fit``).
    """

    def __init__(self, spare: float = 0.0) -> None:
        self.spare = spare
        self.seconds: dict[int, float] = {}  # of the latest step of each
        self.choices = sorted({1, torch.get_num_threads()}, reverse=True)
        self.tried = time.monotonic()
        self.lost = 0  # how often all threads were slower than one

    def __call__(self, trainer: Trainer) -> None:
        if len(self.choices) < 2 or trainer.step == 1:  # the first step also warms up
            return
        now, threads, first = time.monotonic(), torch.get_num_threads(), len(self.seconds) < 2
        self.seconds[threads] = trainer.history[-1]["seconds"]
        untried = [other for other in self.choices if other not in self.seconds]
        if untried:
            torch.set_num_threads(untried[0])
            return
        best = min(self.choices, key=lambda choice: self.seconds[choice])
        slower = next(other for other in self.choices if other != best)
        if best == 1 and (first or threads != 1):
            self.lost += 1
            if self.lost == 2 and trainer.config.minutes is not None and self.spare:
                say(f"another job is at work here: {self.spare:.1f} minutes more for training")
                trainer.config = replace(trainer.config, minutes=trainer.config.minutes + self.spare)
        # A trial costs at most a twentieth of the time between two.
        if threads == best and now - self.tried > max(RETRY_SECONDS, 20 * self.seconds[slower]):
            self.tried = now
            best = slower
        torch.set_num_threads(best)


def demo_configs(data: str) -> tuple[PresetName, TextEncoderName, DataConfig, TrainConfig]:
    """Preset, text encoder, data and training; they were chosen on the validation style fluent-flat, not on Twemoji."""
    train = TrainConfig(steps=DEMO_STEPS, lr=2e-3, warmup=60, precision="auto", checkpoint_every=10**6)
    if data == "synthetic":
        return "nano", "minilm", DataConfig(source=data, stored_size=32, batch_size=64, variant_divisor=1), train
    emoji = DataConfig(
        source=data,
        stored_size=48,  # more than the model sees, for the augmentation to sample from
        augment=0.5,
        batch_size=512,
        views=1,
        variant_divisor=20,
        keyword_share=0.3,
    )
    return "tiny", "minilm", emoji, train


def draw_styles(source: DataConfig, until: float) -> DataConfig:
    """Render the drawings; styles that are not needed are left out where the time is over."""
    bad, kept = BadDataLog(), []
    for name in (*NEEDED_STYLES, *(style for style in source.styles if style not in NEEDED_STYLES)):
        if name not in NEEDED_STYLES and time.monotonic() > until:
            say(f"the time for drawings is over: going on without the style {name}")
            continue
        drawings = load_style(name, source.stored_size, Path(source.cache_dir), bad)
        say(f"{name}: {len(drawings)} drawings", "dim")
        kept.append(name)
    return replace(source, styles=tuple(style for style in source.styles if style in kept))


@contextmanager
def silent_stderr() -> Iterator[None]:
    """torch's profiler writes lines of its own to the file of stderr, past Python."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def compare_at(pairs: int, width: int, end: float) -> dict[str, float]:
    """Time and memory of the fused loss and the eager one, forward and backward, on the same features.

    They run by turns until ``end``, by ``time.monotonic()``, and each twice at least.
    """
    generator = torch.Generator().manual_seed(0)
    images, texts = (F.normalize(torch.randn(pairs, width, generator=generator), dim=-1) for _ in range(2))
    inputs = images.requires_grad_(), texts.requires_grad_(), torch.tensor(20.0, requires_grad=True)
    losses: dict[LossName, Callable[..., Tensor]] = {"fused": mmkernels.info_nce, "eager": eager_info_nce}

    def gradients(name: LossName) -> tuple[Tensor, ...]:
        return torch.autograd.grad(losses[name](*inputs), inputs)

    row, taken = {}, {name: list[float]() for name in losses}
    with silent_stderr():
        for name in losses:  # the first run of each also warms up
            row[f"{name}_mib"] = peak_allocated(functools.partial(gradients, name)) / 2**20
    turns = 0
    while turns < 2 or (turns < 51 and time.monotonic() < end):
        for name in sorted(losses, reverse=bool(turns % 2)):  # neither always comes second
            began = time.perf_counter()
            gradients(name)
            taken[name].append(time.perf_counter() - began)
        turns += 1
    return row | {f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in taken.items()}


def compare_losses(width: int, until: float) -> dict[int, dict[str, float]]:
    """The losses compared by the number of pairs; sizes for which no time is left are left out."""
    found: dict[int, dict[str, float]] = {}
    needed = 0.0  # seconds of three runs of each, as the size before tells
    for pairs in PAIRS:
        now = time.monotonic()
        if found and now + needed * (pairs / max(found)) ** 2 > until:
            break
        found[pairs] = compare_at(pairs, width, now + min(5.0, (until - now) / 4))
        needed = 3e-3 * (found[pairs]["fused_ms"] + found[pairs]["eager_ms"])
    return found


def print_comparison(found: dict[int, dict[str, float]]) -> None:
    """Print times and memory as a table."""
    table = Table(title="Fused info_nce against the eager lines (by turns, medians, forward and backward)")
    table.add_column("pairs", justify="right")
    for column in ("fused ms", "eager ms", "eager : fused", "fused MiB", "eager MiB"):
        table.add_column(column, justify="right")
    for pairs, row in found.items():
        ratio = row["eager_ms"] / row["fused_ms"]
        numbers = (row["fused_ms"], row["eager_ms"], ratio, row["fused_mib"], row["eager_mib"])
        table.add_row(str(pairs), *(f"{number:.2f}" for number in numbers))
    console.print(table)


def draw_searches(encoder: Encoder, train: ImageTextSet, gallery: ImageTextSet, out: Path) -> None:
    """A picture of what some texts find, though they are no captions."""
    found = []
    for text, scores in zip(SEARCHES, search(encoder, train, gallery.images, SEARCHES), strict=True):
        best = scores.topk(min(8, len(gallery)))
        found.append((text, gallery.select(best.indices), best.values))
    contact_sheet(found, out / "search.png")


def run_demo(out: Path, budget: float, data: str) -> None:
    """Draw, read, train, evaluate, compare the losses, and say what came out, all within ``budget`` minutes.

    Where another job takes a core, training gets a share of the budget more.
    """
    clock = Clock(60 * budget)
    preset, text_encoder, source, config = demo_configs(data)
    with clock.phase("drawings", clock.box("drawings")) as until:
        if data == "emoji":
            source = draw_styles(source, until)
    with clock.phase("text features", clock.box("text")) as until:
        trainer, splits = clip_trainer(preset, source, config, out, text_encoder=text_encoder, resume=False)
        assert isinstance(splits, Splits)
        read_ahead(trainer, until)
    model, task = trainer.raw_model, trainer.task
    assert isinstance(model, CLIP)
    assert isinstance(task, ClipTask)
    reader = task.plan.tokenizer
    assert isinstance(reader, FrozenText)
    with clock.phase("training", clock.training, heartbeat=False):
        trainer.config = replace(trainer.config, minutes=clock.training / 60)
        trainer.fit(Threads(SPARE * budget))
    model.load_state_dict(trainer.weights())
    encoder = clip_encoder(model.eval(), reader)
    with clock.phase("evaluation", clock.box("evaluation")) as until:
        report = evaluate(encoder, splits, until=until)
        print_report(report, console)
    with clock.phase("fused against eager loss", clock.box("losses")) as until:
        losses = compare_losses(model.config.embed_dim, until)
        print_comparison(losses)
    first = next(iter(splits.tests.values()))
    with clock.phase("pictures", clock.box("pictures")):
        draw(encoder, first, splits.gallery_limit, out, source.batch_size)
        if data == "emoji":
            draw_searches(encoder, splits.train, first.gallery(variants=False), out)
    step = statistics.median(row["seconds"] for row in trainer.history)
    save_report(report | {"steps": trainer.step, "step_seconds": step, "losses": losses}, out / "report.json")
    console.rule()
    say(f"{trainer.step} steps of {step:.2f} s, {clock.spent / 60:.1f} minutes in all")
    for line in conclusions(report, losses, model.config.embed_dim):
        say(line, "bold")
    pictures = (out / name for name in ("search.png", "retrieval.png", "similarity.png", "curves.png"))
    say(f"Pictures: {', '.join(str(path) for path in pictures if path.exists())}", "bold")
    query = SEARCHES[0] if data == "emoji" else "a red circle"
    say("Search it in words of your own:")
    say(f'  python -m models.clip retrieve {shlex.quote(str(out))} --text "{query}" --out found.png')


def conclusions(report: dict[str, Any], losses: dict[int, dict[str, float]], width: int) -> Iterator[str]:
    """What was reached beside the nearest pixel, and what the fused loss saves, in a line each."""
    name, entry = next(iter(report["sets"].items()))
    found = next(iter(entry["retrieval"].values()))
    ways = []
    for way in ("image to text", "text to image"):
        scores = found[way]
        pixels = max(value["r1"] for who, value in scores.items() if who.startswith("pixels"))
        ways.append(f"{way} {scores['model']['r1']:.3f} (nearest pixel {pixels:.3f})")
    label_set, classes = next(iter(entry["zero_shot"].items()))
    yield (
        f"Reached: R@1 of {found['size']} in {name}: {', '.join(ways)}; zero-shot over {classes['classes']} "
        f"{label_set}: macro {classes['macro']:.3f} (chance {classes['chance']:.3f})"
    )
    pairs, row = max(losses.items())
    yield (
        f"Saved by the fused loss at {pairs} pairs of {width} features: {row['fused_ms'] / 1e3:.2f} s instead of "
        f"{row['eager_ms'] / 1e3:.2f}, {row['fused_mib']:.0f} MiB instead of {row['eager_mib']:.0f}"
    )
