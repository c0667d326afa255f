"""CLIP: an image encoder and a text encoder trained so that an image and its caption meet.

    python -m models.clip train --data emoji --out runs/clip
    python -m models.clip eval runs/clip
    python -m models.clip retrieve runs/clip --text "a cat with a wry smile"
    python -m models.clip export runs/clip clip.pt2

The model follows Radford et al. 2021 (arXiv:2103.00020): a Vision Transformer, a causal text Transformer read at its
end token, a linear projection of each, and a learned temperature. The largest preset is ViT-B/32, whose parameters have
the names of open_clip's, so that state dicts pass from one to the other as they are. A convolutional stem may stand in
the place of the patches; the small presets have it, for it learns much faster from few images.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
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
from models.data import Batch, BatchPlan, Splits, Tokenizer
from models.data.config import DataConfig, batch_plan, load_data, pick_styles
from models.data.sets import BadDataLog, read_image
from models.layers import ConvStem, Transformer
from models.training import Task, TrainConfig, Trainer, clear_run, console, load_run, read_history

# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder: of patches, or with a convolutional stem (a width for each stage, which halves the side)."""

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    stem: tuple[int, ...] = ()
    stem_depths: tuple[int, ...] = ()
    # The class token, as CLIP; the mean of all tokens; or all patches side by side, which keeps what is where.
    pool: Literal["class", "mean", "grid"] = "class"


@dataclass(frozen=True)
class TextConfig:
    """The text encoder."""

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    layers: int = 12
    heads: int = 8


@dataclass(frozen=True)
class ClipConfig:
    """A CLIP model; ``scale`` is the logit scale (the inverse temperature) to start from.

    ``centred`` puts a batch norm without parameters behind each projection. Fresh encoders map all images to nearly one
    direction (mean cosine 0.94 was seen), and the loss first has to undo that; centred features start apart.
    """

    embed_dim: int = 512
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    quick_gelu: bool = False
    scale: float = 1 / 0.07
    centred: bool = False

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ClipConfig:
        """The config that :func:`dataclasses.asdict` made ``values`` from (JSON's lists become tuples again)."""
        vision: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["vision"].items()}
        return ClipConfig(**{**values, "vision": VisionConfig(**vision), "text": TextConfig(**values["text"])})


PRESETS: dict[str, ClipConfig] = {
    # A few hundred thousand parameters: for tests.
    "nano": ClipConfig(
        embed_dim=32,
        vision=VisionConfig(32, 8, 32, 1, 2, (16, 32, 32), (0, 0, 0)),
        text=TextConfig(24, 2048, 32, 1, 2),
        scale=10.0,
        centred=True,
    ),
    # What two CPU cores train in ten minutes.
    "tiny": ClipConfig(
        embed_dim=256,
        vision=VisionConfig(48, 16, 256, 1, 4, (32, 64, 128, 256), (0, 1, 1, 1), "grid"),
        text=TextConfig(32, 16384, 192, 2, 3),
        scale=20.0,
        centred=True,
    ),
    # An hour or more on two cores.
    "small": ClipConfig(
        embed_dim=256,
        vision=VisionConfig(48, 16, 256, 2, 4, (32, 64, 128, 256), (0, 1, 1, 2), "grid"),
        text=TextConfig(32, 16384, 192, 2, 3),
        scale=20.0,
        centred=True,
    ),
    "vit-b-32": ClipConfig(),
}


