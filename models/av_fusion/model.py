"""Audio-visual fusion: an image and a sound of one thing, either of them noisy, named by a model that reads both.

    python -m models.av_fusion train --fusion attention --out runs/av-fusion
    python -m models.av_fusion eval runs/av-fusion
    python -m models.av_fusion predict runs/av-fusion --image seven.png --audio seven.wav
    python -m models.av_fusion compare --out runs/av-fusion-compare

A small convolutional encoder reads each modality, and they meet in one of three ways: early (features joined, then a
head), late (a head each; decisions averaged, or combined with learned weights), or by attention, where a class token
attends to the tokens of both. That attention is one call of ``mmkernels.divided_attention``, in which a modality stands
for a frame, so that one that is absent is a frame that is masked. In training some examples lack a modality (modality
dropout, Neverova et al. 2014, arXiv:1501.00102); the ways to fuse are surveyed by Baltrusaitis et al. 2017
(arXiv:1705.09406).
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

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
from models.data.audio import LogMel
from models.data.pairs import MODALITIES, Noise, PairBatch, PairPlan, PairSplits
from models.data.sets import BadDataLog
from models.layers import MLP, DividedAttention, conv_stages
from models.training import Task, TrainConfig, Trainer, clear_run, console, load_run

# --- the model -------------------------------------------------------------------------------------------------------

Fusion = Literal["image", "audio", "early", "late", "weighted", "attention"]
FUSIONS: tuple[Fusion, ...] = ("image", "audio", "early", "late", "weighted", "attention")


@dataclass(frozen=True)
class FusionConfig:
    """A model of images and sounds.

    ``fusion`` is "image" or "audio" (one modality alone), "early" (features joined, then a head), "late" (a head each,
    the mean of their probabilities), "weighted" (a head each, the sum of their log-probabilities with learned weights)
    or "attention". An encoder has a stage for each of ``widths``, which halves the side of its input; what it finds is
    averaged to ``tokens``, a square number of places of an image and as many moments of a sound, for every fusion.
    ``hidden`` is the width of the MLP behind the attention; the heads of the other fusions are as wide as gives them
    the same number of parameters. ``impl`` chooses the implementation of the op.
    """

    fusion: Fusion = "attention"
    classes: int = 10
    channels: int = 1  # of an image
    image_size: int = 28
    samples: int = 6144  # of a sound, at 8,000 a second
    bands: int = 32  # of its spectrogram
    window: int = 256
    hop: int = 192
    widths: tuple[int, ...] = (16, 32, 64)
    hidden: int = 128
    heads: int = 4
    tokens: int = 4
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto"

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model reads."""
        return (self.fusion,) if self.fusion in MODALITIES else MODALITIES

    @property
    def mel(self) -> LogMel:
        """What makes its spectrograms."""
        return LogMel(self.bands, self.window, self.hop)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> FusionConfig:
        """The config that :func:`dataclasses.asdict` made ``values`` from (JSON's lists become tuples again)."""
        return FusionConfig(**{**values, "widths": tuple(values["widths"])})


PRESETS: dict[str, FusionConfig] = {
    # A few thousand parameters: for tests.
    "nano": FusionConfig(image_size=16, samples=2048, bands=16, hop=128, widths=(8, 16), hidden=16, heads=2),
    # What two CPU cores train in half a minute.
    "tiny": FusionConfig(),
    # Minutes.
    "small": FusionConfig(bands=40, hop=96, widths=(32, 64, 128), hidden=256, tokens=16),
}


def count_parameters(module: nn.Module) -> int:
    """How many numbers training sets."""
    return sum(parameter.numel() for parameter in module.parameters())


