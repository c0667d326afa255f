"""Evaluation of TimeSformer: accuracy over clips and crops, each number beside what it has to beat."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional.classification import multiclass_accuracy

from mmkernels.testing import peak_allocated
from models.data.batches import generator_of
from models.data.sets import BadDataError, BadDataLog
from models.data.video import TensorVideos, VideoSet, VideoSplits, crops, prepare
from models.timesformer import ATTENTION_TYPES, PRESETS, TimeSformer, TimesformerConfig, VideoTask
from models.training import Trainer

# What is done to the frames of a clip before the model sees them.
Frames = Literal["in order", "shuffled", "one alone"]


@dataclass(frozen=True)
class Views:
    """How many clips of a video, and how many crops of each, are averaged."""

    clips: int = 1
    crops: int = 3


@dataclass(frozen=True)
class Scores:
    """Accuracy of the first guess, of the first five, and of the first averaged over classes."""

    top1: float
    top5: float
    macro: float

    @staticmethod
    def of(probabilities: Tensor, labels: Tensor) -> Scores:
        """Of probabilities [n, classes]."""
        classes = probabilities.shape[1]

        def accuracy(top: int, average: Literal["micro", "macro"]) -> float:
            return float(
                multiclass_accuracy(
                    probabilities, labels, num_classes=classes, top_k=min(top, classes), average=average
                )
            )

        return Scores(accuracy(1, "micro"), accuracy(5, "micro"), accuracy(1, "macro"))


def change_frames(videos: Tensor, frames: Frames, generator: torch.Generator) -> Tensor:
    """Clips [b, T, ...], the frames of each in a random order, or the middle one in the place of all."""
    if frames == "shuffled":
        return torch.stack([clip[torch.randperm(len(clip), generator=generator)] for clip in videos])
    if frames == "one alone":
        middle = videos.shape[1] // 2
        return videos[:, middle : middle + 1].expand_as(videos)
    return videos


@torch.no_grad()
def predict_views(
    model: TimeSformer, clips: Tensor, views: Views, frames: Frames = "in order", seed: int = 0
) -> Tensor:
    """The mean of the softmax over the clips [k, T, C, H, W] of a video and the crops of each: [classes]."""
    squares = crops(clips, views.crops).flatten(0, 1)
    squares = change_frames(squares, frames, generator_of(seed, 5))
    device = model.class_embedding.device
    logits = model(prepare(squares.to(device), model.config.image_size))
    return logits.float().softmax(-1).mean(0).cpu()


@torch.no_grad()
def predict_set(
    model: TimeSformer,
    data: VideoSet,
    views: Views = Views(),
    *,
    frames: Frames = "in order",
    bad: BadDataLog | None = None,
    batch: int = 64,
) -> tuple[Tensor, Tensor]:
    """Probabilities [n, classes] of a set, and the labels of the videos that could be read."""
    bad = bad if bad is not None else BadDataLog()
    model.eval()
    device, found, labels = model.class_embedding.device, [], []
    if isinstance(data, TensorVideos):
        # One square clip each: whole batches at a time.
        generator = generator_of(0, 5)
        for part in data.videos.split(batch):
            clips = prepare(change_frames(part, frames, generator).to(device), model.config.image_size)
            found.append(model(clips).float().softmax(-1).cpu())
        return torch.cat(found), data.labels
    for row in range(len(data)):
        try:
            found.append(predict_views(model, data.views(row, views.clips), views, frames, seed=row)[None])
        except BadDataError as error:
            name, _, reason = str(error).partition(": ")
            bad.report(name, reason)
            continue
        labels.append(int(data.labels[row]))
    if not found:
        raise BadDataError(f"none of the {len(data)} videos could be read: {bad.summary()}")
    return torch.cat(found), torch.tensor(labels)


# --- baselines -------------------------------------------------------------------------------------------------------


def _pixels(videos: Tensor, side: int = 16) -> np.ndarray:
    """Grey clips [n, T, C, S, S] scaled down to 16 x 16, a row each."""
    grey = videos.float().mean(2) / 255
    return F.adaptive_avg_pool2d(grey, side).flatten(1).numpy()


def drawn(data: VideoSet, most: int = 4096) -> TensorVideos | None:
    """At most ``most`` clips of a set that lies in memory or is drawn; None for files."""
    if isinstance(data, TensorVideos):
        return data
    rows = torch.randperm(len(data), generator=generator_of(0, 6))[:most].tolist()
    try:
        videos, labels = data.clips(rows, generator_of(0, 7))
    except BadDataError:
        return None
    return TensorVideos(videos, labels, data.classes)


def linear_baselines(train: TensorVideos, test: TensorVideos) -> dict[str, float]:
    """Top-1 of a logistic regression on the pixels of all frames, of the same with the test's frames shuffled, and of
    one on the middle frame alone; principal components come before each."""
    from sklearn.decomposition import PCA
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def fit(videos: Tensor) -> Any:
        pixels = _pixels(videos)
        components = min(256, *pixels.shape)
        pipeline = make_pipeline(PCA(components, random_state=0), LogisticRegression(C=1.0, max_iter=1000))
        return pipeline.fit(pixels, train.labels.numpy())

    truth = test.labels.numpy()
    middle = train.videos.shape[1] // 2
    whole, single = fit(train.videos), fit(train.videos[:, middle : middle + 1])
    mixed = change_frames(test.videos, "shuffled", generator_of(0, 5))
    return {
        "linear on pixels": float((whole.predict(_pixels(test.videos)) == truth).mean()),
        "linear on pixels, frames shuffled": float((whole.predict(_pixels(mixed)) == truth).mean()),
        "linear on one frame": float((single.predict(_pixels(test.videos[:, middle : middle + 1])) == truth).mean()),
    }


def phase_correlation(videos: Tensor, velocities: Tensor) -> Tensor:
    """The class of clips [n, T, 1, S, S] on a torus by the shift between neighbouring frames: what is at hand without
    learning. What stands still is taken away first."""
    x = videos[:, :, 0].double()
    x = x - x.mean(1, keepdim=True)
    spectrum = torch.fft.fft2(x)
    cross = spectrum[:, 1:] * spectrum[:, :-1].conj()
    surface = torch.fft.ifft2((cross / cross.abs().clamp(min=1e-9)).sum(1)).real  # its peak is the shift
    side = x.shape[-1]
    shift = surface.flatten(1).argmax(1)
    shift = torch.stack([shift % side, shift // side], 1)
    shift = (shift + side // 2) % side - side // 2
    return torch.cdist(shift.float(), velocities).argmin(1)


# --- the report ------------------------------------------------------------------------------------------------------


def evaluate(
    model: TimeSformer,
    splits: VideoSplits,
    sets: Mapping[str, VideoSet],
    views: Views,
    bad: BadDataLog,
    *,
    baselines: bool = True,
) -> tuple[dict[str, Any], dict[str, tuple[Tensor, Tensor]]]:
    """The report, and for each set the probabilities and labels behind it."""
    report: dict[str, Any] = {"data": splits.name, "notes": list(splits.notes), "views": asdict(views), "sets": {}}
    predictions = {}
    for name, data in sets.items():
        probabilities, labels = predict_set(model, data, views, bad=bad)
        predictions[name] = probabilities, labels
        classes = len(data.classes)
        entry: dict[str, Any] = {"videos": len(labels), "classes": classes}
        entry["model"] = asdict(Scores.of(probabilities, labels))
        changed: tuple[Frames, ...] = ("shuffled", "one alone")
        for frames in changed:
            entry[f"model, frames {frames}"] = asdict(
                Scores.of(*predict_set(model, data, views, frames=frames, bad=bad))
            )
        most = torch.bincount(labels, minlength=classes).max().item() / len(labels)
        entry["chance"] = {"top1": 1 / classes, "top5": min(1.0, 5 / classes)}
        entry["always the largest class"] = {"top1": most}
        entry["factors"] = {}
        for factor, groups in splits.factors.items():
            group = torch.tensor(groups)
            right = (group[probabilities.argmax(1)] == group[labels]).double().mean()
            entry["factors"][factor] = {"top1": float(right), "chance": 1 / len(set(groups))}
        if baselines and isinstance(data, TensorVideos):
            train = drawn(splits.train)
            assert train is not None
            entry |= {who: {"top1": value} for who, value in linear_baselines(train, data).items()}
            if splits.name == "digits":
                from models.data.digits import velocities

                found = phase_correlation(data.videos, velocities())
                entry["phase correlation"] = {"top1": float((found == labels).double().mean())}
        report["sets"][name] = entry
    report["skipped"] = list(bad.files)
    return report, predictions


def print_report(report: dict[str, Any], console: Console) -> None:
    """Print the tables of a report."""
    views = report["views"]
    table = Table(title=f"Accuracy ({views['clips']} clip(s) x {views['crops']} crop(s) a video where its size allows)")
    for column in ("set", "", "top-1", "top-5", "macro"):
        table.add_column(column, justify="right" if column in ("top-1", "top-5", "macro") else "left")

    def row(name: str, who: str, value: dict[str, float]) -> None:
        table.add_row(name, who, *(f"{value[k]:.3f}" if k in value else "" for k in ("top1", "top5", "macro")))

    for name, entry in report["sets"].items():
        first = f"{name}: {entry['videos']} videos, {entry['classes']} classes"
        for who, value in entry.items():
            if isinstance(value, dict) and who != "factors":
                row(first, f"[bold]{who}" if who == "model" else who, value)
                first = ""
        for factor, value in entry["factors"].items():
            row("", f"{factor} alone (chance {value['chance']:.3f})", value)
        table.add_section()
    console.print(table)
    for note in report["notes"]:
        console.print(f"[dim]{note}", highlight=False, soft_wrap=True)


# --- what a model costs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Multiply-adds of one view, and parameters with and without the classifier."""

    macs: int
    parameters: int
    without_head: int


