"""Cross-modal retrieval: images and captions in several languages in one space, trained by a triplet loss.

    python -m models.retrieval train --data emoji --out runs/retrieval
    python -m models.retrieval eval runs/retrieval
    python -m models.retrieval search "smiling cat" "lachende Katze" --run runs/retrieval --out found.png
    python -m models.retrieval compare --out runs/compare

The model follows VSE++ (Faghri et al. 2018, arXiv:1707.05612): a convolutional image encoder, a text encoder (a bag of
tokens, a GRU or a Transformer), and `mmkernels.triplet` on the cosines of a batch, with all negatives, the hardest one,
or the hardest of those that are no harder than the right answer. InfoNCE and SigLIP train the same encoders.
"""

from __future__ import annotations

import copy
import json
import math
import random
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import mmkernels
from models.cli import (
    BadChoice,
    BadOption,
    Precision,
    PrecisionOption,
    Resume,
    ResumeOption,
    announce,
    bad_log,
    pick_precision,
    run_app,
)
from models.data import Batch, BatchPlan, ImageTextSet, Splits, Subwords
from models.data.config import DataConfig, batch_plan, load_data, pick_styles
from models.data.sets import BadDataLog
from models.layers import Transformer, conv_stages
from models.training import (
    EarlyStopping,
    Task,
    TrainConfig,
    Trainer,
    clear_run,
    console,
    load_run,
    read_history,
)

# --- the model -------------------------------------------------------------------------------------------------------

TextEncoderName = Literal["bag", "gru", "transformer"]


@dataclass(frozen=True)
class RetrieverConfig:
    """A retrieval model. The image encoder has a stage for each of ``widths``; each halves the side of the image.

    ``centred`` puts a batch norm without parameters behind each projection: the features of fresh encoders all point to
    nearly one side, and a loss on cosines first has to undo that.
    """

    image_size: int = 48
    widths: tuple[int, ...] = (32, 64, 128, 256)
    depths: tuple[int, ...] = (0, 1, 1, 1)
    text: TextEncoderName = "gru"
    text_width: int = 256
    text_layers: int = 2  # of the Transformer
    text_heads: int = 4
    vocab_size: int = 8192
    max_tokens: int = 32
    embed_dim: int = 256
    centred: bool = True

    @staticmethod
    def from_dict(values: dict[str, Any]) -> RetrieverConfig:
        """The config that :func:`dataclasses.asdict` made ``values`` from (JSON's lists become tuples again)."""
        restored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return RetrieverConfig(**restored)


PRESETS: dict[str, RetrieverConfig] = {
    # For tests.
    "nano": RetrieverConfig(
        32, (16, 32, 32), (0, 0, 0), text_width=32, text_layers=1, text_heads=2, vocab_size=512, embed_dim=32
    ),
    # What two CPU cores train in a quarter of an hour.
    "small": RetrieverConfig(),
    # Photographs.
    "base": RetrieverConfig(
        224,
        (64, 128, 256, 512, 512),
        (1, 1, 2, 2, 1),
        text_width=512,
        text_layers=4,
        text_heads=8,
        vocab_size=16384,
        embed_dim=512,
    ),
}


def lengths_of(tokens: Tensor) -> Tensor:
    """The tokens of each row [B, L], padding left out."""
    return (tokens != Subwords.PAD).sum(1)


class BagEncoder(nn.Module):
    """The mean of the tokens' embeddings: no order."""

    def __init__(self, config: RetrieverConfig, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(vocabulary, config.text_width, mode="mean", padding_idx=Subwords.PAD)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, C]."""
        return self.embedding(tokens)


class GRUEncoder(nn.Module):
    """A GRU in each direction, read where it has seen the whole text."""

    def __init__(self, config: RetrieverConfig, vocabulary: int) -> None:
        super().__init__()
        width = config.text_width
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=Subwords.PAD)
        self.gru = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, C]."""
        # In float32 also under autocast: rounding would add up over the steps.
        with torch.autocast(tokens.device.type, enabled=False):
            packed = nn.utils.rnn.pack_padded_sequence(
                self.embedding(tokens), lengths_of(tokens).cpu(), batch_first=True, enforce_sorted=False
            )
            _, last = self.gru(packed)
        return last.transpose(0, 1).flatten(1)