def head(inputs: int, classes: int, parameters: int) -> nn.Sequential:
    """Two layers, as wide between them as ``parameters`` allow."""
    hidden = max(1, (parameters - classes) // (inputs + 1 + classes))
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


class EarlyFusion(nn.Module):
    """The modalities' features side by side, zeros for one that is absent, and a head on them."""

    def __init__(self, config: FusionConfig, parameters: int) -> None:
        super().__init__()
        self.head = head(len(MODALITIES) * config.tokens * config.widths[-1], config.classes, parameters)

    def forward(self, tokens: Sequence[Tensor], present: Tensor) -> Tensor:
        """Tokens of each modality [B, N, C] and present [B, 2] -> logits [B, classes]."""
        return self.head((torch.stack(list(tokens), 1) * present[..., None, None]).flatten(1))


class LateFusion(nn.Module):
    """A head for each modality, and one decision of those that are present.

    The log of the mean of their probabilities; or, with ``learned`` weights, the weighted sum of their logs. Of a
    single modality it is just its head.
    """

    def __init__(self, config: FusionConfig, parameters: int, learned: bool = False) -> None:
        super().__init__()
        inputs, share = config.tokens * config.widths[-1], parameters // len(MODALITIES)
        self.heads = nn.ModuleList(head(inputs, config.classes, share) for _ in config.modalities)
        self.log_weights = nn.Parameter(torch.zeros(len(self.heads))) if learned else None

    def forward(self, tokens: Sequence[Tensor], present: Tensor) -> Tensor:
        """Tokens of each modality [B, N, C] and present [B, modalities] -> logits [B, classes]."""
        logits = [head(x.flatten(1)) for head, x in zip(self.heads, tokens, strict=True)]
        decisions = torch.stack(logits, 1).float().log_softmax(-1)  # [B, modalities, classes]
        absent = ~present[..., None]
        if self.log_weights is None:
            return decisions.masked_fill(absent, float("-inf")).logsumexp(1)
        return (self.log_weights.exp()[:, None] * decisions).masked_fill(absent, 0.0).sum(1)


class AttentionFusion(nn.Module):
    """A class token that attends to the tokens of both modalities, an MLP, and a linear head.

    A modality is a frame of ``mmkernels.divided_attention``, its tokens are the patches of the frame, and all attend to
    all of those that are present ("joint"). How much the class token attends to a modality is the modality's weight.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.class_embedding = nn.Parameter(0.5 * torch.randn(width))
        self.token_embedding = nn.Parameter(0.1 * torch.randn(config.tokens, len(MODALITIES), width))
        self.ln_1 = nn.LayerNorm(width)
        self.attn = DividedAttention(width, config.heads, "joint", impl=config.impl)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, config.hidden)
        self.ln_post = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.classes)

    def embed(self, tokens: Sequence[Tensor]) -> Tensor:
        """Tokens of each modality [B, N, C] -> [B, 1 + 2 N, C], the class token first, then the modalities by turns."""
        x = torch.stack(list(tokens), 2)  # [B, N, 2, C]
        x = (x + self.token_embedding.to(x.dtype)).flatten(1, 2)
        return torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)

    def forward(self, tokens: Sequence[Tensor], present: Tensor) -> Tensor:
        """Tokens of each modality [B, N, C] and present [B, 2] -> logits [B, classes]."""
        x = self.embed(tokens)
        x = x + self.attn(self.ln_1(x), len(MODALITIES), present)
        x = x[:, 0]  # what follows is for each token alone
        return self.head(self.ln_post(x + self.mlp(self.ln_2(x))))

    def weights(self, tokens: Sequence[Tensor], present: Tensor) -> Tensor:
        """How much the class token attends to the image, to the sound and to itself, [B, 3], each row's sum 1."""
        x = self.ln_1(self.embed(tokens))
        shares = self.attn.maps(x, len(MODALITIES), present, torch.zeros(1, dtype=torch.long, device=x.device))[:, 0]
        modalities = shares[:, 1:].unflatten(1, (-1, len(MODALITIES))).sum(1)
        return torch.cat([modalities, shares[:, :1]], 1)


class AVFusion(nn.Module):
    """An encoder for each modality that the model reads, and their fusion."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        if config.fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}; got {config.fusion!r}")
        side = round(config.tokens**0.5)
        if side**2 != config.tokens:
            raise ValueError(f"tokens: expected a square number, got {config.tokens}")
        self.config = config
        self.grids = {"image": (side, side), "audio": (1, config.tokens)}
        channels = {"image": config.channels, "audio": 1}
        self.encoders = nn.ModuleDict(
            {name: conv_stages(channels[name], config.widths, (0,) * len(config.widths)) for name in config.modalities}
        )
        self.fusion: EarlyFusion | LateFusion | AttentionFusion
        if config.fusion == "attention":
            self.fusion = AttentionFusion(config)
            return
        with torch.device("meta"):
            parameters = count_parameters(AttentionFusion(config))
        if config.fusion == "early":
            self.fusion = EarlyFusion(config, parameters)
        else:
            self.fusion = LateFusion(config, parameters, learned=config.fusion == "weighted")

    def _tokens(
        self, images: Tensor | None, spectrograms: Tensor | None, present: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """The tokens of what the model reads, [B, N, C] each, and which of them are present, [B, modalities]."""
        given = {"image": images, "audio": spectrograms}
        tokens = []
        for name, encoder in self.encoders.items():
            x = given[name]
            if x is None:
                raise ValueError(f"this model reads the modality {name}, which was not given")
            channels = self.config.channels if name == "image" else 1
            if x.ndim != 4 or x.shape[1] != channels:
                raise ValueError(f"{name}: expected shape [B, {channels}, H, W], got {tuple(x.shape)}")
            tokens.append(F.adaptive_avg_pool2d(encoder(x), self.grids[name]).flatten(2).transpose(1, 2))
        B = len(tokens[0])
        if present is None:
            present = torch.ones(B, len(MODALITIES), dtype=torch.bool, device=tokens[0].device)
        if present.dtype != torch.bool or present.shape != (B, len(MODALITIES)):
            raise ValueError(f"present: expected bool [B, 2] = ({B}, 2), got {present.dtype} {tuple(present.shape)}")
        if len(tokens) == 1:
            present = torch.ones_like(present[:, :1])  # it sees what it reads
        return tokens, present

    def forward(self, images: Tensor | None, spectrograms: Tensor | None, present: Tensor | None = None) -> Tensor:
        """images [B, C, S, S] and spectrograms [B, 1, F, T] -> logits [B, classes].

        ``present`` [B, 2] (bool) says which modalities of an example count; without it both do. A model of one modality
        takes None in the place of the other, and ``present`` means nothing to it.
        """
        return self.fusion(*self._tokens(images, spectrograms, present))

    @torch.no_grad()
    def weights(self, images: Tensor, spectrograms: Tensor, present: Tensor | None = None) -> Tensor:
        """The attention on the image, on the sound and on the class token itself, [B, 3]."""
        if not isinstance(self.fusion, AttentionFusion):
            raise ValueError(f"a model with {self.config.fusion} fusion has no attention weights")
        return self.fusion.weights(*self._tokens(images, spectrograms, present))


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class FusionTask(Task):
    """The classification task of :class:`models.training.Trainer`."""

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


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass
class PairDataConfig:
    """Which images and sounds, and how they are shown in training."""

    source: str = "digits"  # "digits", "synthetic", or the path of a folder of classes or a list of files
    noise: Noise = field(default_factory=Noise)
    batch_size: int = 128
    dropout: float = 0.2  # the share of examples that lack a modality
    seed: int = 0
    cache_dir: str = "runs/cache"

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> PairDataConfig:
        """The config that :func:`dataclasses.asdict` made ``values`` from."""
        noise = Noise(**{name: tuple(span) for name, span in values["noise"].items()})
        return PairDataConfig(**{**values, "noise": noise})


def load_data(data: PairDataConfig, model: FusionConfig, bad: BadDataLog) -> PairSplits:
    """Read the data a config names, in the sizes that a model reads."""
    if data.source == "digits":
        from models.data.spoken_digits import load_spoken_digits

        return load_spoken_digits(model.image_size, model.samples, Path(data.cache_dir))
    if data.source == "synthetic":
        from models.data.spoken_digits import load_synthetic_pairs

        return load_synthetic_pairs(model.image_size, model.samples)
    from models.data.pair_files import load_pair_files

    path = Path(data.source)
    if not path.exists():
        raise FileNotFoundError(
            f"--data {data.source}: not 'digits', 'synthetic' or an existing folder or list of files"
        )
    return load_pair_files(path, model.image_size, model.samples, bad)


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

    The data decide the number of classes and of an image's channels; ``drawn`` as for :class:`PairPlan`.
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
        config.mel,
        batch_size=data.batch_size,
        dropout=dropout,
        seed=data.seed,
        drawn=drawn,
    )
    if not resume:
        clear_run(out)
    trainer = Trainer(
        model,
        FusionTask(plan, smoothing),
        train,
        out,
        model_config={
            "av_fusion": asdict(config),
            "data": asdict(data),
            "smoothing": smoothing,
            "classes": list(splits.train.classes),
        },
        cpu=cpu,
    )
    if resume:
        trainer.resume()
    console.print(
        f"{config.fusion} fusion, {count_parameters(model) / 1e3:.1f} k parameters, {len(splits.train)} images of "
        f"{config.classes} classes, {plan.steps_per_epoch} steps an epoch, {trainer.device}, "
        f"precision {train.precision}"
    )
    trainer.fit()
    return trainer, splits


def load_fusion(path: Path) -> tuple[AVFusion, PairDataConfig, list[str]]:
    """Model, data and names of the classes of a run folder or a checkpoint file, ready to evaluate.

    The weights are the averaged ones, where there are any.
    """
    weights, described = load_run(path, f"python -m models.av_fusion train --out {path}")
    model = AVFusion(FusionConfig.from_dict(described["av_fusion"]))
    model.load_state_dict(weights)
    return model.eval(), PairDataConfig.from_dict(described["data"]), described["classes"]


# --- the command line ------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train, evaluate and compare audio-visual fusions.")


class Preset(str, Enum):
    """Model sizes."""

    nano = "nano"
    tiny = "tiny"
    small = "small"


class FusionChoice(str, Enum):
    """How image and sound meet."""

    image = "image"
    audio = "audio"
    early = "early"
    late = "late"
    weighted = "weighted"
    attention = "attention"


DataSource = Annotated[
    str, typer.Option("--data", help="'digits', 'synthetic', or a folder of classes or list of files.")
]
PresetOption = Annotated[Preset, typer.Option(help="Model size.")]
StepsOption = Annotated[int, typer.Option(min=1)]
BatchOption = Annotated[int, typer.Option(min=2, help="Examples in a batch.")]
RateOption = Annotated[float | None, typer.Option(min=0, help="Learning rate; default: the fusion's own.")]
WarmupOption = Annotated[int, typer.Option(min=0)]
DecayOption = Annotated[float, typer.Option(min=0)]
AverageOption = Annotated[float, typer.Option(min=0, max=1, help="Decay of the weight average; 0: none.")]
DropoutOption = Annotated[float, typer.Option(min=0, max=1, help="Share of examples that lack a modality.")]
SmoothingOption = Annotated[float, typer.Option(min=0, max=1, help="Label smoothing.")]
SnrOption = Annotated[tuple[float, float], typer.Option(help="Range of the sounds' signal-to-noise ratio in dB.")]
SigmaOption = Annotated[tuple[float, float], typer.Option(help="Range of the deviation of pixel noise.")]
HiddenOption = Annotated[tuple[float, float], typer.Option(help="Range of the share of an image that is hidden.")]
CpuOption = Annotated[bool, typer.Option("--cpu", help="Use the CPU even where there is a GPU.")]

STEPS, BATCH, WARMUP, DECAY, AVERAGE, DROPOUT = 300, 128, 30, 0.05, 0.99, 0.2
# Learning rates, each the best of its fusion on the validation set of the digits.
RATES: dict[Fusion, float] = {
    "image": 0.04,
    "audio": 0.04,
    "early": 0.04,
    "late": 0.027,
    "weighted": 0.04,
    "attention": 0.008,
}


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Run folder: checkpoints, logs, pictures.")] = Path("runs/av-fusion"),
    data: DataSource = "digits",
    fusion: Annotated[FusionChoice, typer.Option(help="How image and sound meet.")] = FusionChoice.attention,
    preset: PresetOption = Preset.tiny,
    steps: StepsOption = STEPS,
    minutes: Annotated[float | None, typer.Option(help="End in this time, the decay of the rate fitted to it.")] = None,
    batch_size: BatchOption = BATCH,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of an optimiser step.")] = 1,
    lr: RateOption = None,
    warmup: WarmupOption = WARMUP,
    weight_decay: DecayOption = DECAY,
    clip: Annotated[float, typer.Option(min=0, help="Largest norm of the gradient.")] = 1.0,
    ema: AverageOption = AVERAGE,
    dropout: DropoutOption = DROPOUT,
    smoothing: SmoothingOption = 0.0,
    snr: SnrOption = Noise.snr,
    sigma: SigmaOption = Noise.sigma,
    hidden: HiddenOption = Noise.hidden,
    precision: PrecisionOption = Precision.no,
    on_bad_data: BadOption = BadChoice.skip,
    resume: ResumeOption = Resume.auto,
    checkpoint_every: Annotated[int, typer.Option(min=1)] = 200,
    seed: int = 0,
    cpu: CpuOption = False,
) -> None:
    """Train a model; the same command goes on where a killed run stopped."""
    train_run(
        replace(PRESETS[preset.value], fusion=fusion.value),
        PairDataConfig(data, Noise(snr, sigma, hidden), batch_size, dropout, seed),
        TrainConfig(
            steps=steps,
            lr=RATES[fusion.value] if lr is None else lr,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            accumulate=accumulate,
            precision=pick_precision(precision.value),
            ema=ema,
            seed=seed,
            minutes=minutes,
            checkpoint_every=checkpoint_every,
        ),
        out,
        smoothing=smoothing,
        bad=bad_log(on_bad_data),
        resume=resume is Resume.auto,
        cpu=cpu,
    )
    console.print(f"trained; next: python -m models.av_fusion eval {out}", highlight=False)


Checkpoint = Annotated[Path, typer.Argument(help="A run folder or a checkpoint file.")]
ExamplesOption = Annotated[int, typer.Option(min=1, help="Examples of a set, each with its own noise.")]
SweepOption = Annotated[int, typer.Option(min=1, help="Examples at each level of the robustness curves.")]


@app.command(name="eval")
def eval_command(
    checkpoint: Checkpoint,
    data: Annotated[str, typer.Option(help="Evaluate on other data than the run was trained on.")] = "",
    out: Annotated[Path | None, typer.Option(help="Where report and pictures go; default: the run folder.")] = None,
    validation: Annotated[bool, typer.Option("--validation", help="The validation set, not the test sets.")] = False,
    examples: ExamplesOption = 4000,
    sweep: SweepOption = 1000,
    on_bad_data: BadOption = BadChoice.skip,
) -> None:
    """Accuracy, also without either modality and at every level of noise, with tables, a JSON report and pictures."""
    from models.av_fusion_eval import evaluate_run

    model, run, classes = load_fusion(checkpoint)
    bad = bad_log(on_bad_data)
    splits = load_data(replace(run, source=data) if data else run, model.config, bad)
    announce(splits.notes, bad)
    if list(splits.train.classes) != classes:
        raise ValueError(f"--data {data}: its classes are not those of the run, {', '.join(classes[:3])}, ...")
    folder = out or (checkpoint if checkpoint.is_dir() else checkpoint.parent)
    evaluate_run(model, splits, run.noise, folder, validation=validation, examples=examples, sweep=sweep)


@app.command()
def predict(
    checkpoint: Checkpoint,
    image: Annotated[Path | None, typer.Option(help="An image file.")] = None,
    audio: Annotated[Path | None, typer.Option(help="A sound file.")] = None,
    top: Annotated[int, typer.Option(min=1)] = 5,
) -> None:
    """The likeliest classes of an image, a sound, or both, and how much the model attends to each."""
    from rich.table import Table

    from models.data.audio import read_audio
    from models.data.pair_files import read_picture

    model, _, classes = load_fusion(checkpoint)
    config = model.config
    if image is None and audio is None:
        raise ValueError("give --image, --audio or both")
    for name, path in (("image", image), ("audio", audio)):
        if config.modalities == (name,) and path is None:
            raise ValueError(f"this model reads the modality {name} alone: give --{name}")
    # What is absent is blank, and the model is told not to look at it.
    pixels = torch.zeros(config.channels, config.image_size, config.image_size, dtype=torch.uint8)
    wave = torch.zeros(config.samples)
    if image is not None:
        pixels = read_picture(image, config.image_size, config.channels)
    if audio is not None:
        clip, length = read_audio(audio, config.samples)
        wave = clip.roll((config.samples - length) // 2).float()
    present = torch.tensor([[image is not None, audio is not None]])
    seen = pixels[None] / 127.5 - 1, config.mel(wave[None]), present
    with torch.no_grad():
        best = model(*seen)[0].softmax(-1).topk(min(top, len(classes)))
    table = Table(title=", ".join(path.name for path in (image, audio) if path is not None))
    table.add_column("probability", justify="right")
    table.add_column("class")
    for probability, index in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        table.add_row(f"{probability:.3f}", classes[index])
    console.print(table)
    if config.fusion == "attention":
        on_image, on_audio, on_self = model.weights(*seen)[0].tolist()
        console.print(f"attention: image {on_image:.2f}, sound {on_audio:.2f}, class token {on_self:.2f}")


@app.command()
def compare(
    out: Annotated[Path, typer.Option(help="Folder of the runs, the table and the pictures.")] = Path(
        "runs/av-fusion-compare"
    ),
    data: DataSource = "digits",
    preset: PresetOption = Preset.tiny,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each fusion.")] = 5,
    steps: StepsOption = STEPS,
    batch_size: BatchOption = BATCH,
    lr: RateOption = None,
    warmup: WarmupOption = WARMUP,
    weight_decay: DecayOption = DECAY,
    ema: AverageOption = AVERAGE,
    dropout: DropoutOption = DROPOUT,
    smoothing: SmoothingOption = 0.0,
    snr: SnrOption = Noise.snr,
    sigma: SigmaOption = Noise.sigma,
    hidden: HiddenOption = Noise.hidden,
    validation: Annotated[bool, typer.Option("--validation", help="The validation set, not the test sets.")] = False,
    examples: ExamplesOption = 4000,
    sweep: SweepOption = 1000,
    precision: PrecisionOption = Precision.no,
    on_bad_data: BadOption = BadChoice.skip,
    resume: ResumeOption = Resume.auto,
    cpu: CpuOption = False,
) -> None:
    """Every fusion and both modalities alone, several seeds each: one table and the robustness curves.

    A run that is finished is not repeated.
    """
    from models.av_fusion_eval import compare_runs

    compare_runs(
        PRESETS[preset.value],
        PairDataConfig(data, Noise(snr, sigma, hidden), batch_size, dropout),
        TrainConfig(
            steps=steps,
            warmup=warmup,
            weight_decay=weight_decay,
            precision=pick_precision(precision.value),
            ema=ema,
        ),
        out,
        rates=RATES if lr is None else dict.fromkeys(FUSIONS, lr),
        seeds=seeds,
        smoothing=smoothing,
        validation=validation,
        examples=examples,
        sweep=sweep,
        bad=bad_log(on_bad_data),
        resume=resume is Resume.auto,
        cpu=cpu,
    )


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command line; foreseeable errors end it with one clear line instead of a traceback."""
    return run_app(app, arguments)


if __name__ == "__main__":
    # Under its own name too, so that pickles and imports elsewhere see one module, not two.
    sys.modules.setdefault("models.av_fusion", sys.modules["__main__"])
    sys.exit(main())
