"""Training CLIP by InfoNCE, and loading what a run left behind."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import mmkernels
from models.clip.model import CLIP, PRESETS, ClipConfig, PresetName, TextConfig, trim_padding
from models.clip.text import FrozenText, TextEncoderName, text_reader
from models.common.checkpoint import CheckpointError
from models.common.cli import announce
from models.common.console import console, say, warn
from models.common.engine import Engine
from models.common.runs import load_run
from models.common.schedule import TrainConfig
from models.common.state import differences
from models.common.training import Task, Trainer
from models.data import Batch, BatchPlan, Splits, Tokenizer
from models.data.config import DataConfig, batch_plan, open_data, shard_plan
from models.data.sets import BadDataLog
from models.data.shards.image_text import ShardData, ShardPlan
from models.data.share import ALL, Share


def eager_info_nce(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """What the fused loss replaces: the whole matrix of logits, and two cross-entropies of it."""
    logits = scale * queries @ keys.T
    labels = torch.arange(len(queries), device=queries.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


LossName = Literal["fused", "eager"]

# Captions of each emoji that a frozen text encoder reads: enough for most of its keywords to be met.
FIXED_CAPTIONS = 8


@dataclass
class ClipTask(Task):
    """The contrastive task of :class:`models.common.training.Trainer`.

    Each batch holds B captions and V drawings of each. A caption meets each of its drawings in a loss of its own, so
    that one drawing of an emoji is never a wrong answer for another. ``image_weight`` adds the same loss between two
    drawings.
    """

    plan: BatchPlan | ShardPlan
    loss_name: LossName = "fused"
    image_weight: float = 0.0
    scale_lr: float = 1.0
    accumulate: int = 1  # parts of each batch of the plan, which are encoded one after the other
    share: Share = ALL
    group: dist.ProcessGroup | None = None
    joint = True

    @property
    def samples(self) -> int:  # type: ignore[override]
        """Captions of a step."""
        return self.plan.batch_size

    def batch(self, index: int) -> Batch:
        """The part of an index, or this rank's share of it."""
        step, part = divmod(index, self.accumulate)
        return self.plan(step, replace(self.share, part=part, parts=self.accumulate))

    def divide(self, engine: Engine) -> None:
        """Every rank reads its share of a batch, and the loss spans them all."""
        if self.loss_name == "eager":
            raise NotImplementedError("--loss eager knows the pairs of one process alone; leave it out")
        self.share, self.group = engine.share, engine.group

    def contrast(self, queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
        """Symmetric InfoNCE by the fused kernel, or eagerly."""
        if self.loss_name == "eager":
            return eager_info_nce(queries, keys, scale)
        return mmkernels.info_nce(queries, keys, scale, process_group=self.group)

    def losses(self, views: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
        """The loss of image features [V, B, E] and text features [B, E]."""
        loss = torch.stack([self.contrast(view, texts, scale) for view in views]).mean()
        if self.image_weight and len(views) > 1:
            # The pairs of neighbours in a ring: every drawing once on each side.
            pairs = len(views) if len(views) > 2 else 1
            between = [self.contrast(views[i], views[(i + 1) % len(views)], scale) for i in range(pairs)]
            loss = loss + self.image_weight * torch.stack(between).mean()
        return loss

    def encode(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """The features of a batch's images, [B, V, E], and texts, [B, E], and the scale."""
        views, size = batch.images.shape[:2]
        tokens: Tensor | list[Tensor] = batch.tokens
        drawings = batch.images
        if not batch.tokens.is_floating_point():  # features of a frozen encoder come as they are
            # Four parts in order of length: most captions are short, and one part would pad them to the longest of all.
            order = batch.tokens.argmax(-1).argsort(stable=True)
            # As many on every rank: those of FSDP2 run each block together.
            parts = min(4, self.plan.batch_size // (self.accumulate * self.share.ranks))
            tokens = [trim_padding(part) for part in batch.tokens[order].tensor_split(parts)]
            drawings = drawings[:, order]
        images, texts, scale = model(drawings.flatten(0, 1), tokens)
        return images.unflatten(0, (views, size)).transpose(0, 1), texts, scale

    def loss(self, model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of a batch, with the scale to log."""
        images, texts, scale = self.encode(model, batch)
        # The loss runs in float32 under autocast too: the temperature multiplies rounding errors by up to 100.
        with torch.autocast(images.device.type, enabled=False):
            loss = self.losses(images.transpose(0, 1), texts, scale)
        return loss, {"scale": scale.detach()}

    def joint_gradients(
        self, model: nn.Module, batches: list[Batch], scaled: Callable[[Tensor], Tensor]
    ) -> dict[str, Tensor | float]:
        """The loss of all batches as one, and its gradients, with the activations of one batch at a time."""

        def loss(images: Tensor, texts: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            with torch.autocast(images.device.type, enabled=False):
                value = self.losses(images.transpose(0, 1).contiguous(), texts, scale)
            return scaled(value), value.detach(), scale.detach()

        encode = functools.partial(self.encode, model)
        _, value, scale = mmkernels.contrastive_step(encode, batches, loss, modules=[model])
        return {"loss": value, "scale": scale}

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


def load_clip(path: Path) -> tuple[CLIP, DataConfig, Tokenizer | FrozenText]:
    """The model of a run folder or a checkpoint file, its data, and what reads texts for it.

    Averaged weights are taken where there are any. A frozen text encoder must be the one that the model was trained on.
    """
    run = load_run(path, "clip")
    with run.fitting():
        model = CLIP(ClipConfig.from_dict(run.described["clip"]))
        model.load_state_dict(run.weights)
        data = DataConfig.from_dict(run.described["data"])
        trained_on: dict[str, str] = run.described["text"] if model.config.text.frozen else {}
    reader = text_reader(model.config.text, Path(data.cache_dir))
    if isinstance(reader, FrozenText) and reader.identity != trained_on:
        raise CheckpointError(
            f"{run.path} was trained on another text encoder than the one installed ("
            f"{'; '.join(differences(reader.identity, trained_on))}): install that one, or train again"
        )
    return model.eval(), data, reader


def with_reader(
    preset: PresetName, text_encoder: TextEncoderName, cache_dir: Path
) -> tuple[ClipConfig, Tokenizer | FrozenText]:
    """The config of a preset, and what reads texts for it.

    With a frozen text encoder images and texts meet in its space: the features have its width.
    """
    config = PRESETS[preset]
    if text_encoder == "trained":
        return config, text_reader(config.text, cache_dir)
    reader = text_reader(TextConfig(frozen=text_encoder), cache_dir)
    assert isinstance(reader, FrozenText)
    text = TextConfig(frozen=text_encoder, width=reader.width)
    return replace(config, embed_dim=reader.width, text=text), reader


def clip_trainer(
    preset: PresetName,
    data: DataConfig,
    train: TrainConfig,
    out: Path,
    *,
    text_encoder: TextEncoderName = "trained",
    loss: LossName = "fused",
    image_weight: float = 0.0,
    scale_lr: float = 1.0,
    bad: BadDataLog | None = None,
    resume: bool = True,
    compile_model: bool = False,
    cpu: bool = False,
) -> tuple[Trainer, Splits | ShardData]:
    """Read the data, and make everything ready to train in ``out``, or to go on there."""
    bad = bad if bad is not None else BadDataLog()
    splits = open_data(data, bad)
    announce(splits.notes, bad)
    torch.manual_seed(train.seed)
    random.seed(train.seed)
    config, reader = with_reader(preset, text_encoder, Path(data.cache_dir))
    described: dict[str, Any] = {"name": "clip", "clip": asdict(config), "preset": preset, "loss": loss}
    if isinstance(reader, FrozenText):
        described["text"] = reader.identity
        data = replace(data, fixed_captions=data.fixed_captions or FIXED_CAPTIONS)
    model = CLIP(config).to(memory_format=torch.channels_last)
    whole = replace(data, batch_size=data.batch_size * train.accumulate)
    plan = _plan(splits, whole, reader, config.vision.image_size, bad)
    if isinstance(reader, FrozenText) and isinstance(splits, Splits) and isinstance(plan, BatchPlan):
        found = (splits.train.concepts[concept] for concept in plan.rows)
        names = [concept.name for concept in found if not concept.variant]
        reader.learn(names)
        model.spread_texts(reader(names))
    task = ClipTask(plan, loss, image_weight, scale_lr, train.accumulate)
    trainer = Trainer(
        model,
        task,
        train,
        out,
        model_config=described | {"data": asdict(data)},
        compile_model=compile_model,
        cpu=cpu,
    )
    trainer.begin(resume)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"{preset}: {parameters:.1f} M parameters, text encoder {text_encoder}, {len(splits.train)} images, "
        f"{plan.steps_per_epoch} steps an epoch, {trainer.device}, precision "
        f"{trainer.config.precision}, loss {loss}"
    )
    return trainer, splits


def _plan(
    data: Splits | ShardData, config: DataConfig, reader: Tokenizer | FrozenText, image_size: int, bad: BadDataLog
) -> BatchPlan | ShardPlan:
    if isinstance(data, Splits):
        return batch_plan(data, config, reader, image_size)
    if isinstance(reader, FrozenText):
        raise ValueError(
            f"--text-encoder {reader.name} reads all captions before training, and those of shards are read as it "
            "goes: take --text-encoder trained"
        )
    return shard_plan(data, config, reader, image_size, bad)


def read_ahead(trainer: Trainer, until: float | None = None) -> None:
    """Let a frozen text encoder read all captions before training, until a time at most; see ``FrozenText.learn``."""
    assert isinstance(trainer.task, ClipTask)
    plan = trainer.task.plan
    if not isinstance(plan, BatchPlan) or not isinstance(plan.tokenizer, FrozenText):
        return
    captions = plan.captions()
    began = time.monotonic()
    known = plan.tokenizer.learn(captions, until)
    say(
        f"{plan.tokenizer.name} has read {known} of {len(captions)} captions in {time.monotonic() - began:.0f} s", "dim"
    )


def train_run(
    preset: PresetName, data: DataConfig, train: TrainConfig, out: Path, **options: Any
) -> tuple[Trainer, Splits | ShardData]:
    """Read the data, train, and leave checkpoints and logs in ``out``; the options are :func:`clip_trainer`'s."""
    bad = options.setdefault("bad", BadDataLog())
    trainer, splits = clip_trainer(preset, data, train, out, **options)
    read_ahead(trainer)
    trainer.fit()
    if isinstance(splits, ShardData) and len(bad):
        warn(bad.summary())
    return trainer, splits
