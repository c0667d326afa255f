"""TimeSformer: a Vision Transformer for video whose attention is divided into time and space.

    python -m models.timesformer train --data digits --out runs/timesformer
    python -m models.timesformer eval runs/timesformer
    python -m models.timesformer predict runs/timesformer clip.mp4
    python -m models.timesformer flops
    python -m models.timesformer ablation --data digits

The model follows Bertasius et al. 2021 (arXiv:2102.05095) and their code: in each block every patch first attends to
the patches of its own position in all frames, then to the patches of its own frame. Every attention is one call of
``mmkernels.divided_attention``, which reads the tokens where they lie. The preset "base" is the paper's TimeSformer;
its weights pass to and from Hugging Face's ``TimesformerForVideoClassification``. The small presets may have a
convolutional stem in the place of the patches, which learns faster from few clips.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from mmkernels.integrations.transformers import drop_frames, drop_positions
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
from models.data.sets import BadDataLog
from models.data.video import ClipAugment, ClipBatch, ClipPlan, VideoSplits
from models.layers import MLP, ConvStem, DividedAttention
from models.training import Task, TrainConfig, Trainer, clear_run, console, load_run, read_history

# --- the model -------------------------------------------------------------------------------------------------------

AttentionType = Literal["divided", "joint", "space"]
ATTENTION_TYPES: tuple[AttentionType, ...] = ("space", "joint", "divided")


@dataclass(frozen=True)
class TimesformerConfig:
    """A TimeSformer.

    ``attention`` is "divided" (time, then space), "joint" (all patches of the clip at once) or "space" (each frame for
    itself; the frames' features are averaged before the last norm). ``stem``, where given, holds the widths of a
    convolutional stem; each of its stages halves the side. ``drop_path`` is the rate of the last block; the rates of
    the others rise to it from 0. ``impl`` chooses the implementation of the op.
    """

    image_size: int = 224
    patch_size: int = 16
    num_frames: int = 8
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    classes: int = 400
    attention: AttentionType = "divided"
    stem: tuple[int, ...] = ()
    qkv_bias: bool = True
    drop_path: float = 0.0
    attention_dropout: float = 0.0
    eps: float = 1e-6
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto"

    @property
    def stride(self) -> int:
        """The pixels that a token stands for, along a side."""
        return 2 ** len(self.stem) if self.stem else self.patch_size

    @property
    def grid(self) -> int:
        """Patches along a side of a frame."""
        return self.image_size // self.stride

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TimesformerConfig:
        """The config that :func:`dataclasses.asdict` made ``values`` from (JSON's lists become tuples again)."""
        return TimesformerConfig(**{**values, "stem": tuple(values["stem"])})


PRESETS: dict[str, TimesformerConfig] = {
    # A few ten thousand parameters: for tests.
    "nano": TimesformerConfig(16, 8, 4, 32, 2, 2),
    # What two CPU cores train in minutes.
    "tiny": TimesformerConfig(32, 8, 8, 128, 4, 4),
    # An hour on two cores.
    "small": TimesformerConfig(48, 8, 8, 192, 6, 6, drop_path=0.1),
    # The paper's TimeSformer: ViT-B/16, 8 frames of 224 x 224.
    "base": TimesformerConfig(),
}


def _attention(config: TimesformerConfig, axis: Literal["time", "space", "joint"]) -> DividedAttention:
    return DividedAttention(
        config.width,
        config.heads,
        axis,
        qkv_bias=config.qkv_bias,
        dropout=config.attention_dropout,
        impl=config.impl,
    )


class Block(nn.Module):
    """Attention over time (if divided), attention over space or over all, and an MLP: each with a residual.

    In training, drop-path takes residuals away as the reference implementation does: in time for a position in all
    frames, in space for a whole frame (a class token's share in the mean over frames included), else for a clip.
    """

    def __init__(self, config: TimesformerConfig, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.divided = config.attention == "divided"
        if self.divided:
            self.ln_time = nn.LayerNorm(config.width, eps=config.eps)
            self.time_attn = _attention(config, "time")
            self.time_fc = nn.Linear(config.width, config.width)
        self.ln_1 = nn.LayerNorm(config.width, eps=config.eps)
        self.attn = _attention(config, "space" if self.divided else "joint")
        self.ln_2 = nn.LayerNorm(config.width, eps=config.eps)
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio))

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """x [B, 1 + N T, C] -> [B, 1 + N T, C], the frames of a position side by side."""
        if self.divided:
            x = self.over_time(x, num_frames)
            x = self.over_space(x, num_frames)
        else:
            x = x + self._drop_clips(self.attn(self.ln_1(x), 1))
        return x + self._drop_clips(self.mlp(self.ln_2(x)))

    def over_time(self, x: Tensor, num_frames: int) -> Tensor:
        """The temporal step; the class token stays as it is."""
        y = self.time_attn(self.ln_time(x), num_frames)
        if self.drop_path and self.training:
            y = y * drop_positions(y, num_frames, self.drop_path)
        return torch.cat([x[:, :1], x[:, 1:] + self.time_fc(y)[:, 1:]], 1)

    def over_space(self, x: Tensor, num_frames: int) -> Tensor:
        """The spatial step, whose class token is averaged over the frames."""
        if not (self.drop_path and self.training):
            return x + self.attn(self.ln_1(x), num_frames)
        # The op leaves out the frames that are dropped, and weights make the mean over all frames of what it gives.
        kept, weights = drop_frames(x, num_frames, self.drop_path)
        return x + self.attn(self.ln_1(x), num_frames, kept) * weights

    def _drop_clips(self, y: Tensor) -> Tensor:
        if not (self.drop_path and self.training):
            return y
        keep = 1 - self.drop_path
        return y / keep * torch.floor(torch.rand((len(y), 1, 1), dtype=y.dtype, device=y.device) + keep)


class TimeSformer(nn.Module):
    """Patches of every frame, embeddings of position and time, blocks, and a classifier on the class token."""

    def __init__(self, config: TimesformerConfig) -> None:
        super().__init__()
        if config.attention not in ATTENTION_TYPES:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION_TYPES)}; got {config.attention!r}")
        if config.image_size % config.stride:
            raise ValueError(
                f"image_size {config.image_size} is not a multiple of the {config.stride} pixels of a token"
            )
        self.config = config
        width = config.width
        self.conv1: nn.Module
        if config.stem:
            self.conv1 = ConvStem(config.stem, (0,) * len(config.stem), width)
        else:
            self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + config.grid**2, width))
        if config.attention != "space":
            self.time_embedding = nn.Parameter(torch.empty(config.num_frames, width))
        rates = [config.drop_path * i / max(1, config.layers - 1) for i in range(config.layers)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.ln_post = nn.LayerNorm(width, eps=config.eps)
        self.head = nn.Linear(width, config.classes)
        self._initialise()

    def _initialise(self) -> None:
        """For training from nothing, as CLIP's Transformer: matrices by their width, residual projections by the depth.

        The authors start from an image model, and therefore with attention over time switched off (zero ``time_fc``
        and time embeddings). From nothing, the embeddings of position and time must be as large as what they are added
        to, as sines would be: with the usual 0.02 small models see no order of frames for hundreds of steps.
        """
        width = self.config.width
        residual = width**-0.5 * (2 * self.config.layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = residual if name.endswith(("proj", "c_proj")) else width**-0.5
                nn.init.normal_(module.weight, std=(2 * width) ** -0.5 if name.endswith("c_fc") else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("_embedding"):
                nn.init.normal_(parameter, std=0.7)

    def embed(self, videos: Tensor) -> Tensor:
        """videos [B, T, 3, H, W] -> tokens [B, 1 + N T, C], or [B T, 1 + N, C] where frames do not meet.

        Embeddings of other sizes and lengths than the config's are interpolated (to the nearest, as the reference).
        """
        if videos.ndim != 5 or videos.shape[2] != 3:
            raise ValueError(f"videos: expected shape [B, T, 3, H, W], got {tuple(videos.shape)}")
        B, T = videos.shape[:2]
        if any(side % self.config.stride for side in videos.shape[3:]):
            raise ValueError(
                f"videos: expected sides that are multiples of the {self.config.stride} pixels of a token, "
                f"got {tuple(videos.shape[3:])}"
            )
        patches = self.conv1(videos.flatten(0, 1))  # [B T, C, h, w]
        position = self.positional_embedding[1:].T.unflatten(1, (self.config.grid, -1))  # [C, g, g]
        if position.shape[1:] != patches.shape[2:]:
            position = F.interpolate(position[None], patches.shape[2:], mode="nearest")[0]
        patches = (patches + position.to(patches.dtype)).flatten(2)  # [B T, C, N]
        cls = (self.class_embedding + self.positional_embedding[0]).to(patches.dtype)
        if self.config.attention == "space":
            x = patches.transpose(1, 2)
        else:
            moment = self.time_embedding.T  # [C, T]
            if moment.shape[1] != T:
                moment = F.interpolate(moment[None], T, mode="nearest")[0]
            x = patches.unflatten(0, (B, T)).permute(0, 3, 1, 2) + moment.T.to(patches.dtype)  # [B, N, T, C]
            x = x.flatten(1, 2)
        return torch.cat([cls.expand(len(x), 1, -1), x], 1)

    def features(self, videos: Tensor) -> Tensor:
        """videos [B, T, 3, H, W] -> what the classifier reads, [B, C]."""
        x, frames = self.embed(videos), videos.shape[1]
        for block in self.blocks:
            x = block(x, frames)
        x = x[:, 0]
        if self.config.attention == "space":
            x = x.unflatten(0, (-1, frames)).mean(1)
        return self.ln_post(x)

    def forward(self, videos: Tensor) -> Tensor:
        """videos [B, T, 3, H, W], normalised -> logits [B, classes]."""
        return self.head(self.features(videos))

    @torch.no_grad()
    def rollout(self, videos: Tensor) -> Tensor:
        """How much the class token draws on each patch through all blocks: [B, T, h, w], each clip's sum 1.

        Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928): the product of the blocks' attention, each mixed
        with the residual by halves.
        """
        x, frames = self.embed(videos), videos.shape[1]
        eye = torch.eye(x.shape[1], device=x.device)
        flow = eye.expand(len(x), -1, -1)
        for block in self.blocks:
            assert isinstance(block, Block)
            if block.divided:
                over_time = block.time_attn.maps(block.ln_time(x), frames)
                over_time[:, 0, 0] = 1  # the class token is only its residual there
                flow = (eye + over_time) / 2 @ flow
                space = block.attn.maps(block.ln_1(block.over_time(x, frames)), frames)
            else:
                space = block.attn.maps(block.ln_1(x), 1)
            flow = (eye + space) / 2 @ flow
            x = block(x, frames)
        shares = flow[:, 0, 1:]
        height, width = (side // self.config.stride for side in videos.shape[3:])
        if self.config.attention == "space":
            grid = shares.view(len(videos), frames, height, width)
        else:
            grid = shares.view(len(videos), height, width, frames).permute(0, 3, 1, 2)
        return grid / grid.sum((1, 2, 3), keepdim=True)


# --- Hugging Face's weights ------------------------------------------------------------------------------------------

_HF_ATTENTION = {"divided": "divided_space_time", "joint": "joint_space_time", "space": "space_only"}
_HF_STEM = {
    "conv1": "timesformer.embeddings.patch_embeddings.projection",
    "class_embedding": "timesformer.embeddings.cls_token",
    "positional_embedding": "timesformer.embeddings.position_embeddings",
    "time_embedding": "timesformer.embeddings.time_embeddings",
    "ln_post": "timesformer.layernorm",
    "head": "classifier",
}
_HF_BLOCK = {
    "ln_time": "temporal_layernorm",
    "time_attn.qkv": "temporal_attention.attention.qkv",
    "time_attn.proj": "temporal_attention.output.dense",
    "time_fc": "temporal_dense",
    "ln_1": "layernorm_before",
    "attn.qkv": "attention.attention.qkv",
    "attn.proj": "attention.output.dense",
    "ln_2": "layernorm_after",
    "mlp.c_fc": "intermediate.dense",
    "mlp.c_proj": "output.dense",
}


def _hugging_face_name(name: str) -> str:
    if name in _HF_STEM:
        return _HF_STEM[name]
    module, _, leaf = name.rpartition(".")
    if module in _HF_STEM:
        return f"{_HF_STEM[module]}.{leaf}"
    _, number, inner = module.split(".", 2)
    return f"timesformer.encoder.layer.{number}.{_HF_BLOCK[inner]}.{leaf}"


def config_from_hugging_face(config: Any) -> TimesformerConfig:
    """The config of a ``transformers.TimesformerConfig``; what this model does not have is refused."""
    if config.hidden_act != "gelu":
        raise ValueError(f"hidden_act: this model has 'gelu', and the config says {config.hidden_act!r}")
    if config.hidden_dropout_prob:
        raise ValueError(
            f"hidden_dropout_prob: this model has none, and the config says {config.hidden_dropout_prob}; set it to 0 "
            "if you load the weights for inference"
        )
    for name in ("image_size", "patch_size"):
        if not isinstance(getattr(config, name), int):
            raise ValueError(f"{name}: expected an int (square frames and patches), got {getattr(config, name)}")
    return TimesformerConfig(
        image_size=config.image_size,
        patch_size=config.patch_size,
        num_frames=config.num_frames,
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        mlp_ratio=config.intermediate_size / config.hidden_size,
        classes=config.num_labels,
        attention={theirs: own for own, theirs in _HF_ATTENTION.items()}[config.attention_type],  # type: ignore[arg-type]
        qkv_bias=config.qkv_bias,
        drop_path=config.drop_path_rate,
        attention_dropout=config.attention_probs_dropout_prob,
        eps=config.layer_norm_eps,
    )


def hugging_face_config(config: TimesformerConfig) -> dict[str, Any]:
    """The arguments of ``transformers.TimesformerConfig`` for a model of ``config``.

    Without the rate of drop-path, of which transformers 5 takes no fraction.
    """
    return {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "num_frames": config.num_frames,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": int(config.width * config.mlp_ratio),
        "num_labels": config.classes,
        "attention_type": _HF_ATTENTION[config.attention],
        "qkv_bias": config.qkv_bias,
        "attention_probs_dropout_prob": config.attention_dropout,
        "layer_norm_eps": config.eps,
    }


def from_hugging_face(state: Mapping[str, Tensor], config: TimesformerConfig = PRESETS["base"]) -> TimeSformer:
    """A model with the weights of a state dict of Hugging Face's ``TimesformerForVideoClassification``.

    Its logits are that model's, with one exception: a space-only model there gives one row of logits for every frame
    and never averages them. Here, as in the authors' code, the frames' features are averaged before the last norm, and
    a clip has one row.
    """
    model = TimeSformer(config)
    own = model.state_dict()
    theirs = {_hugging_face_name(name): name for name in own}
    missing, extra = sorted(theirs.keys() - state.keys()), sorted(state.keys() - theirs.keys())
    if missing or extra:
        raise ValueError(
            f"not a state dict of this model: {len(missing)} missing {missing[:3]}, {len(extra)} extra {extra[:3]}"
        )
    loaded = {}
    for name, mine in theirs.items():
        value = state[name].squeeze(0) if "embedding" in mine else state[name]
        loaded[mine] = value.view(own[mine].shape) if value.numel() == own[mine].numel() else value
        if loaded[mine].shape != own[mine].shape:
            raise ValueError(f"{name}: expected the shape {tuple(own[mine].shape)}, got {tuple(value.shape)}")
    model.load_state_dict(loaded)
    return model


def to_hugging_face(model: TimeSformer) -> dict[str, Tensor]:
    """The state dict under Hugging Face's names; a convolutional stem has no counterpart there and is refused."""
    if model.config.stem:
        raise ValueError("Hugging Face's TimeSformer has no convolutional stem: only models with patches can be saved")
    batched = {"class_embedding": (1, 1, -1), "positional_embedding": (1, -1), "time_embedding": (1, -1)}
    state = {}
    for name, value in model.state_dict().items():
        if name in batched:
            value = value[None, None] if name == "class_embedding" else value[None]
        state[_hugging_face_name(name)] = value
    return state


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class VideoTask(Task):
    """The classification task of :class:`models.training.Trainer`."""

    plan: ClipPlan
    smoothing: float = 0.0

    def batch(self, index: int) -> ClipBatch:
        """The batch of an index."""
        return self.plan(index)

    def loss(self, model: nn.Module, batch: ClipBatch) -> tuple[Tensor, dict[str, Tensor | float]]:
        """Cross-entropy, with the accuracy on the batch to log."""
        logits = model(batch.videos).float()
        right = (logits.argmax(-1) == batch.labels).float().mean()
        return F.cross_entropy(logits, batch.labels, label_smoothing=self.smoothing), {"accuracy": right.detach()}


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass
class VideoDataConfig:
    """Which videos, and how clips are taken from them in training."""

    source: str = "digits"  # "digits", "kanji", or the path of a folder of classes or a list of files
    size: int = 32  # the side of a clip in pixels
    num_frames: int = 8
    batch_size: int = 64
    augment: float = 0.0
    sampling: Literal["uniform", "dense"] = "uniform"  # of video files
    stride: int = 8  # frames between two of a dense clip
    seed: int = 0


def load_data(config: VideoDataConfig, bad: BadDataLog) -> VideoSplits:
    """Read the data a config names."""
    if config.source == "digits":
        from models.data.digits import load_digits

        return load_digits(config.size, config.num_frames, seed=config.seed)
    if config.source == "kanji":
        from models.data.kanji import load_kanji

        return load_kanji(config.size, config.num_frames, bad)
    from models.data.video_files import load_video_files

    path = Path(config.source)
    if not path.exists():
        raise FileNotFoundError(f"--data {config.source}: not 'digits', 'kanji' or an existing folder or list of files")
    return load_video_files(
        path, config.size, config.num_frames, sampling=config.sampling, stride=config.stride, bad=bad
    )


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
    if not resume:
        clear_run(out)
    trainer = Trainer(
        model,
        VideoTask(plan, smoothing),
        train,
        out,
        model_config={
            "timesformer": asdict(config),
            "data": asdict(data),
            "smoothing": smoothing,
            "classes": list(splits.train.classes),
        },
        compile_model=compile_model,
        cpu=cpu,
    )
    if resume:
        trainer.resume()
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"{config.attention} attention, {parameters:.1f} M parameters, {len(splits.train)} videos of {config.classes} "
        f"classes, {plan.steps_per_epoch} steps an epoch, {trainer.device}, precision {train.precision}"
    )
    trainer.fit()
    if len(bad):
        console.print(f"[yellow]{bad.summary()}", highlight=False)
    return trainer, splits


def load_timesformer(path: Path) -> tuple[TimeSformer, VideoDataConfig, list[str]]:
    """Model, data and names of the classes of a run folder or a checkpoint file, ready to evaluate.

    The weights are the averaged ones, where there are any.
    """
    weights, described = load_run(path, f"python -m models.timesformer train --out {path}")
    model = TimeSformer(TimesformerConfig.from_dict(described["timesformer"]))
    model.load_state_dict(weights)
    return model.eval(), VideoDataConfig(**described["data"]), described["classes"]


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
    from models import plots
    from models.timesformer_eval import Views, evaluate, print_report

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
    history = read_history(out)
    if history:
        plots.curves(
            history,
            out / "curves.png",
            loss="cross-entropy",
            chance=float(torch.tensor(len(data.classes)).log()),
            second=("accuracy", "accuracy on the batch", "Training accuracy"),
        )
    names = ("curves.png", "confusion.png", "attention.png", "report.json")
    written = ", ".join(str(out / name) for name in names if (out / name).exists())
    console.print(f"written: {written}", highlight=False, soft_wrap=True)
    return report


def draw_attention(model: TimeSformer, clip: Tensor, classes: Any, path: Path) -> None:
    """Draw a clip [T, C, H, W] (uint8), and below each frame what of it the class token draws on."""
    from models import plots
    from models.data.video import crops, prepare

    square = crops(clip, 1)
    videos = prepare(square.to(model.class_embedding.device), model.config.image_size)
    with torch.no_grad():
        found = model(videos).softmax(-1)[0].max(-1)
    title = f"{classes[int(found.indices)]}  ({float(found.values):.2f})"
    plots.attention(square[0], model.rollout(videos)[0].cpu(), title, path)


# --- the command line ------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train, evaluate and measure TimeSformer.")


class Preset(str, Enum):
    """Model sizes."""

    nano = "nano"
    tiny = "tiny"
    small = "small"
    base = "base"


class Attention(str, Enum):
    """What attends to what."""

    divided = "divided"
    joint = "joint"
    space = "space"


class SamplingChoice(str, Enum):
    """How clips are taken from video files."""

    uniform = "uniform"
    dense = "dense"


DataSource = Annotated[str, typer.Option("--data", help="'digits', 'kanji', or a folder of classes or list of files.")]
PresetOption = Annotated[Preset, typer.Option(help="Model size.")]
StepsOption = Annotated[int, typer.Option(min=1)]
BatchOption = Annotated[int, typer.Option(min=1, help="Clips in a batch.")]
RateOption = Annotated[float, typer.Option(min=0)]
WarmupOption = Annotated[int, typer.Option(min=0)]
AugmentOption = Annotated[
    float | None,
    typer.Option(min=0, help="Strength of the augmentation; default: 0 for digits, which are drawn, else 1."),
]
CpuOption = Annotated[bool, typer.Option("--cpu", help="Use the CPU even where there is a GPU.")]


def data_config(
    source: str, model: TimesformerConfig, batch_size: int, augment: float | None, **files: Any
) -> VideoDataConfig:
    """The data of a run; digits are not augmented unless it is asked for, for the torus has no edge to move over."""
    strength = (0.0 if source == "digits" else 1.0) if augment is None else augment
    return VideoDataConfig(source, model.image_size, model.num_frames, batch_size, strength, **files)


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Run folder: checkpoints, logs, pictures.")] = Path("runs/timesformer"),
    data: DataSource = "digits",
    preset: PresetOption = Preset.tiny,
    attention: Annotated[Attention, typer.Option(help="What attends to what.")] = Attention.divided,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames of a clip; default: the preset's.")] = None,
    drop_path: Annotated[float | None, typer.Option(min=0, max=0.9, help="Of the last block.")] = None,
    steps: StepsOption = 1000,
    minutes: Annotated[float | None, typer.Option(help="End in this time, the decay of the rate fitted to it.")] = None,
    batch_size: BatchOption = 64,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of an optimiser step.")] = 1,
    lr: RateOption = 1e-3,
    warmup: WarmupOption = 50,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.05,
    clip: Annotated[float, typer.Option(min=0, help="Largest norm of the gradient.")] = 1.0,
    ema: Annotated[float, typer.Option(min=0, max=1, help="Decay of the weight average; 0: none.")] = 0.0,
    smoothing: Annotated[float, typer.Option(min=0, max=1, help="Label smoothing.")] = 0.0,
    augment: AugmentOption = None,
    sampling: Annotated[SamplingChoice, typer.Option(help="Clips of video files.")] = SamplingChoice.uniform,
    stride: Annotated[int, typer.Option(min=1, help="Frames between two of a dense clip.")] = 8,
    precision: PrecisionOption = Precision.auto,
    on_bad_data: BadOption = BadChoice.skip,
    resume: ResumeOption = Resume.auto,
    checkpoint_every: Annotated[int, typer.Option(min=1)] = 200,
    seed: int = 0,
    cpu: CpuOption = False,
    compile_model: Annotated[bool, typer.Option("--compile", help="Run the model through torch.compile.")] = False,
) -> None:
    """Train a model; the same command goes on where a killed run stopped."""
    model = replace(PRESETS[preset.value], attention=attention.value)
    if frames is not None:
        model = replace(model, num_frames=frames)
    if drop_path is not None:
        model = replace(model, drop_path=drop_path)
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
        model,
        data_config(data, model, batch_size, augment, sampling=sampling.value, stride=stride, seed=seed),
        config,
        out,
        smoothing=smoothing,
        bad=bad_log(on_bad_data),
        resume=resume is Resume.auto,
        compile_model=compile_model,
        cpu=cpu,
    )
    console.print(f"trained; next: python -m models.timesformer eval {out}", highlight=False)


Checkpoint = Annotated[Path, typer.Argument(help="A run folder or a checkpoint file.")]
ClipsOption = Annotated[int, typer.Option(min=1, help="Clips of a video file, spread over it.")]
CropsOption = Annotated[int, typer.Option(min=1, help="Crops of each clip, where frames are not square.")]


@app.command(name="eval")
def eval_command(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help="Evaluate on other data than the run was trained on.")] = "",
    out: Annotated[Path | None, typer.Option(help="Where report and pictures go; default: the run folder.")] = None,
    clips: ClipsOption = 1,
    crops: CropsOption = 3,
    validation: Annotated[bool, typer.Option("--validation", help="The validation set, not the test sets.")] = False,
    on_bad_data: BadOption = BadChoice.skip,
) -> None:
    """Accuracy on every test set beside its baselines, with tables, a JSON report and pictures."""
    model, run, classes = load_timesformer(checkpoint)
    bad = bad_log(on_bad_data)
    splits = load_data(replace(run, source=data) if data else run, bad)
    announce(splits.notes, bad)
    if list(splits.train.classes) != classes:
        raise ValueError(f"--data {data}: its classes are not those of the run, {', '.join(classes[:3])}, ...")
    folder = out or (checkpoint if checkpoint.is_dir() else checkpoint.parent)
    evaluate_run(model, splits, folder, clips=clips, crops=crops, validation=validation, bad=bad)
    if len(bad):
        console.print(f"[yellow]{bad.summary()}", highlight=False)


