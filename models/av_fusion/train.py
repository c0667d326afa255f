"""Training a fusion to name pairs, and loading what a run left behind."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.av_fusion.data import PairDataConfig, load_data, log_mel
from models.av_fusion.model import MODALITIES, AVFusion, Fusion, FusionConfig, count_parameters
from models.common.cli import announce
from models.common.console import console
from models.common.runs import load_run
from models.common.schedule import TrainConfig
from models.common.training import Task, Trainer
from models.data.pairs import PairBatch, PairPlan, PairSplits
from models.data.sets import BadDataLog

# Learning rates, each the best of its fusion on the validation set of the digits.
RATES: dict[Fusion, float] = {
    "image": 0.04,
    "audio": 0.04,
    "early": 0.04,
    "late": 0.027,
    "weighted": 0.04,
    "attention": 0.008,
}


@dataclass
class FusionTask(Task):
    """The classification task of :class:`models.common.training.Trainer`."""

    plan: PairPlan
    smoothing: float = 0.0

    def batch(self, index: int) -> PairBatch:
        """The batch of an index."""
        return self.plan(index)

    def loss(self, model: nn.Module, batch: PairBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Cross-entropy, with the accuracy on the batch to log."""
        logits = model(batch.images, batch.spectrograms, batch.present).float()
        right = (logits.argmax(-1) == batch.labels).float().mean()
        return F.cross_entropy(logits, batch.labels, label_smoothing=self.smoothing), {"accuracy": right.detach()}


def train_run(
    model_config: FusionConfig,
    data: PairDataConfig,
    train: TrainConfig,
    out: Path,
    *,
    smoothing: float = 0.0,
    splits: PairSplits | None = None,
    drawn: dict[int, PairBatch] | None = None,
    bad: BadDataLog | None = None,
    resume: bool = True,
    cpu: bool = False,
) -> tuple[Trainer, PairSplits]:
    """Read the data (or take ``splits``), train, and leave checkpoints and logs in ``out``.

    The data decide the number of classes and of an image's channels; ``drawn`` goes to :class:`PairPlan`.
    """
    bad = bad if bad is not None else BadDataLog()
    if splits is None:
        splits = load_data(data, model_config, bad)
        announce(splits.notes, bad)
    torch.manual_seed(train.seed)
    random.seed(train.seed)
    config = replace(model_config, classes=len(splits.train.classes), channels=splits.train.images.shape[1])
    model = AVFusion(config)
    dropout = 0.0 if config.fusion in MODALITIES else data.dropout
    plan = PairPlan(
        splits.train,
        data.noise,
        log_mel(config),
        batch_size=data.batch_size,
        dropout=dropout,
        seed=data.seed,
        drawn=drawn,
    )
    trainer = Trainer(
        model,
        FusionTask(plan, smoothing),
        train,
        out,
        model_config={
            "name": "av_fusion",
            "av_fusion": asdict(config),
            "data": asdict(data),
            "smoothing": smoothing,
            "classes": list(splits.train.classes),
        },
        cpu=cpu,
    )
    trainer.begin(resume)
    console.print(
        f"{config.fusion} fusion, {count_parameters(model) / 1e3:.1f} k parameters, {len(splits.train)} images of "
        f"{config.classes} classes, {plan.steps_per_epoch} steps an epoch, {trainer.device}, "
        f"precision {trainer.config.precision}"
    )
    trainer.fit()
    return trainer, splits


def load_fusion(path: Path) -> tuple[AVFusion, PairDataConfig, list[str]]:
    """Model, data and names of the classes of a run folder or a checkpoint file, ready to evaluate.

    The weights are the averaged ones, where there are any.
    """
    run = load_run(path, "av_fusion")
    with run.fitting():
        model = AVFusion(FusionConfig.from_dict(run.described["av_fusion"]))
        model.load_state_dict(run.weights)
        return model.eval(), PairDataConfig.from_dict(run.described["data"]), run.described["classes"]