class TransformerEncoder(nn.Module):
    """A causal Transformer, read at the end token."""

    def __init__(self, config: RetrieverConfig, vocabulary: int) -> None:
        super().__init__()
        width = config.text_width
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=Subwords.PAD)
        self.position_embedding = nn.Parameter(0.01 * torch.randn(config.max_tokens, width))
        self.transformer = Transformer(width, config.text_layers, config.text_heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, C]."""
        # In order of length, in four parts: most captions are short, and would be padded to the longest of all.
        lengths, order = lengths_of(tokens).sort()
        pooled = []
        for rows, own in zip(tokens[order].chunk(4), lengths.chunk(4), strict=True):
            part = rows[:, : int(own[-1])]
            x = self.transformer(self.embedding(part) + self.position_embedding[: part.shape[1]], causal=True)
            pooled.append(self.norm(x[torch.arange(len(x), device=x.device), own - 1]))
        return torch.cat(pooled)[order.argsort()]


TEXT_ENCODERS: dict[TextEncoderName, Callable[[RetrieverConfig, int], nn.Module]] = {
    "bag": BagEncoder,
    "gru": GRUEncoder,
    "transformer": TransformerEncoder,
}


class ImageEncoder(nn.Module):
    """A small convolutional network; its last map is read place by place, which keeps what is where."""

    def __init__(self, config: RetrieverConfig) -> None:
        super().__init__()
        stride = 2 ** len(config.widths)
        if config.image_size % stride:
            raise ValueError(f"image_size {config.image_size} is not a multiple of the encoder's stride, {stride}")
        self.stages = conv_stages(3, config.widths, config.depths)
        self.projection = nn.Linear(config.widths[-1] * (config.image_size // stride) ** 2, config.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> [B, E]."""
        return self.projection(self.stages(images).flatten(1))