def cost(config: TimesformerConfig) -> Cost:
    """Counted on the real model, run on fake tensors, by torch's own counter.

    The attention's formula is registered with its ops, which fake tensors of a CPU run wherever the kernels are built;
    elsewhere the reference runs, whose products come to the same count.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        model = TimeSformer(config).eval()
        video = torch.empty(1, config.num_frames, 3, config.image_size, config.image_size)
        with FlopCounterMode(display=False) as counter:
            model(video)
    parameters = sum(p.numel() for p in model.parameters())
    head = sum(p.numel() for p in model.head.parameters())
    return Cost(counter.get_total_flops() // 2, parameters, parameters - head)


def cost_table(presets: Sequence[str] = tuple(PRESETS)) -> Table:
    """Parameters and multiply-adds of the presets with each attention."""
    table = Table(title="TimeSformer: what a view costs (a multiply-add is one MAC)")
    columns = ("preset", "input", "attention", "M parameters", "without head", "GMAC, one view", "TMAC, three crops")
    for column in columns:
        table.add_column(column, justify="left" if column in ("preset", "input", "attention") else "right")
    for name in presets:
        config = PRESETS[name]
        for attention in ATTENTION_TYPES:
            found = cost(replace(config, attention=attention))
            table.add_row(
                name,
                f"{config.num_frames} x {config.image_size} px",
                attention,
                f"{found.parameters / 1e6:.2f}",
                f"{found.without_head / 1e6:.2f}",
                f"{found.macs / 1e9:.3f}" if found.macs < 1e10 else f"{found.macs / 1e9:.1f}",
                f"{3 * found.macs / 1e12:.4f}" if found.macs < 1e10 else f"{3 * found.macs / 1e12:.2f}",
            )
        table.add_section()
    return table


def step_cost(trainer: Trainer) -> tuple[float, int]:
    """Seconds of a batch's forward and backward passes, the median of ten, and the bytes that they hold at most."""
    task = trainer.task
    assert isinstance(task, VideoTask)
    model, batch = trainer.raw_model.train(), task.batch(0).to(trainer.device)

    def forward_backward() -> None:
        with trainer.accelerator.autocast():
            loss, _ = task.loss(model, batch)
        loss.backward()

    if trainer.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        forward_backward()
        held = torch.cuda.max_memory_allocated() - before
    else:
        held = peak_allocated(forward_backward)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        forward_backward()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    model.zero_grad()
    return statistics.median(seconds), held