@app.command()
def predict(
    checkpoint: Checkpoint,
    video: Annotated[Path, typer.Argument(help="A video file.")],
    clips: ClipsOption = 3,
    crops: CropsOption = 3,
    top: Annotated[int, typer.Option(min=1)] = 5,
    out: Annotated[Path | None, typer.Option(help="Save the attention on the first clip as a picture.")] = None,
) -> None:
    """The likeliest classes of a video file, from the mean over clips and crops."""
    from rich.table import Table

    from models.data.video_files import clips_of_file
    from models.timesformer_eval import Views, predict_views

    model, run, classes = load_timesformer(checkpoint)
    if not video.is_file():
        raise FileNotFoundError(f"there is no video {video}")
    taken = clips_of_file(video, run.num_frames, run.size, clips, sampling=run.sampling, stride=run.stride)
    best = predict_views(model, taken, Views(clips, crops)).topk(min(top, len(classes)))
    table = Table(title=f"{video.name}: {clips} clip(s) x {crops} crop(s)")
    table.add_column("probability", justify="right")
    table.add_column("class")
    for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        table.add_row(f"{probability:.3f}", classes[index])
    console.print(table)
    if out is not None:
        draw_attention(model, taken[0], classes, out)
        console.print(f"written: {out}", highlight=False)