class Retriever(nn.Module):
    """Both encoders, and the numbers that InfoNCE and SigLIP learn beside them."""

    def __init__(self, config: RetrieverConfig, vocabulary: int, loss: LossConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageEncoder(config)
        self.text = TEXT_ENCODERS[config.text](config, vocabulary)
        self.text_projection = nn.Linear(config.text_width, config.embed_dim)
        if config.centred:
            self.image_norm = nn.BatchNorm1d(config.embed_dim, affine=False)
            self.text_norm = nn.BatchNorm1d(config.embed_dim, affine=False)
        assert isinstance(self.text.embedding, nn.Embedding | nn.EmbeddingBag)
        nn.init.normal_(self.text.embedding.weight, std=0.02)
        # The logarithm of the logit scale, as in CLIP, and SigLIP's bias; each paper's own start.
        scale = {"info_nce": 1 / 0.07, "siglip": 10.0}.get(loss.name)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale))) if scale is not None else None
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if loss.name == "siglip" else None

    def encode_image(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> unit features [B, E]."""
        features = self.image(images).float()
        return F.normalize(self.image_norm(features) if self.config.centred else features, dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> unit features [B, E]."""
        features = self.text_projection(self.text(tokens)).float()
        return F.normalize(self.text_norm(features) if self.config.centred else features, dim=-1)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features of images and texts."""
        return self.encode_image(images), self.encode_text(tokens)


# --- training --------------------------------------------------------------------------------------------------------

LossName = Literal["triplet", "info_nce", "siglip"]
Mining = Literal["all", "hardest", "semi_hard"]


@dataclass(frozen=True)
class LossConfig:
    """Which loss; margin and mining are the triplet's.

    From random weights the hardest negatives pull all features to one point, where the loss is the margin and stays so
    (VSE++), unless they are centred. ``mining_warmup`` steps with all negatives come first, then ``mining``.
    """

    name: LossName = "triplet"
    mining: Mining = "hardest"
    margin: float = 0.2
    mining_warmup: int = 0

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
    """The retrieval task of :class:`models.training.Trainer`.

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
        # Features and loss in float32, also under autocast: margins are as small as its rounding errors.
        with torch.autocast(images.device.type, enabled=False):
            pairs = [self.contrast(model, i, t, batch.mining) for i in images for t in texts]
            found = (mmkernels.retrieval_ranks(images[0].detach(), texts[0].detach()) == 0).float().mean()
        return torch.stack(pairs).mean(), {"r1": found}

    @torch.no_grad()
    def after_step(self, model: nn.Module) -> None:
        """Keep the logit scale, where there is one, between 1 and 100, as CLIP does."""
        if isinstance(model.logit_scale, Tensor):
            model.logit_scale.clamp_(0, math.log(100))


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass
class RetrievalData(DataConfig):
    """Which data a retrieval model trains on; the names of a concept in all languages are captions of it."""

    batch_size: int = 512
    views: int = 1
    texts: int = 2
    variant_divisor: int = 20
    keyword_share: float = 0.4
    augment: float = 0.5
    languages: tuple[str, ...] = ("en", "de", "fr", "es")

    def load(self, bad: BadDataLog) -> Splits:
        """Read the data."""
        return load_data(self, bad, languages=self.languages)


def learn_tokens(data: ImageTextSet, config: RetrieverConfig) -> Subwords:
    """Tokens from the captions and keywords of a training set, in all its languages."""
    concepts = [data.concepts[c] for c in data.concept_ids.unique().tolist()]
    texts = (text for c in concepts for text in (*c.texts, *c.keywords))
    return Subwords.build(texts, vocab_size=config.vocab_size, max_tokens=config.max_tokens)


def validation_score(
    model: Retriever, tokens: Subwords, data: ImageTextSet, limit: int
) -> Callable[[dict[str, Tensor]], float]:
    """A function of weights that gives the mean R@1 of both directions and all languages on a set's base gallery."""
    from models.retrieval_eval import retriever_encoder, spoken_retrieval

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
    model = Retriever(config, len(tokens), loss).to(memory_format=torch.channels_last)
    plan = batch_plan(splits, data, tokens, config.image_size, texts=data.texts)
    if not resume:
        clear_run(out)
    trainer = Trainer(
        model,
        RetrievalTask(plan, loss, train.accumulate),
        train,
        out,
        model_config={
            "retriever": asdict(config),
            "data": asdict(data),
            "tokens": tokens.state,
            "loss": asdict(loss),
        },
        cpu=cpu,
    )
    if resume:
        trainer.resume()
    stopping = None
    if splits.validation is not None:
        score = validation_score(model, tokens, splits.validation, splits.gallery_limit)
        stopping = EarlyStopping(score, evaluate_every, patience if patience is not None else train.steps)
        stopping.start(trainer)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    mined = f", {loss.mining} mining, margin {loss.margin}" if loss.name == "triplet" else ""
    console.print(
        f"{parameters:.1f} M parameters, {len(tokens)} tokens, {len(splits.train)} images of {len(plan.rows)} "
        f"concepts, {plan.steps_per_epoch} steps an epoch, {trainer.device}, precision {train.precision}, "
        f"loss {loss.name}{mined}"
    )
    trainer.fit(stopping)
    return trainer, splits


def load_retriever(path: Path) -> tuple[Retriever, Subwords, RetrievalData]:
    """The model of a run folder or a checkpoint file with its tokens, ready to evaluate; the best weights, if any."""
    weights, described = load_run(path, f"python -m models.retrieval train --out {path}")
    config = RetrieverConfig.from_dict(described["retriever"])
    tokens = Subwords(described["tokens"], config.max_tokens)
    model = Retriever(config, len(tokens), LossConfig(**described["loss"]))
    model.load_state_dict(weights)
    return model.eval(), tokens, RetrievalData.from_dict(described["data"])


# --- the command line ------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train, compare and search by retrieval models.")


class Preset(str, Enum):
    """Model sizes."""

    nano = "nano"
    small = "small"
    base = "base"


class TextChoice(str, Enum):
    """Text encoders."""

    bag = "bag"
    gru = "gru"
    transformer = "transformer"


class LossChoice(str, Enum):
    """Losses."""

    triplet = "triplet"
    info_nce = "info_nce"
    siglip = "siglip"


class MiningChoice(str, Enum):
    """Which negatives a triplet loss sees."""

    all = "all"
    hardest = "hardest"
    semi_hard = "semi_hard"


def pick_languages(choice: str) -> tuple[str, ...]:
    """The languages a list with commas names."""
    found = tuple(dict.fromkeys(code.strip().lower() for code in choice.split(",") if code.strip()))
    if not found:
        raise ValueError(f"--languages {choice!r}: expected codes with commas between them, such as en,de,fr")
    return found


DataSource = Annotated[str, typer.Option(help="'emoji', 'synthetic', or a folder with a captions file.")]
PresetOption = Annotated[Preset, typer.Option(help="Model size.")]
TextOption = Annotated[TextChoice, typer.Option(help="Text encoder.")]
StylesOption = Annotated[str, typer.Option(help="Styles to train on, with commas, or 'all' (emoji).")]
ValidationOption = Annotated[str, typer.Option(help="Style kept to choose weights and settings on (emoji).")]
LanguagesOption = Annotated[str, typer.Option(help="Languages of the names, with commas (emoji, synthetic).")]
StepsOption = Annotated[int, typer.Option(min=1)]
BatchOption = Annotated[int, typer.Option(min=2, help="Concepts in a batch.")]
ViewsOption = Annotated[int, typer.Option(min=1, help="Images of each concept in a batch.")]
TextsOption = Annotated[int, typer.Option(min=1, help="Captions of each concept in a batch.")]
RateOption = Annotated[float, typer.Option(min=0)]
WarmupOption = Annotated[int, typer.Option(min=0)]
EmaOption = Annotated[float, typer.Option(min=0, max=1, help="Decay of the weight average; 0: none.")]
MarginOption = Annotated[float, typer.Option(min=0, help="By how much the right answer has to win (triplet).")]
KeywordOption = Annotated[float, typer.Option(min=0, max=1, help="Share of captions with keywords.")]
DivisorOption = Annotated[int, typer.Option(min=1, help="One in so many variants an epoch.")]
AugmentOption = Annotated[float, typer.Option(min=0, help="Strength of the augmentation.")]
EveryOption = Annotated[int, typer.Option(min=1, help="Steps between R@1 on the validation set, if there is one.")]
CpuOption = Annotated[bool, typer.Option("--cpu", help="Use the CPU even where there is a GPU.")]
STYLES, LANGUAGES = ",".join(DataConfig.styles), ",".join(RetrievalData.languages)


def data_config(
    config: RetrieverConfig, source: str, styles: str, validation_style: str, languages: str, **shown: Any
) -> RetrievalData:
    """The data that the options of the command line name; ``shown`` are further fields, as they are."""
    return RetrievalData(
        source=source,
        styles=pick_styles(styles, validation_style) if source == "emoji" else (),
        validation_style=validation_style or None,
        stored_size=config.image_size,
        languages=pick_languages(languages),
        **shown,
    )


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Run folder: checkpoints, logs, pictures.")] = Path("runs/retrieval"),
    data: DataSource = "emoji",
    preset: PresetOption = Preset.small,
    text: TextOption = TextChoice.gru,
    centred: Annotated[
        bool, typer.Option(help="A batch norm behind each projection, so that features start apart.")
    ] = (RetrieverConfig.centred),
    loss: Annotated[LossChoice, typer.Option(help="Loss.")] = LossChoice.triplet,
    mining: Annotated[MiningChoice, typer.Option(help="Negatives of the triplet loss.")] = MiningChoice.hardest,
    margin: MarginOption = LossConfig.margin,
    mining_warmup: Annotated[
        int, typer.Option(min=0, help="Steps with all negatives first (triplet).")
    ] = LossConfig.mining_warmup,
    styles: StylesOption = STYLES,
    validation_style: ValidationOption = "",
    languages: LanguagesOption = LANGUAGES,
    steps: StepsOption = 1000,
    minutes: Annotated[float | None, typer.Option(help="End in this time, the decay of the rate fitted to it.")] = None,
    batch_size: BatchOption = RetrievalData.batch_size,
    views: ViewsOption = RetrievalData.views,
    texts: TextsOption = RetrievalData.texts,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of an optimiser step.")] = 1,
    lr: RateOption = 2e-3,
    warmup: WarmupOption = 60,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.05,
    clip: Annotated[float, typer.Option(min=0, help="Largest norm of the gradient.")] = 1.0,
    ema: EmaOption = 0.0,
    keyword_share: KeywordOption = RetrievalData.keyword_share,
    variant_divisor: DivisorOption = RetrievalData.variant_divisor,
    augment: AugmentOption = RetrievalData.augment,
    evaluate_every: EveryOption = 100,
    patience: Annotated[int | None, typer.Option(min=1, help="Stop after so many without a better one.")] = None,
    precision: PrecisionOption = Precision.auto,
    on_bad_data: BadOption = BadChoice.skip,
    resume: ResumeOption = Resume.auto,
    checkpoint_every: Annotated[int, typer.Option(min=1)] = 200,
    seed: int = 0,
    cpu: CpuOption = False,
) -> None:
    """Train a model; the same command goes on where a killed run stopped."""
    config = replace(PRESETS[preset.value], text=text.value, centred=centred)
    source = data_config(
        config,
        data,
        styles,
        validation_style,
        languages,
        batch_size=batch_size,
        views=views,
        texts=texts,
        variant_divisor=variant_divisor,
        keyword_share=keyword_share,
        augment=augment,
        seed=seed,
    )
    schedule = TrainConfig(
        steps=steps,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        clip=clip,
        accumulate=accumulate,
        precision=pick_precision(precision.value),
        ema=ema,
        seed=seed,
        minutes=minutes,
        checkpoint_every=checkpoint_every,
    )
    train_run(
        config,
        source,
        schedule,
        LossConfig(loss.value, mining.value, margin, mining_warmup),
        out,
        evaluate_every=evaluate_every,
        patience=patience,
        bad=bad_log(on_bad_data),
        resume=resume is Resume.auto,
        cpu=cpu,
    )
    console.print(f"trained; next: python -m models.retrieval eval {out}", highlight=False)


