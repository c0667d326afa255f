"""Training CLIP by InfoNCE, and loading what a run left behind."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkernels
from models.clip.model import CLIP, PRESETS, ClipConfig, PresetName, trim_padding
from models.common.cli import announce
from models.common.console import console
from models.common.runs import load_run
from models.common.training import Task, TrainConfig, Trainer
from models.data import Batch, BatchPlan, Splits, Tokenizer
from models.data.config import DataConfig, batch_plan, load_data
from models.data.sets import BadDataLog


def eager_info_nce(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """What the fused loss replaces: the whole matrix of logits, and two cross-entropies of it."""
    logits = scale * queries @ keys.T
    labels = torch.arange(len(queries), device=queries.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


LossName = Literal["fused", "eager"]


@dataclass
class ClipTask(Task):
    """The contrastive task of :class:`models.common.training.Trainer`.

    Each batch holds B captions and V drawings of each. A caption meets each of its drawings in a loss of its own, so
    that one drawing of an emoji is never a wrong answer for another. ``image_weight`` adds the same loss between two
    drawings.
    """

    plan: BatchPlan
    loss_name: LossName = "fused"
    image_weight: float = 0.0
    scale_lr: float = 1.0

    def batch(self, index: int) -> Batch:
        """The batch of an index."""
        return self.plan(index)

    def contrast(self, queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        """Symmetric InfoNCE by the fused kernel, or eagerly."""
        if self.loss_name == "eager":
            return eager_info_nce(queries, keys, scale)
        return mmkernels.info_nce(queries, keys, scale)

    def losses(self, views: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        """The loss of image features [V, B, E] and text features [B, E]."""
        loss = torch.stack([self.contrast(view, texts, scale) for view in views]).mean()
        if self.image_weight and len(views) > 1:
            # The pairs of neighbours in a ring: every drawing once on each side.
            pairs = len(views) if len(views) > 2 else 1
            between = [self.contrast(views[i], views[(i + 1) % len(views)], scale) for i in range(pairs)]
            loss = loss + self.image_weight * torch.stack(between).mean()
        return loss

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of a batch, with the scale to log."""
        views, size = batch.images.shape[:2]
        # Four parts in order of length: most captions are short, and one part would pad them to the longest of all.
        order = batch.tokens.argmax(-1).argsort(stable=True)
        parts = [trim_padding(part) for part in batch.tokens[order].chunk(4)]
        images, texts, scale = model(batch.images[:, order].flatten(0, 1), parts)
        # The loss runs in float32 under autocast too: the temperature multiplies rounding errors by up to 100.
        with torch.autocast(images.device.type, enabled=False):
            loss = self.losses(images.unflatten(0, (views, size)), texts, scale)
        return loss, {"scale": scale.detach()}

    def after_step(self, model: nn.Module) -> None:
        """Clamp the temperature."""
        assert isinstance(model, CLIP)
        model.clamp_scale()

    def param_groups(self, model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
        """Decay on matrices alone; the temperature has a learning rate of its own."""
        assert isinstance(model, CLIP)
        decayed, plain = super().param_groups(model, config)
        plain["params"] = [p for p in plain["params"] if p is not model.logit_scale]
        scale = {"params": [model.logit_scale], "weight_decay": 0.0, "lr_scale": self.scale_lr}
        return [decayed, plain, scale]


def load_clip(path: Path) -> tuple[CLIP, DataConfig]:
    """The model of a run folder or a checkpoint file, with averaged weights where there are any, ready to evaluate."""
    run = load_run(path, "clip")
    with run.fitting():
        model = CLIP(ClipConfig.from_dict(run.described["clip"]))
        model.load_state_dict(run.weights)
        return model.eval(), DataConfig.from_dict(run.described["data"])


def train_run(
    preset: PresetName,
    data: DataConfig,
    train: TrainConfig,
    out: Path,
    *,
    loss: LossName = "fused",
    image_weight: float = 0.0,
    scale_lr: float = 1.0,
    bad: BadDataLog | None = None,
    resume: bool = True,
    compile_model: bool = False,
    cpu: bool = False,
) -> tuple[Trainer, Splits]:
    """Read the data, train, and leave checkpoints and logs in ``out``."""
    bad = bad if bad is not None else BadDataLog()
    splits = load_data(data, bad)
    announce(splits.notes, bad)
    torch.manual_seed(train.seed)
    random.seed(train.seed)
    config = PRESETS[preset]
    model = CLIP(config).to(memory_format=torch.channels_last)
    tokenizer = Tokenizer(config.text.context_length, config.text.vocab_size)
    plan = batch_plan(splits, data, tokenizer, config.vision.image_size)
    task = ClipTask(plan, loss, image_weight, scale_lr)
    trainer = Trainer(
        model,
        task,
        train,
        out,
        model_config={"name": "clip", "clip": asdict(config), "data": asdict(data), "preset": preset, "loss": loss},
        compile_model=compile_model,
        cpu=cpu,
    )
    trainer.begin(resume)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"{preset}: {parameters:.1f} M parameters, {len(splits.train)} images of {len(plan.rows)} captions, "
        f"{plan.steps_per_epoch} steps an epoch, {trainer.device}, precision {trainer.config.precision}, loss {loss}"
    )
    trainer.fit()
    return trainer, splits