class VisionTransformer(nn.Module):
    """Image encoder: patches (or a convolutional stem), a class token, a Transformer, a projection."""

    def __init__(self, config: VisionConfig, embed_dim: int, quick_gelu: bool = False) -> None:
        super().__init__()
        width = config.width
        self.pool = config.pool
        self.conv1: nn.Module
        if config.stem:
            stride = 2 ** len(config.stem)
            self.conv1 = ConvStem(config.stem, config.stem_depths, width)
        else:
            stride = config.patch_size
            self.conv1 = nn.Conv2d(3, width, stride, stride=stride, bias=False)
        if config.image_size % stride:
            raise ValueError(f"image_size {config.image_size} is not a multiple of the {stride} pixels of a token")
        tokens = (config.image_size // stride) ** 2 + 1
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, quick_gelu=quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        pooled = width * (tokens - 1) if config.pool == "grid" else width
        self.proj = nn.Parameter(pooled**-0.5 * torch.randn(pooled, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> features [B, E]."""
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [B, HW, C]
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        x = self.transformer(x)
        if self.pool == "grid":
            return self.ln_post(x[:, 1:]).flatten(1) @ self.proj
        return self.ln_post(x[:, 0] if self.pool == "class" else x.mean(1)) @ self.proj


class CLIP(nn.Module):
    """Both encoders and the temperature, kept as the logarithm of the logit scale."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        text = config.text
        self.visual = VisionTransformer(config.vision, config.embed_dim, config.quick_gelu)
        self.transformer = Transformer(text.width, text.layers, text.heads, quick_gelu=config.quick_gelu)
        self.token_embedding = nn.Embedding(text.vocab_size, text.width)
        self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
        self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.scale)))
        if config.centred:
            self.image_norm = nn.BatchNorm1d(config.embed_dim, affine=False)
            self.text_norm = nn.BatchNorm1d(config.embed_dim, affine=False)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=text.width**-0.5)

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B, 3, S, S] -> [B, E], unit vectors unless ``normalize`` is False."""
        features = self.visual(images)
        if self.config.centred:
            features = self.image_norm(features.float())
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor | Sequence[Tensor], normalize: bool = True) -> Tensor:
        """tokens [B, L], or parts of a batch of lengths of their own -> [B, E].

        Read at the end token, which has the highest id of all.
        """
        pooled = []
        for part in [tokens] if isinstance(tokens, Tensor) else tokens:
            x = self.token_embedding(part) + self.positional_embedding[: part.shape[1]]
            x = self.ln_final(self.transformer(x, causal=True))
            pooled.append(x[torch.arange(x.shape[0], device=x.device), part.argmax(-1)])
        features = torch.cat(pooled) @ self.text_projection
        if self.config.centred:
            features = self.text_norm(features.float())
        return F.normalize(features.float(), dim=-1) if normalize else features

    def forward(self, images: Tensor, tokens: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Unit image features, unit text features, and the logit scale."""
        return self.encode_image(images), self.encode_text(tokens), self.logit_scale.exp()

    @torch.no_grad()
    def clamp_scale(self, largest: float = 100.0) -> None:
        """Keep the logit scale between 1 and ``largest``, as CLIP does: beyond it training is unstable."""
        self.logit_scale.clamp_(0, math.log(largest))


def trim_padding(tokens: Tensor) -> Tensor:
    """Cut the columns that are padding in every row; exact, for the encoder is causal and read at the end token."""
    longest = int(tokens.argmax(-1).max()) + 1
    return tokens[:, :longest]


def from_open_clip(state: dict[str, Tensor], config: ClipConfig = PRESETS["vit-b-32"]) -> CLIP:
    """A model with the weights of an open_clip state dict (``open_clip.create_model("ViT-B-32").state_dict()``)."""
    model = CLIP(config)
    own = model.state_dict()
    missing, extra = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys() - {"attn_mask"})
    if missing or extra:
        raise ValueError(
            f"not a state dict of this model: {len(missing)} missing {missing[:3]}, {len(extra)} extra {extra[:3]}"
        )
    for name, value in own.items():
        if state[name].shape != value.shape:
            raise ValueError(f"{name}: expected the shape {tuple(value.shape)}, got {tuple(state[name].shape)}")
    model.load_state_dict({name: state[name] for name in own})
    return model


def to_open_clip(model: CLIP) -> dict[str, Tensor]:
    """The state dict under open_clip's names; a convolutional stem has no counterpart there and is refused."""
    if model.config.vision.stem:
        raise ValueError("open_clip's ViT has no convolutional stem: only models with patches can be saved to it")
    return model.state_dict()