def _data_of(run: RetrievalData, other: str, languages: str) -> RetrievalData:
    return replace(run, source=other or run.source, languages=pick_languages(languages) if languages else run.languages)


OtherData = Annotated[str, typer.Option(help="Other data than the run was trained on.")]
OtherLanguages = Annotated[str, typer.Option(help="Other languages than the run was trained on, with commas.")]


@app.command(name="eval")
def eval_command(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder or a checkpoint file.")],
    data: OtherData = "",
    languages: OtherLanguages = "",
    out: Annotated[Path | None, typer.Option(help="Where report and pictures go; default: the run folder.")] = None,
    validation: Annotated[bool, typer.Option("--validation", help="The validation set, not the test sets.")] = False,
    on_bad_data: BadOption = BadChoice.skip,
) -> None:
    """Retrieval both ways and in each language on every test set, with tables, a JSON report and pictures."""
    from models.retrieval_eval import evaluate_run, retriever_encoder

    model, tokens, run = load_retriever(checkpoint)
    bad = bad_log(on_bad_data)
    splits = _data_of(run, data, languages).load(bad)
    announce(splits.notes, bad)
    folder = out or (checkpoint if checkpoint.is_dir() else checkpoint.parent)
    evaluate_run(retriever_encoder(model, tokens), splits, folder, validation=validation)


