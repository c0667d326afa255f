"""Training TimeSformer to name videos, and loading what a run left behind."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common.cli import announce
from models.common.console import console, warn
from models.common.engine import Engine
from models.common.runs import load_run
from models.common.schedule import TrainConfig
from models.common.training import Task, Trainer
from models.data.sets import BadDataLog
from models.data.video import ClipAugment, ClipBatch, ClipPlan, VideoSplits
from models.timesformer.data import VideoDataConfig, load_data
from models.timesformer.model import TimeSformer, TimesformerConfig


@dataclass
class VideoTask(Task):
    """The classification task of :class:`models.common.training.Trainer`."""

    plan: ClipPlan
    smoothing: float = 0.0

    @property
    def samples(self) -> int:  # type: ignore[override]
        """Clips of a batch."""
        return self.plan.batch_size

    def batch(self, index: int) -> ClipBatch:
        """The batch of an index, or this rank's share of it."""
        return self.plan(index)

    def divide(self, engine: Engine) -> None:
        """Every rank reads its share of a batch."""
        self.plan.share = engine.share

    def loss(self, model: nn.Module, batch: ClipBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Cross-entropy, with the accuracy on the batch to log."""
        logits = model(batch.videos).float()
        right = (logits.argmax(-1) == batch.labels).float().mean()
        loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.smoothing)
        weight = self.plan.share.weight(self.plan.batch_size)
        return loss * weight, {"accuracy": right.detach() * weight}


def train_run(
    model_config: TimesformerConfig,
    data: VideoDataConfig,
    train: TrainConfig,
    out: Path,
    *,
    smoothing: float = 0.0,
    bad: BadDataLog | None = None,
    resume: bool = True,
    compile_model: bool = False,
    cpu: bool = False,
) -> tuple[Trainer, VideoSplits]:
    """Read the data, train, and leave checkpoints and logs in ``out``; the data decide the number of classes."""
    bad = bad if bad is not None else BadDataLog()
    splits = load_data(data, bad)
    announce(splits.notes, bad)
    torch.manual_seed(train.seed)
    random.seed(train.seed)
    config = replace(model_config, classes=len(splits.train.classes))
    model = TimeSformer(config)
    plan = ClipPlan(
        splits.train, ClipAugment(config.image_size, data.augment), batch_size=data.batch_size, seed=data.seed
    )
    trainer = Trainer(
        model,
        VideoTask(plan, smoothing),
        train,
        out,
        model_config={
            "name": "timesformer",
            "timesformer": asdict(config),
            "data": asdict(data),
            "smoothing": smoothing,
            "classes": list(splits.train.classes),
        },
        compile_model=compile_model,
        cpu=cpu,
    )
    trainer.begin(resume)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"{config.attention} attention, {parameters:.1f} M parameters, {len(splits.train)} videos of {config.classes} "
        f"classes, {plan.steps_per_epoch} steps an epoch, {trainer.device}, precision {trainer.config.precision}"
    )
    trainer.fit()
    if len(bad):
        warn(bad.summary())
    return trainer, splits


def load_timesformer(path: Path) -> tuple[TimeSformer, VideoDataConfig, list[str]]:
    """Model, data and names of the classes of a run folder or a checkpoint file, ready to evaluate.

    The weights are the averaged ones, where there are any.
    """
    run = load_run(path, "timesformer")
    with run.fitting():
        model = TimeSformer(TimesformerConfig.from_dict(run.described["timesformer"]))
        model.load_state_dict(run.weights)
        return model.eval(), VideoDataConfig(**run.described["data"]), run.described["classes"]