@app.command()
def flops() -> None:
    """Parameters and multiply-adds of every preset, counted on the real model by torch's own counter."""
    from models.timesformer_eval import cost_table

    console.print(cost_table())
    console.print(
        "[dim]Hugging Face's base model does 195.83 GMAC a view: it projects the class token once for each frame, "
        "here it is projected once",
        highlight=False,
    )


@app.command()
def ablation(
    out: Annotated[Path, typer.Option(help="Folder of the three runs and the table.")] = Path("runs/ablation"),
    data: DataSource = "digits",
    preset: PresetOption = Preset.tiny,
    steps: StepsOption = 1000,
    batch_size: BatchOption = 64,
    lr: RateOption = 1e-3,
    warmup: WarmupOption = 50,
    ema: Annotated[float, typer.Option(min=0, max=1)] = 0.0,
    augment: AugmentOption = None,
    precision: PrecisionOption = Precision.auto,
    resume: ResumeOption = Resume.auto,
    seed: int = 0,
    cpu: CpuOption = False,
) -> None:
    """The paper's comparison: space alone, joint and divided attention, after equal steps on the same clips."""
    from rich.table import Table

    from models.timesformer_eval import Scores, cost, predict_set, step_cost

    columns = ("attention", "M parameters", "top-1", "top-5", "GMAC a clip", "ms a batch", "MiB a batch")
    table = Table(title=f"{preset.value} on {data}, {steps} steps of {batch_size} clips, test set")
    for column in columns:
        table.add_column(column, justify="left" if column == "attention" else "right")
    rows = []
    for attention in ATTENTION_TYPES:
        console.rule(f"{attention} attention")
        config = replace(PRESETS[preset.value], attention=attention)
        trainer, splits = train_run(
            config,
            data_config(data, config, batch_size, augment, seed=seed),
            TrainConfig(
                steps=steps, lr=lr, warmup=warmup, ema=ema, seed=seed, precision=pick_precision(precision.value)
            ),
            out / attention,
            resume=resume is Resume.auto,
            cpu=cpu,
        )
        model = trainer.raw_model
        assert isinstance(model, TimeSformer)
        seconds, held = step_cost(trainer)
        model.load_state_dict(trainer.weights())
        scores = Scores.of(*predict_set(model, next(iter(splits.tests.values()))))
        found = cost(model.config)
        rows.append(
            {"attention": attention, "parameters": found.parameters, "top1": scores.top1, "top5": scores.top5}
            | {"macs": found.macs, "seconds": seconds, "bytes": held}
        )
        table.add_row(
            attention,
            f"{found.parameters / 1e6:.2f}",
            f"{scores.top1:.3f}",
            f"{scores.top5:.3f}",
            f"{found.macs / 1e9:.3f}",
            f"{1e3 * seconds:.0f}",
            f"{held / 2**20:.0f}",
        )
    (out / "ablation.json").write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    console.print(table)


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command line; foreseeable errors end it with one clear line instead of a traceback."""
    return run_app(app, arguments)


if __name__ == "__main__":
    # Under its own name too, so that pickles and imports elsewhere see one module, not two.
    sys.modules.setdefault("models.timesformer", sys.modules["__main__"])
    sys.exit(main())