@app.command()
def search(
    queries: Annotated[list[str], typer.Argument(help="Texts in any of the languages that the run was trained on.")],
    run: Annotated[Path, typer.Option(help="A run folder or a checkpoint file.")] = Path("runs/retrieval"),
    data: OtherData = "",
    top: Annotated[int, typer.Option(min=1, help="Images for each query.")] = 8,
    variants: Annotated[bool, typer.Option("--variants", help="Search variants (skin tones), too.")] = False,
    out: Annotated[Path, typer.Option(help="Where the contact sheet goes.")] = Path("search.png"),
    on_bad_data: BadOption = BadChoice.skip,
) -> None:
    """Find the best images for texts in the first test set, in a style that training never saw."""
    from rich.table import Table

    from models.plots import contact_sheet
    from models.retrieval_eval import best_images, retriever_encoder

    if blank := [query for query in queries if not query.strip()]:
        raise ValueError(f"a query must hold a word; got {blank[0]!r}")
    model, tokens, trained = load_retriever(run)
    bad = bad_log(on_bad_data)
    splits = _data_of(trained, data, "").load(bad)
    announce([], bad)
    name, found = next(iter(splits.tests.items())) if splits.tests else ("train", splits.train)
    gallery = found.gallery(variants=variants)
    scores, rows = best_images(retriever_encoder(model, tokens), gallery, queries, top)
    sheet = []
    for query, own, picked in zip(queries, scores, rows, strict=True):
        part = gallery.select(picked)
        table = Table(title=f"{query} in {len(gallery)} of {name}")
        table.add_column("cosine", justify="right")
        table.add_column("caption of the image")
        for score, caption in zip(own.tolist(), part.names(), strict=True):
            table.add_row(f"{score:.3f}", caption)
        console.print(table)
        sheet.append((query, part, own))
    out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(sheet, out)
    console.print(f"written: {out}", highlight=False, soft_wrap=True)


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="Folder of the runs, the table and the plot.")] = Path("runs/compare"),
    data: DataSource = "emoji",
    preset: PresetOption = Preset.small,
    text: TextOption = TextChoice.gru,
    margin: MarginOption = LossConfig.margin,
    mining_warmup: Annotated[
        int | None, typer.Option(min=1, help="Steps with all negatives first, of the run that has them; default: 1/4.")
    ] = None,
    styles: StylesOption = STYLES,
    validation_style: ValidationOption = "",
    languages: LanguagesOption = LANGUAGES,
    steps: StepsOption = 500,
    batch_size: BatchOption = RetrievalData.batch_size,
    views: ViewsOption = RetrievalData.views,
    texts: TextsOption = RetrievalData.texts,
    lr: RateOption = 2e-3,
    warmup: WarmupOption = 60,
    ema: EmaOption = 0.0,
    keyword_share: KeywordOption = RetrievalData.keyword_share,
    variant_divisor: DivisorOption = RetrievalData.variant_divisor,
    augment: AugmentOption = RetrievalData.augment,
    evaluate_every: EveryOption = 100,
    precision: PrecisionOption = Precision.auto,
    resume: ResumeOption = Resume.auto,
    seed: int = 0,
    cpu: CpuOption = False,
) -> None:
    """Triplet with each mining, InfoNCE and SigLIP: the same encoders, batches, steps and seed.

    The same command goes on where it was stopped; a finished run is not repeated. Where the data has a validation set
    the weights of each run are those that did best on it.
    """
    from models.retrieval_eval import print_comparison, retriever_encoder, spoken_retrieval

    config = replace(PRESETS[preset.value], text=text.value)
    source = data_config(
        config,
        data,
        styles,
        validation_style,
        languages,
        batch_size=batch_size,
        views=views,
        texts=texts,
        variant_divisor=variant_divisor,
        keyword_share=keyword_share,
        augment=augment,
        seed=seed,
    )
    schedule = TrainConfig(
        steps=steps,
        lr=lr,
        warmup=warmup,
        ema=ema,
        seed=seed,
        precision=pick_precision(precision.value),
        checkpoint_every=evaluate_every,
    )
    bad = bad_log(BadChoice.skip)
    splits = source.load(bad)
    announce(splits.notes, bad)
    sets = splits.all_sets()
    del sets["train"]
    losses = {
        "triplet, all": LossConfig(mining="all", margin=margin),
        "triplet, semi-hard": LossConfig(mining="semi_hard", margin=margin),
        "triplet, hardest": LossConfig(mining="hardest", margin=margin),
        "triplet, all then hardest": LossConfig("triplet", "hardest", margin, mining_warmup or max(1, steps // 4)),
        "InfoNCE": LossConfig("info_nce"),
        "SigLIP": LossConfig("siglip"),
    }
    rows: list[dict[str, Any]] = []
    for name, loss in losses.items():
        console.rule(name)
        folder = out / name.lower().replace(",", "").replace(" ", "-")
        trainer, _ = train_run(
            config,
            source,
            schedule,
            loss,
            folder,
            splits=splits,
            evaluate_every=evaluate_every,
            resume=resume is Resume.auto,
            cpu=cpu,
        )
        model, tokens, _ = load_retriever(folder)
        encoder = retriever_encoder(model, tokens)
        found = {
            which: spoken_retrieval(encoder, part.gallery(limit=splits.gallery_limit, variants=False))
            for which, part in sets.items()
        }
        took = sorted(row["seconds"] for row in trainer.history)[len(trainer.history) // 2]
        scores = read_history(folder, "validation.jsonl")
        rows.append({"loss": name, "config": asdict(loss), "step_seconds": took, "scores": scores, "sets": found})
        (out / "compare.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print_comparison(rows, console)
    if splits.validation is not None:
        from models.plots import scores_over_steps

        scores_over_steps(
            {row["loss"]: row["scores"] for row in rows}, "R@1 on the validation set", out / "compare.png"
        )
    console.print(f"written: {out / 'compare.json'}", highlight=False, soft_wrap=True)


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command line; foreseeable errors end it with one clear line instead of a traceback."""
    return run_app(app, arguments)


if __name__ == "__main__":
    # Under its own name too, so that pickles and imports elsewhere see one module, not two.
    sys.modules.setdefault("models.retrieval", sys.modules["__main__"])
    sys.exit(main())