# --- training --------------------------------------------------------------------------------------------------------


def eager_info_nce(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """What the fused loss replaces: the whole matrix of logits, and two cross-entropies of it."""
    logits = scale * queries @ keys.T
    labels = torch.arange(len(queries), device=queries.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


LossName = Literal["fused", "eager"]


@dataclass
class ClipTask(Task):
    """The contrastive task of :class:`models.training.Trainer`.

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
        # In order of length, in four parts: most captions are short, and would be padded to the longest of all.
        order = batch.tokens.argmax(-1).argsort(stable=True)
        parts = [trim_padding(part) for part in batch.tokens[order].chunk(4)]
        images, texts, scale = model(batch.images[:, order].flatten(0, 1), parts)
        # Features and loss in float32, also under autocast: the temperature multiplies rounding errors by up to 100.
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
    weights, described = load_run(path, f"python -m models.clip train --out {path}")
    model = CLIP(ClipConfig.from_dict(described["clip"]))
    model.load_state_dict(weights)
    return model.eval(), DataConfig.from_dict(described["data"])


# --- the command line ------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train, evaluate, search and export CLIP.")


class Preset(str, Enum):
    """Model sizes."""

    nano = "nano"
    tiny = "tiny"
    small = "small"
    vit_b_32 = "vit-b-32"


class LossChoice(str, Enum):
    """Implementations of the loss."""

    fused = "fused"
    eager = "eager"


def train_run(
    preset: str,
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
    if not resume:
        clear_run(out)
    trainer = Trainer(
        model,
        task,
        train,
        out,
        model_config={"clip": asdict(config), "data": asdict(data), "preset": preset, "loss": loss},
        compile_model=compile_model,
        cpu=cpu,
    )
    if resume:
        trainer.resume()
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"{preset}: {parameters:.1f} M parameters, {len(splits.train)} images of {len(plan.rows)} captions, "
        f"{plan.steps_per_epoch} steps an epoch, {trainer.device}, precision {train.precision}, loss {loss}"
    )
    trainer.fit()
    return trainer, splits


def evaluate_run(
    model: CLIP, splits: Splits, out: Path, *, validation: bool = False, batch_size: int | None = None
) -> dict[str, Any]:
    """Print the tables of a model, and write ``report.json`` and the pictures to ``out``.

    ``batch_size``, the captions in a training batch, places the chance line in the plot of the loss.
    """
    from models import plots
    from models.clip_eval import clip_encoder, evaluate, print_report
    from models.gallery import draw_gallery, pick_sets, save_report

    encoder = clip_encoder(model)
    sets = pick_sets(splits, validation)
    report = evaluate(encoder, splits, sets)
    out.mkdir(parents=True, exist_ok=True)
    save_report(report, out / "report.json")
    print_report(report, console)
    draw_gallery(encoder, next(iter(sets.values())), splits.gallery_limit, out)
    history = read_history(out)
    if history:
        plots.curves(
            history,
            out / "curves.png",
            loss="InfoNCE loss",
            chance=math.log(batch_size) if batch_size else None,
            second=("scale", "logit scale (1 / temperature)", "Temperature"),
        )
    names = ("curves.png", "similarity.png", "retrieval.png", "report.json")
    written = ", ".join(str(out / name) for name in names if (out / name).exists())
    console.print(f"written: {written}", highlight=False, soft_wrap=True)
    return report


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Run folder: checkpoints, logs, pictures.")] = Path("runs/clip"),
    data: Annotated[str, typer.Option(help="'emoji', 'synthetic', or a folder with a captions file.")] = "emoji",
    preset: Annotated[Preset, typer.Option(help="Model size.")] = Preset.tiny,
    styles: Annotated[str, typer.Option(help="Styles to train on, with commas, or 'all' (emoji).")] = ",".join(
        DataConfig.styles
    ),
    validation_style: Annotated[str, typer.Option(help="Style kept for choosing hyper-parameters (emoji).")] = "",
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    minutes: Annotated[float | None, typer.Option(help="End in this time, the decay of the rate fitted to it.")] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Captions in a batch.")] = 256,
    views: Annotated[int, typer.Option(min=1, help="Images of each caption in a batch.")] = 2,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of an optimiser step.")] = 1,
    lr: Annotated[float, typer.Option(min=0)] = 1e-3,
    warmup: Annotated[int, typer.Option(min=0)] = 50,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.05,
    clip: Annotated[float, typer.Option(min=0, help="Largest norm of the gradient.")] = 1.0,
    ema: Annotated[float, typer.Option(min=0, max=1, help="Decay of the weight average; 0: none.")] = 0.0,
    image_weight: Annotated[float, typer.Option(min=0, help="Weight of the loss between two views.")] = 0.0,
    scale_lr: Annotated[float, typer.Option(min=0, help="Learning rate of the temperature, as a multiple.")] = 1.0,
    keyword_share: Annotated[float, typer.Option(min=0, max=1, help="Share of captions with keywords.")] = 0.3,
    variant_divisor: Annotated[int, typer.Option(min=1, help="One in so many variants an epoch.")] = 5,
    augment: Annotated[float, typer.Option(min=0, help="Strength of the augmentation.")] = 1.0,
    precision: PrecisionOption = Precision.auto,
    loss: Annotated[LossChoice, typer.Option(help="Implementation of the loss.")] = LossChoice.fused,
    on_bad_data: BadOption = BadChoice.skip,
    resume: ResumeOption = Resume.auto,
    checkpoint_every: Annotated[int, typer.Option(min=1)] = 200,
    seed: int = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU even where there is a GPU.")] = False,
    compile_model: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
) -> None:
    """Train a model; the same command goes on where a killed run stopped."""
    size = PRESETS[preset.value].vision.image_size
    source = DataConfig(
        source=data,
        styles=pick_styles(styles, validation_style) if data == "emoji" else (),
        validation_style=validation_style or None,
        stored_size=size,
        batch_size=batch_size,
        views=views,
        variant_divisor=variant_divisor,
        keyword_share=keyword_share,
        augment=augment,
        seed=seed,
    )
    config = TrainConfig(
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
        preset.value,
        source,
        config,
        out,
        loss=loss.value,
        image_weight=image_weight,
        scale_lr=scale_lr,
        bad=bad_log(on_bad_data),
        resume=resume is Resume.auto,
        compile_model=compile_model,
        cpu=cpu,
    )
    console.print(f"trained; next: python -m models.clip eval {out}", highlight=False)


Checkpoint = Annotated[Path, typer.Argument(help="A run folder or a checkpoint file.")]
DataOption = Annotated[str, typer.Option(help="Evaluate on other data than the run was trained on.")]


def _data_of(run: DataConfig, other: str) -> DataConfig:
    return replace(run, source=other, stored_size=run.stored_size) if other else run


@app.command(name="eval")
def eval_command(
    checkpoint: Checkpoint,
    data: DataOption = "",
    out: Annotated[Path | None, typer.Option(help="Where report and pictures go; default: the run folder.")] = None,
    validation: Annotated[bool, typer.Option("--validation", help="The validation set, not the test sets.")] = False,
    on_bad_data: BadOption = BadChoice.skip,
) -> None:
    """Zero-shot accuracy and retrieval on every test set, with tables, a JSON report and pictures."""
    model, run = load_clip(checkpoint)
    bad = bad_log(on_bad_data)
    splits = load_data(_data_of(run, data), bad)
    announce(splits.notes, bad)
    folder = out or (checkpoint if checkpoint.is_dir() else checkpoint.parent)
    evaluate_run(model, splits, folder, validation=validation, batch_size=run.batch_size)


@app.command()
def retrieve(
    checkpoint: Checkpoint,
    text: Annotated[str, typer.Option(help="Find images for this text.")] = "",
    image: Annotated[Path | None, typer.Option(help="Find captions for this image file.")] = None,
    data: DataOption = "",
    top: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Save the images found as a picture.")] = None,
) -> None:
    """Search the first test set's images by a text, or its captions by an image."""
    from rich.table import Table

    from models.clip_eval import clip_encoder

    if bool(text) == (image is not None):
        raise typer.BadParameter("give either --text or --image")
    model, run = load_clip(checkpoint)
    bad = BadDataLog()
    splits = load_data(_data_of(run, data), bad)
    name, found = next(iter(splits.tests.items())) if splits.tests else ("train", splits.train)
    gallery = found.gallery()
    encoder = clip_encoder(model)
    if image is not None:
        pixels = read_image(image, gallery.size)
        scores = encoder.texts(gallery.names()) @ encoder.images(pixels.unsqueeze(0))[0]
    else:
        scores = encoder.images(gallery.images) @ encoder.texts([text])[0]
    best = scores.topk(min(top, len(gallery)))
    table = Table(title=f"{text or image} in {len(gallery)} of {name}")
    table.add_column("cosine", justify="right")
    table.add_column("caption of the image" if text else "caption")
    names = gallery.names()
    for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        table.add_row(f"{score:.3f}", names[row])
    console.print(table)
    if out is not None and text:
        from models.plots import contact_sheet

        contact_sheet([(text, gallery.select(best.indices), best.values)], out)
        console.print(f"written: {out}", highlight=False)


class ExportClip(nn.Module):
    """What is exported: images and tokens to unit features and the logit scale."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As :meth:`CLIP.forward`."""
        return self.model(images, tokens)


def export_model(model: CLIP, path: Path) -> float:
    """Save a torch.export program with free batch sizes; returns its largest difference from the eager model."""
    model = model.eval()
    size, text = model.config.vision.image_size, model.config.text
    tokenizer = Tokenizer(text.context_length, text.vocab_size)

    def inputs(images: int, texts: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(images)
        words = ["a red apple", "grinning face", "flag", "dog", "sun behind cloud"]
        return torch.randn(images, 3, size, size, generator=generator), tokenizer(words[:texts])

    shapes = ({0: torch.export.Dim("images")}, {0: torch.export.Dim("texts")})
    program = torch.export.export(ExportClip(model), inputs(3, 4), dynamic_shapes=shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)
    # Checked as a user will run it: read back from disk, with other batch sizes than it was traced with.
    loaded, check = torch.export.load(path).module(), inputs(2, 5)
    with torch.no_grad():
        pairs = zip(loaded(*check), model(*check), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)


@app.command()
def export(checkpoint: Checkpoint, path: Annotated[Path, typer.Argument(help="Where to save, e.g. clip.pt2.")]) -> None:
    """Save a torch.export program of both encoders, checked against eager."""
    model, _ = load_clip(checkpoint)
    error = export_model(model, path)
    if error > 1e-4:
        raise RuntimeError(f"{path}: the exported program differs from eager by {error:.1e}; it should not be used")
    console.print(f"written: {path}; largest difference from eager {error:.1e}", highlight=False, soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Run folder.")] = Path("runs/demo"),
    budget: Annotated[float, typer.Option(min=0.1, help="Minutes for everything; training takes what is left.")] = 13.5,
    data: Annotated[str, typer.Option(help="'emoji' or, for a quick look, 'synthetic'.")] = "emoji",
) -> None:
    """Build, train and evaluate a small CLIP within the budget, and compare the fused loss with the eager one."""
    from models.clip_demo import run_demo

    run_demo(out, budget, data)


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command line; foreseeable errors end it with one clear line instead of a traceback."""
    return run_app(app, arguments)


if __name__ == "__main__":
    # Under its own name too, so that pickles and imports elsewhere see one module, not two.
    sys.modules.setdefault("models.clip", sys.modules["__main__"])
    sys.exit(main())
