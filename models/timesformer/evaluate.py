"""Evaluation of TimeSformer: accuracy over clips and crops, each number beside what it has to beat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.common import plots
from models.common.console import console, say
from models.common.runs import announce_files, read_history
from models.data.batches import generator_of
from models.data.digits import velocities
from models.data.sets import BadDataError, BadDataLog
from models.data.video import TensorVideos, VideoSet, VideoSplits, crops, prepare
from models.timesformer.model import TimeSformer
from models.timesformer.plots import draw_rollout

# How the frames of a clip change before the model sees them.
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
        """The scores of probabilities [n, classes]."""
        # torchmetrics takes seconds to import, which training need not wait for.
        from torchmetrics.functional.classification import multiclass_accuracy

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
    """Grey clips [n, T, C, S, S] scaled down to 16 x 16, one row per clip."""
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
    # Only the baselines need scikit-learn.
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
    """The class of clips [n, T, 1, S, S] on a torus by the shift between neighbouring frames: a baseline that needs no
    learning. It first takes away what stands still."""
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
        say(note, "dim")


def evaluate_run(
    model: TimeSformer,
    splits: VideoSplits,
    out: Path,
    *,
    clips: int = 1,
    crops: int = 3,
    validation: bool = False,
    bad: BadDataLog | None = None,
) -> dict[str, Any]:
    """Print the tables of a model, and write ``report.json`` and the pictures to ``out``."""
    sets = splits.tests
    if validation:
        if splits.validation is None:
            raise ValueError("this data has no validation set")
        sets = {"validation": splits.validation}
    if not sets:
        raise ValueError("this data has no test set")
    report, predictions = evaluate(model, splits, sets, Views(clips, crops), bad if bad is not None else BadDataLog())
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print_report(report, console)
    name, data = next(iter(sets.items()))
    probabilities, labels = predictions[name]
    plots.confusion(probabilities.argmax(1), labels, data.classes, out / "confusion.png")
    # The first video that the model names right, or just the first.
    right = (probabilities.argmax(1) == labels).nonzero().flatten().tolist()
    draw_attention(model, data.views(right[0] if right else 0, 1)[0], data.classes, out / "attention.png")
    if history := read_history(out):
        plots.curves(
            history,
            out / "curves.png",
            loss="cross-entropy",
            chance=float(torch.tensor(len(data.classes)).log()),
            second=("accuracy", "accuracy on the batch", "Training accuracy"),
        )
    announce_files(out, "curves.png", "confusion.png", "attention.png", "report.json")
    return report


def draw_attention(model: TimeSformer, clip: Tensor, classes: Sequence[str], path: Path) -> None:
    """Draw a clip [T, C, H, W] (uint8), and below each frame what of it the class token draws on."""
    square = crops(clip, 1)
    videos = prepare(square.to(model.class_embedding.device), model.config.image_size)
    with torch.no_grad():
        found = model(videos).softmax(-1)[0].max(-1)
    title = f"{classes[int(found.indices)]}  ({float(found.values):.2f})"
    draw_rollout(square[0], model.rollout(videos)[0].cpu(), title, path)
