"""Training a retrieval model by a triplet loss, InfoNCE or SigLIP, and loading what a run left behind."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import mmkernels
from models.common.cli import announce
from models.common.console import console
from models.common.runs import load_run
from models.common.schedule import TrainConfig
from models.common.stopping import EarlyStopping
from models.common.training import Task, Trainer
from models.data import Batch, BatchPlan, ImageTextSet, Splits, Subwords
from models.data.config import batch_plan
from models.data.sets import BadDataLog
from models.retrieval.data import RetrievalData, learn_tokens
from models.retrieval.evaluate import retriever_encoder, spoken_retrieval
from models.retrieval.model import LossName, Retriever, RetrieverConfig

Mining = Literal["all", "hardest", "semi_hard"]


@dataclass(frozen=True)
class LossConfig:
    """Which loss; margin and mining are the triplet's.

    From random weights the hardest negatives pull all features to one point, where the loss is the margin and stays so
    (VSE++), unless they are centred. ``mining_warmup`` steps with all negatives come first, then ``mining``.
    """

    name: LossName = field(default="triplet", metadata={"help": "Loss.", "name": "--loss"})
    mining: Mining = field(default="hardest", metadata={"help": "Negatives of the triplet loss."})
    margin: float = field(
        default=0.2, metadata={"help": "By how much the right answer has to win (triplet).", "min": 0}
    )
    mining_warmup: int = field(default=0, metadata={"help": "Steps with all negatives first (triplet).", "min": 0})

    def mining_at(self, step: int) -> Mining:
        """The mining of a step."""
        return "all" if step < self.mining_warmup else self.mining


@dataclass
class RetrievalBatch:
    """A batch, and how its negatives are mined."""

    data: Batch
    mining: Mining

    def to(self, device: torch.device) -> RetrievalBatch:
        """The same batch on ``device``."""
        return replace(self, data=self.data.to(device))


@dataclass
class RetrievalTask(Task):
    """The retrieval task of :class:`models.common.training.Trainer`.

    Each batch holds B concepts with V drawings and T captions each. Every drawing of a concept meets every caption of
    it in a loss of its own, so that no caption of a concept is a wrong answer for it.
    """

    plan: BatchPlan
    config: LossConfig
    accumulate: int = 1

    def batch(self, index: int) -> RetrievalBatch:
        """The batch of an index."""
        return RetrievalBatch(self.plan(index), self.config.mining_at(index // self.accumulate))

    def contrast(self, model: nn.Module, images: Tensor, texts: Tensor, mining: Mining) -> Tensor:
        """The loss of unit features [B, E], row by row of one concept."""
        if self.config.name == "triplet":
            return mmkernels.triplet(images, texts, margin=self.config.margin, mining=mining)
        assert isinstance(model.logit_scale, Tensor)
        if self.config.name == "info_nce":
            return mmkernels.info_nce(images, texts, model.logit_scale.exp())
        assert isinstance(model.logit_bias, Tensor)
        return mmkernels.siglip(images, texts, model.logit_scale.exp(), model.logit_bias)

    def loss(self, model: nn.Module, batch: RetrievalBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """The loss of a batch, and how many of its images find their caption among the batch's."""
        views, size = batch.data.images.shape[:2]
        images, texts = model(batch.data.images.flatten(0, 1), batch.data.tokens)
        images, texts = images.unflatten(0, (views, size)), texts.unflatten(0, (-1, size))
        # The loss runs in float32 under autocast too: margins are as small as the rounding errors of bfloat16.
        with torch.autocast(images.device.type, enabled=False):
            pairs = [self.contrast(model, i, t, batch.mining) for i in images for t in texts]
            found = (mmkernels.retrieval_ranks(images[0].detach(), texts[0].detach()) == 0).float().mean()
        return torch.stack(pairs).mean(), {"r1": found}

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """Keep the logit scale, where there is one, between 1 and 100, as CLIP does."""
        if isinstance(model.logit_scale, Tensor):
            model.logit_scale.clamp_(0, math.log(100))


def validation_score(
    model: Retriever, tokens: Subwords, data: ImageTextSet, limit: int
) -> Callable[[dict[str, Tensor]], float]:
    """A function of weights that gives the mean R@1 of both directions and all languages on a set's base gallery."""
    scored, gallery = copy.deepcopy(model), data.gallery(limit=limit, variants=False)

    def score(weights: dict[str, Tensor]) -> float:
        scored.load_state_dict(weights)
        found = spoken_retrieval(retriever_encoder(scored, tokens), gallery)
        values = [way["model"]["r1"] for entry in found.values() for way in entry["ways"].values()]
        return sum(values) / len(values)

    return score


def train_run(
    config: RetrieverConfig,
    data: RetrievalData,
    train: TrainConfig,
    loss: LossConfig,
    out: Path,
    *,
    splits: Splits | None = None,
    evaluate_every: int = 100,
    patience: int | None = None,
    bad: BadDataLog | None = None,
    resume: bool = True,
    cpu: bool = False,
) -> tuple[Trainer, Splits]:
    """Read the data (unless ``splits`` has it already), train, and leave checkpoints and logs in ``out``.

    Where the data has a validation set the best weights are kept, and ``patience`` evaluations without better ones end
    the run.
    """
    if splits is None:
        bad = bad if bad is not None else BadDataLog()
        splits = data.load(bad)
        announce(splits.notes, bad)
    torch.manual_seed(train.seed)
    random.seed(train.seed)
    tokens = learn_tokens(splits.train, config)
    model = Retriever(config, len(tokens), loss.name).to(memory_format=torch.channels_last)
    plan = batch_plan(splits, data, tokens, config.image_size, texts=data.texts)
    trainer = Trainer(
        model,
        RetrievalTask(plan, loss, train.accumulate),
        train,
        out,
        model_config={
            "name": "retrieval",
            "retriever": asdict(config),
            "data": asdict(data),
            "tokens": tokens.state,
            "loss": asdict(loss),
        },
        cpu=cpu,
    )
    trainer.begin(resume)
    stopping = None
    if splits.validation is not None:
        score = validation_score(model, tokens, splits.validation, splits.gallery_limit)
        stopping = EarlyStopping(score, evaluate_every, patience if patience is not None else train.steps)
        stopping.start(trainer)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    mined = f", {loss.mining} mining, margin {loss.margin}" if loss.name == "triplet" else ""
    console.print(
        f"{parameters:.1f} M parameters, {len(tokens)} tokens, {len(splits.train)} images of {len(plan.rows)} "
        f"concepts, {plan.steps_per_epoch} steps an epoch, {trainer.device}, precision {trainer.config.precision}, "
        f"loss {loss.name}{mined}"
    )
    trainer.fit(stopping)
    return trainer, splits


def load_retriever(path: Path) -> tuple[Retriever, Subwords, RetrievalData]:
    """The model of a run folder or a checkpoint file with its tokens, ready to evaluate; the best weights, if any."""
    run = load_run(path, "retrieval")
    with run.fitting():
        config = RetrieverConfig.from_dict(run.described["retriever"])
        tokens = Subwords(run.described["tokens"], config.max_tokens)
        model = Retriever(config, len(tokens), run.described["loss"]["name"])
        model.load_state_dict(run.weights)
        return model.eval(), tokens, RetrievalData.from_dict(run.described["data"])
