"""Training a captioner until its captions get no better, and loading what a run left behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkernels
from models.captioning.data import CaptionData, build_vocabulary
from models.captioning.model import Captioner, CaptionerConfig, targets_of
from models.captioning.scores import caption_scores
from models.captioning.write import references, write_captions
from models.common.cli import announce
from models.common.console import console
from models.common.runs import load_run
from models.common.schedule import TrainConfig
from models.common.stopping import EarlyStopping
from models.common.training import Task, Trainer
from models.data import BatchPlan, ImageTextSet, Splits, Vocabulary
from models.data.config import batch_plan
from models.data.sets import BadDataLog


def eager_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor, smoothing: float) -> Tensor:
    """What the fused loss replaces: all the logits, stored."""
    return F.cross_entropy(F.linear(hidden, weight, bias), targets, label_smoothing=smoothing)


LossName = Literal["fused", "eager"]


@dataclass
class CaptionBatch:
    """``images`` [B, 3, S, S], ``tokens`` [B, L] with the longest captions first, and the share to sample."""

    images: Tensor
    tokens: Tensor
    lengths: list[int]  # predictions of each caption: its tokens and its end
    sampling: float

    def to(self, device: torch.device) -> CaptionBatch:
        """The same batch on ``device``."""
        return replace(self, images=self.images.to(device), tokens=self.tokens.to(device))


@dataclass
class CaptionTask(Task):
    """The captioning task of :class:`models.common.training.Trainer`.

    The loss is cross-entropy; the share of sampled words grows as training goes on.
    """

    plan: BatchPlan
    steps: int
    loss_name: LossName = "fused"
    sampling: float = 0.0  # the share at the end; it grows from 0 in proportion to the steps
    smoothing: float = 0.0

    def batch(self, index: int) -> CaptionBatch:
        """The batch of an index."""
        batch = self.plan(index)
        tokens = batch.tokens.repeat(len(batch.images), 1)
        lengths = (tokens != Vocabulary.PAD).sum(1) - 1
        order = lengths.argsort(descending=True, stable=True)
        images = batch.images.flatten(0, 1)[order].contiguous(memory_format=torch.channels_last)
        return CaptionBatch(images, tokens[order], lengths[order].tolist(), self.sampling * min(1, index / self.steps))

    def loss(self, model: nn.Module, batch: CaptionBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of a batch, and the share of words guessed right in a sample of it."""
        hidden = model(batch.images, batch.tokens, batch.lengths, batch.sampling)
        assert isinstance(model.embedding, nn.Embedding)
        weight, bias = model.embedding.weight, model.bias
        assert isinstance(bias, Tensor)
        targets = targets_of(batch.tokens, batch.lengths)
        with torch.no_grad():
            sample = torch.arange(0, len(targets), 8, device=targets.device)
            guessed = F.linear(hidden[sample], weight.to(hidden.dtype), bias.to(hidden.dtype)).argmax(-1)
            right = (guessed == targets[sample]).float().mean()
        with torch.autocast(hidden.device.type, enabled=False):
            if self.loss_name == "eager":
                loss = eager_cross_entropy(hidden.float(), weight, targets, bias, self.smoothing)
            else:
                loss = mmkernels.linear_cross_entropy(
                    hidden.float(), weight, targets, bias=bias, label_smoothing=self.smoothing
                )
        return loss, {"words": right}


def validation_score(
    model: Captioner, vocabulary: Vocabulary, data: ImageTextSet, limit: int = 1000
) -> Callable[[dict[str, Tensor]], float]:
    """A function of weights that gives the CIDEr of greedy captions on at most ``limit`` images of a set."""
    if len(data) < 2:
        raise ValueError(f"CIDEr needs two images or more to validate on; got {len(data)}")
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:limit]
    part = data.select(rows.sort().values)
    scored = copy.deepcopy(model)

    def score(weights: dict[str, Tensor]) -> float:
        scored.load_state_dict(weights)
        texts = [written.text for written in write_captions(scored, vocabulary, part.images)]
        return caption_scores(texts, references(part)).cider

    return score


def train_run(
    config: CaptionerConfig,
    data: CaptionData,
    train: TrainConfig,
    out: Path,
    *,
    loss: LossName = "fused",
    sampling: float = 0.25,
    smoothing: float = 0.1,
    evaluate_every: int = 200,
    patience: int = 5,
    bad: BadDataLog | None = None,
    resume: bool = True,
    cpu: bool = False,
) -> tuple[Trainer, Splits]:
    """Read the data, train, and leave checkpoints, logs and the best weights in ``out``."""
    bad = bad if bad is not None else BadDataLog()
    splits = data.load(bad)
    announce(splits.notes, bad)
    torch.manual_seed(train.seed)
    random.seed(train.seed)
    vocabulary = build_vocabulary(splits.train, data.min_count)
    model = Captioner(config, len(vocabulary)).to(memory_format=torch.channels_last)
    plan = batch_plan(splits, data, vocabulary, config.image_size)
    trainer = Trainer(
        model,
        CaptionTask(plan, train.steps * train.accumulate, loss, sampling, smoothing),
        train,
        out,
        model_config={
            "name": "captioning",
            "captioner": asdict(config),
            "data": asdict(data),
            "vocabulary": {"tokens": vocabulary.tokens, "max_length": vocabulary.max_length},
            "loss": loss,
            "sampling": sampling,
            "smoothing": smoothing,
        },
        cpu=cpu,
    )
    trainer.begin(resume)
    assert splits.validation is not None
    stopping = EarlyStopping(validation_score(model, vocabulary, splits.validation), evaluate_every, patience)
    stopping.start(trainer)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"{parameters:.1f} M parameters, {len(vocabulary)} words, {len(splits.train)} images of {len(plan.rows)} "
        f"captions, {plan.steps_per_epoch} steps an epoch, {trainer.device}, precision {trainer.config.precision}, "
        f"loss {loss}"
    )
    trainer.fit(stopping)
    return trainer, splits


def load_captioner(path: Path) -> tuple[Captioner, Vocabulary, CaptionData]:
    """The best model of a run folder, or that of a checkpoint file, with its vocabulary, ready to write."""
    run = load_run(path, "captioning")
    with run.fitting():
        vocabulary = Vocabulary(run.described["vocabulary"]["tokens"], run.described["vocabulary"]["max_length"])
        model = Captioner(CaptionerConfig.from_dict(run.described["captioner"]), len(vocabulary))
        model.load_state_dict(run.weights)
        return model.eval(), vocabulary, CaptionData.from_dict(run.described["data"])
