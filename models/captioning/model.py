"""Image captioning: a convolutional encoder, and an LSTM that looks at its feature map while it writes.

    python -m models.captioning train --data emoji --out runs/captioning
    python -m models.captioning eval runs/captioning
    python -m models.captioning caption picture.png --run runs/captioning

The decoder follows Xu et al. 2015 (arXiv:1502.03044): at each word a softmax over the places of the map says where it
looks. Its loss is `mmkernels.linear_cross_entropy`, on the embedding table as the last layer; captions are written by
`mmkernels.beam_search`, for which an image is encoded once, whatever the number of beams.
"""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

import mmkernels
from mmkernels.beam_search import BeamSearchResult
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
from models.data import BatchPlan, ImageTextSet, Splits, Vocabulary
from models.data.augment import prepare
from models.data.config import DataConfig, batch_plan, load_data, pick_styles
from models.data.sets import BadDataLog, hold_out_validation, read_image
from models.layers import conv_stages
from models.metrics import caption_scores
from models.training import (
    EarlyStopping,
    Task,
    TrainConfig,
    Trainer,
    clear_run,
    console,
    load_run,
)

# --- the model -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CaptionerConfig:
    """A captioner. The encoder has a stage for each of ``widths``; each halves the side of the image.

    The last stage but one is the map that the decoder looks at; the last one sums up the image.
    """

    image_size: int = 48
    widths: tuple[int, ...] = (32, 64, 128, 256)
    depths: tuple[int, ...] = (0, 1, 2, 2)
    features: int = 256
    embedding: int = 256
    hidden: int = 512
    attention: bool = True
    dropout: float = 0.3

    @staticmethod
    def from_dict(values: dict[str, Any]) -> CaptionerConfig:
        """The config that :func:`dataclasses.asdict` made ``values`` from (JSON's lists become tuples again)."""
        return CaptionerConfig(**{**values, "widths": tuple(values["widths"]), "depths": tuple(values["depths"])})


PRESETS: dict[str, CaptionerConfig] = {
    # For tests.
    "nano": CaptionerConfig(32, (16, 32, 32), (0, 0, 0), 32, 32, 64, dropout=0.0),
    # What two CPU cores train in less than half an hour.
    "small": CaptionerConfig(),
    # Photographs.
    "base": CaptionerConfig(224, (64, 128, 256, 512, 512), (1, 1, 2, 2, 1), 512, 512, 1024),
}


class Encoded(NamedTuple):
    """An image as the decoder sees it: places [B, P, F] to look at, and a summary [B, F]."""

    places: Tensor
    summary: Tensor

    def first(self, count: int) -> Encoded:
        """The first ``count`` images."""
        return Encoded(self.places[:count], self.summary[:count])


State = tuple[Tensor, Tensor]  # hidden and cell of the LSTM, [rows, H] each


class Captioner(nn.Module):
    """Encoder and decoder."""

    def __init__(self, config: CaptionerConfig, vocabulary: int) -> None:
        super().__init__()
        self.config = config
        stride = 2 ** len(config.widths)
        if config.image_size % stride:
            raise ValueError(f"image_size {config.image_size} is not a multiple of the encoder's stride, {stride}")
        width, side = config.features, config.image_size // stride
        self.local = conv_stages(3, config.widths[:-1], config.depths[:-1])
        self.whole = conv_stages(config.widths[-2], config.widths[-1:], config.depths[-1:])
        self.summary = nn.Linear(config.widths[-1] * side**2, width)
        self.summary_norm = nn.LayerNorm(width)
        if config.attention:
            self.places = nn.Linear(config.widths[-2], width)
            self.position_embedding = nn.Parameter(0.02 * torch.randn((2 * side) ** 2, width))
            self.places_norm = nn.LayerNorm(width)
            self.query = nn.Linear(config.hidden, width)
            self.gate = nn.Linear(config.hidden, width)
        seen = width * (2 if config.attention else 1)  # of the image, at each word
        self.embedding = nn.Embedding(vocabulary, config.embedding)
        self.start = nn.Linear(width, 2 * config.hidden)
        self.cell = nn.Linear(config.embedding + seen + config.hidden, 4 * config.hidden)
        self.head = nn.Linear(config.hidden + seen, config.embedding)
        self.bias = nn.Parameter(torch.zeros(vocabulary))
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.embedding.weight, std=config.embedding**-0.5)

    def encode(self, images: Tensor) -> Encoded:
        """images [B, 3, S, S] -> what the decoder sees of them."""
        local = self.local(images)
        summary = self.summary_norm(self.summary(self.whole(local).flatten(1)))
        if not self.config.attention:
            return Encoded(summary.unsqueeze(1), summary)
        places = self.places(local.flatten(2).transpose(1, 2))
        return Encoded(self.places_norm(places + self.position_embedding), summary)

    def begin(self, encoded: Encoded) -> State:
        """The state before the first word."""
        hidden, cell = self.start(encoded.summary).tanh().chunk(2, -1)
        return hidden, cell

    def step(self, tokens: Tensor, state: State, encoded: Encoded) -> tuple[Tensor, State, Tensor]:
        """One word: tokens [B K] of K captions an image -> rows [B K, E] for :meth:`logits`, state, shares [B K, P].

        The shares say where the decoder looks; they sum to 1.
        """
        hidden, cell = state
        items = len(encoded.summary)
        beams = hidden.view(items, -1, hidden.shape[-1])  # [B, K, H]: an image is there once for all its beams
        seen = encoded.summary.unsqueeze(1).expand(-1, beams.shape[1], -1)
        if self.config.attention:
            scores = self.query(beams) @ encoded.places.transpose(1, 2) * encoded.places.shape[-1] ** -0.5
            shares = scores.softmax(-1)
            looked = self.gate(beams).sigmoid() * (shares.to(encoded.places.dtype) @ encoded.places)
            seen = torch.cat([seen, looked], -1)
        else:
            shares = hidden.new_ones(items, beams.shape[1], 1)
        seen = seen.flatten(0, 1)
        words = self.dropout(self.embedding(tokens))
        gates = self.cell(torch.cat([words, seen, hidden], -1)).float()
        keep, write, show, content = gates.chunk(4, -1)
        cell = (keep + 1).sigmoid() * cell + write.sigmoid() * content.tanh()
        hidden = show.sigmoid() * cell.tanh()
        return self.head(self.dropout(torch.cat([hidden, seen], -1))), (hidden, cell), shares.flatten(0, 1)

    def logits(self, rows: Tensor) -> Tensor:
        """Rows [n, E] -> logits [n, V] over what may be written: never padding, start, or the unknown word."""
        logits = F.linear(rows, self.embedding.weight, self.bias)
        logits[:, [Vocabulary.PAD, Vocabulary.START, Vocabulary.UNKNOWN]] = float("-inf")
        return logits

    def forward(self, images: Tensor, tokens: Tensor, lengths: Sequence[int], sampling: float = 0.0) -> Tensor:
        """Rows [n, E] that predict the tokens [B, L] of captions, one step after the other: see :func:`targets_of`.

        ``lengths`` are the predictions of each caption, in falling order: a step leaves out the captions that have
        ended. With probability ``sampling`` the word before is not the caption's but one that the model itself would
        have written (Bengio et al. 2015, arXiv:1506.03099).
        """
        encoded = self.encode(images)
        state = self.begin(encoded)
        rows: list[Tensor] = []
        for t in range(lengths[0]):
            count = sum(length > t for length in lengths)
            given = tokens[:count, t]
            if t and sampling > 0:
                with torch.no_grad():
                    own = torch.multinomial(self.logits(rows[-1][:count]).float().softmax(-1), 1).squeeze(1)
                    own = torch.where(own == Vocabulary.END, given, own)  # after the end there is no word
                    given = torch.where(torch.rand(count, device=given.device) < sampling, own, given)
            state = state[0][:count], state[1][:count]
            out, state, _ = self.step(given, state, encoded.first(count))
            rows.append(out)
        return torch.cat(rows)

    @torch.no_grad()
    def greedy(self, encoded: Encoded, max_length: int) -> Tensor:
        """The most probable word each time: ids [B, L], padded behind their end."""
        state, items = self.begin(encoded), len(encoded.summary)
        token = torch.full((items,), Vocabulary.START, device=encoded.summary.device)
        ended = torch.zeros_like(token, dtype=torch.bool)
        found: list[Tensor] = []
        while len(found) < max_length and not ended.all():
            rows, state, _ = self.step(token, state, encoded)
            token = self.logits(rows).argmax(-1).masked_fill(ended, Vocabulary.PAD)
            ended = ended | (token == Vocabulary.END)
            found.append(token)
        return torch.stack(found, 1)

    def beam_search(
        self, encoded: Encoded, beams: int, max_length: int, length_penalty: float = 1.0
    ) -> BeamSearchResult:
        """The best captions that ``beams`` beams find."""

        def step(tokens: Tensor, state: State) -> tuple[Tensor, State]:
            rows, state, _ = self.step(tokens, state, encoded)
            return self.logits(rows), state

        return mmkernels.beam_search(
            step,
            self.begin(encoded),
            batch_size=len(encoded.summary),
            num_beams=beams,
            bos_token_id=Vocabulary.START,
            eos_token_id=Vocabulary.END,
            pad_token_id=Vocabulary.PAD,
            max_length=max_length,
            length_penalty=length_penalty,
        )

    @torch.no_grad()
    def looks(self, encoded: Encoded, ids: Tensor) -> Tensor:
        """Where the decoder looks for each of the words ids [B, L]: shares [B, L, P]."""
        state, shares = self.begin(encoded), []
        before = torch.cat([torch.full_like(ids[:, :1], Vocabulary.START), ids[:, :-1]], 1)
        for given in before.T:
            _, state, own = self.step(given, state, encoded)
            shares.append(own)
        return torch.stack(shares, 1)


def targets_of(tokens: Tensor, lengths: Sequence[int]) -> Tensor:
    """The tokens that the rows of :meth:`Captioner.forward` predict, in its order."""
    return torch.cat([tokens[: sum(length > t for length in lengths), t + 1] for t in range(lengths[0])])


# --- training --------------------------------------------------------------------------------------------------------


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
    """Captioning for :class:`models.training.Trainer`: cross-entropy, with more words sampled as training goes on."""

    plan: BatchPlan
    steps: int
    loss_name: LossName = "fused"
    sampling: float = 0.0  # at the end; it grows from 0 in proportion to the steps
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


# --- captions of images ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Written:
    """A caption that the model wrote: its text, its ids, its score, and whether no better one was missed."""

    text: str
    ids: tuple[int, ...]
    score: float
    certified: bool


@torch.no_grad()
def write_captions(
    model: Captioner,
    vocabulary: Vocabulary,
    images: Tensor,
    *,
    beams: int = 1,
    length_penalty: float = 1.0,
    batch: int = 128,
) -> list[Written]:
    """Caption images, uint8 [n, 4, S, S]; one beam is greedy, and has neither a score nor a certificate."""
    model.eval()
    device, longest = model.bias.device, vocabulary.max_length + 1
    written = []
    for part in images.split(batch):
        encoded = model.encode(prepare(part.to(device), model.config.image_size))
        if beams == 1:
            for row in model.greedy(encoded, longest).tolist():
                written.append(Written(vocabulary.decode(row), tuple(row), float("nan"), False))
            continue
        found = model.beam_search(encoded, beams, longest, length_penalty)
        if faults := found.faults():
            raise FloatingPointError(f"the search stopped at {len(faults)} images: {next(iter(faults.values()))}")
        columns = (found.sequences[:, 0], found.scores[:, 0], found.certified)
        for row, score, certified in zip(*(column.tolist() for column in columns), strict=True):
            written.append(Written(vocabulary.decode(row), tuple(row), score, certified))
    return written


def references(data: ImageTextSet) -> list[list[str]]:
    """The captions that each image may have."""
    return [[data.concepts[c].name, *data.concepts[c].captions] for c in data.concept_ids.tolist()]


def validation_score(
    model: Captioner, vocabulary: Vocabulary, data: ImageTextSet, limit: int = 1000
) -> Callable[[dict[str, Tensor]], float]:
    """A function of weights that gives the CIDEr of greedy captions on at most ``limit`` images of a set."""
    rows = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:limit]
    part = data.select(rows.sort().values)
    scored = copy.deepcopy(model)

    def score(weights: dict[str, Tensor]) -> float:
        scored.load_state_dict(weights)
        texts = [written.text for written in write_captions(scored, vocabulary, part.images)]
        return caption_scores(texts, references(part)).cider

    return score


# --- runs ------------------------------------------------------------------------------------------------------------


@dataclass
class CaptionData(DataConfig):
    """Which data a captioner trains on."""

    views: int = 1
    keyword_share: float = 0.0
    augment: float = 0.5
    unseen_combinations: float = 0.15
    validation_share: float = 0.1  # of the training captions, where the data has no validation set
    min_count: int = 1
    images: str | None = None

    def load(self, bad: BadDataLog) -> Splits:
        """Read the data; there is always a validation set."""
        images = Path(self.images) if self.images is not None else None
        splits = load_data(self, bad, unseen_combinations=self.unseen_combinations, images=images)
        return splits if splits.validation is not None else hold_out_validation(splits, self.validation_share)


def build_vocabulary(data: ImageTextSet, min_count: int) -> Vocabulary:
    """The words of the captions of a training set."""
    concepts = [data.concepts[c] for c in data.concept_ids.unique().tolist()]
    return Vocabulary.build((text for c in concepts for text in (c.name, *c.captions)), min_count=min_count)


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
    if not resume:
        clear_run(out)
    trainer = Trainer(
        model,
        CaptionTask(plan, train.steps * train.accumulate, loss, sampling, smoothing),
        train,
        out,
        model_config={
            "captioner": asdict(config),
            "data": asdict(data),
            "vocabulary": {"tokens": vocabulary.tokens, "max_length": vocabulary.max_length},
            "loss": loss,
            "sampling": sampling,
            "smoothing": smoothing,
        },
        cpu=cpu,
    )
    if resume:
        trainer.resume()
    assert splits.validation is not None
    stopping = EarlyStopping(validation_score(model, vocabulary, splits.validation), evaluate_every, patience)
    stopping.start(trainer)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    console.print(
        f"{parameters:.1f} M parameters, {len(vocabulary)} words, {len(splits.train)} images of {len(plan.rows)} "
        f"captions, {plan.steps_per_epoch} steps an epoch, {trainer.device}, precision {train.precision}, loss {loss}"
    )
    trainer.fit(stopping)
    return trainer, splits


def load_captioner(path: Path) -> tuple[Captioner, Vocabulary, CaptionData]:
    """The best model of a run folder, or that of a checkpoint file, with its vocabulary, ready to write."""
    weights, described = load_run(path, f"python -m models.captioning train --out {path}")
    vocabulary = Vocabulary(described["vocabulary"]["tokens"], described["vocabulary"]["max_length"])
    model = Captioner(CaptionerConfig.from_dict(described["captioner"]), len(vocabulary))
    model.load_state_dict(weights)
    return model.eval(), vocabulary, CaptionData.from_dict(described["data"])


# --- the command line ------------------------------------------------------------------------------------------------

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Train and evaluate a captioner; caption images.")


class Preset(str, Enum):
    """Model sizes."""

    nano = "nano"
    small = "small"
    base = "base"


class LossChoice(str, Enum):
    """Implementations of the loss."""

    fused = "fused"
    eager = "eager"


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Run folder: checkpoints, logs, pictures.")] = Path("runs/captioning"),
    data: Annotated[str, typer.Option(help="'emoji', 'synthetic', a folder with captions, or COCO's JSON.")] = "emoji",
    images: Annotated[Path | None, typer.Option(help="Where the images lie, if not beside the captions.")] = None,
    preset: Annotated[Preset, typer.Option(help="Model size.")] = Preset.small,
    attention: Annotated[bool, typer.Option(help="Look at the map at each word, or know its summary alone.")] = True,
    styles: Annotated[str, typer.Option(help="Styles to train on, with commas, or 'all' (emoji).")] = ",".join(
        DataConfig.styles
    ),
    validation_style: Annotated[str, typer.Option(help="Style to stop by and to choose on (emoji).")] = "",
    unseen_combinations: Annotated[
        float, typer.Option(min=0, max=0.9, help="Share of activity x gender x skin tone held out (emoji).")
    ] = CaptionData.unseen_combinations,
    min_count: Annotated[int, typer.Option(min=1, help="A word that occurs less often is unknown.")] = 1,
    steps: Annotated[int, typer.Option(min=1)] = 1000,
    minutes: Annotated[float | None, typer.Option(help="End in this time, the decay of the rate fitted to it.")] = None,
    batch_size: Annotated[int, typer.Option(min=2, help="Captions in a batch.")] = 256,
    views: Annotated[int, typer.Option(min=1, help="Images of each caption in a batch.")] = 1,
    accumulate: Annotated[int, typer.Option(min=1, help="Batches of an optimiser step.")] = 1,
    lr: Annotated[float, typer.Option(min=0)] = 2e-3,
    warmup: Annotated[int, typer.Option(min=0)] = 50,
    weight_decay: Annotated[float, typer.Option(min=0)] = 0.05,
    clip: Annotated[float, typer.Option(min=0, help="Largest norm of the gradient.")] = 1.0,
    ema: Annotated[float, typer.Option(min=0, max=1, help="Decay of the weight average; 0: none.")] = 0.0,
    variant_divisor: Annotated[int, typer.Option(min=1, help="One in so many variants an epoch.")] = 5,
    augment: Annotated[float, typer.Option(min=0, help="Strength of the augmentation.")] = CaptionData.augment,
    sampling: Annotated[
        float, typer.Option(min=0, max=1, help="Share of words before that the model wrote itself, at the end.")
    ] = 0.25,
    smoothing: Annotated[float, typer.Option(min=0, max=1, help="Label smoothing.")] = 0.1,
    evaluate_every: Annotated[int, typer.Option(min=1, help="Steps between CIDEr on the validation set.")] = 200,
    patience: Annotated[int, typer.Option(min=1, help="Stop after so many without a better one.")] = 5,
    precision: PrecisionOption = Precision.auto,
    loss: Annotated[LossChoice, typer.Option(help="Implementation of the loss.")] = LossChoice.fused,
    on_bad_data: BadOption = BadChoice.skip,
    resume: ResumeOption = Resume.auto,
    checkpoint_every: Annotated[int, typer.Option(min=1)] = 200,
    seed: int = 0,
    cpu: Annotated[bool, typer.Option("--cpu", help="Use the CPU even where there is a GPU.")] = False,
) -> None:
    """Train until CIDEr on the validation set gets no better; the same command goes on where a killed run stopped."""
    config = replace(PRESETS[preset.value], attention=attention)
    source = CaptionData(
        source=data,
        styles=pick_styles(styles, validation_style) if data == "emoji" else (),
        validation_style=validation_style or None,
        stored_size=config.image_size,
        batch_size=batch_size,
        views=views,
        variant_divisor=variant_divisor,
        augment=augment,
        seed=seed,
        unseen_combinations=unseen_combinations,
        min_count=min_count,
        images=str(images) if images is not None else None,
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
        out,
        loss=loss.value,
        sampling=sampling,
        smoothing=smoothing,
        evaluate_every=evaluate_every,
        patience=patience,
        bad=bad_log(on_bad_data),
        resume=resume is Resume.auto,
        cpu=cpu,
    )
    console.print(f"trained; next: python -m models.captioning eval {out}", highlight=False)


PenaltyOption = Annotated[float, typer.Option(help="Length penalty of the search.")]


@app.command(name="eval")
def eval_command(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder or a checkpoint file.")],
    data: Annotated[str, typer.Option(help="Evaluate on other data than the run was trained on.")] = "",
    images: Annotated[Path | None, typer.Option(help="Where the images of that data lie.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where report and pictures go; default: the run folder.")] = None,
    validation: Annotated[bool, typer.Option("--validation", help="The validation set, not the test sets.")] = False,
    length_penalty: PenaltyOption = 1.0,
    on_bad_data: BadOption = BadChoice.skip,
) -> None:
    """BLEU, CIDEr, time and certificates of greedy and beam search on every test set; a JSON report and pictures."""
    from models.captioning_eval import evaluate_run

    model, vocabulary, run = load_captioner(checkpoint)
    if data:
        run = replace(run, source=data, images=str(images) if images is not None else None)
    bad = bad_log(on_bad_data)
    splits = run.load(bad)
    announce(splits.notes, bad)
    folder = out or (checkpoint if checkpoint.is_dir() else checkpoint.parent)
    evaluate_run(model, vocabulary, splits, folder, validation=validation, length_penalty=length_penalty)


@app.command(name="caption")
def caption_command(
    image: Annotated[Path, typer.Argument(help="An image file.")],
    run: Annotated[Path, typer.Option(help="A run folder or a checkpoint file.")] = Path("runs/captioning"),
    beams: Annotated[int, typer.Option(min=1, help="1: greedy.")] = 5,
    length_penalty: PenaltyOption = 1.0,
    out: Annotated[Path | None, typer.Option(help="Save a picture of where the model looks at each word.")] = None,
) -> None:
    """Caption an image."""
    model, vocabulary, _ = load_captioner(run)
    pixels = read_image(image, model.config.image_size)
    written = write_captions(model, vocabulary, pixels.unsqueeze(0), beams=beams, length_penalty=length_penalty)[0]
    console.print(written.text, highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        draw_looks(model, vocabulary, [pixels], [written], out)
        console.print(f"written: {out}", highlight=False, soft_wrap=True)


def draw_looks(
    model: Captioner, vocabulary: Vocabulary, images: Sequence[Tensor], written: Sequence[Written], path: Path
) -> None:
    """A picture of where the model looks at each word of its captions, a row an image."""
    from models import plots

    if not model.config.attention:
        raise ValueError("this model was trained without attention: it looks nowhere")
    rows = []
    for image, caption in zip(images, written, strict=True):
        tokens = [*vocabulary.split(caption.ids), "(end)"]
        encoded = model.encode(prepare(image.unsqueeze(0).to(model.bias.device), model.config.image_size))
        ids = torch.tensor([caption.ids[: len(tokens)]], device=model.bias.device)
        shares = model.looks(encoded, ids)[0].cpu()
        side = round(shares.shape[-1] ** 0.5)
        rows.append((image, tokens[: len(shares)], shares.unflatten(-1, (side, side))))
    plots.word_attention(rows, path)


def main(arguments: Iterable[str] | None = None) -> int:
    """Run the command line; foreseeable errors end it with one clear line instead of a traceback."""
    return run_app(app, arguments)


if __name__ == "__main__":
    # Under its own name too, so that pickles and imports elsewhere see one module, not two.
    sys.modules.setdefault("models.captioning", sys.modules["__main__"])
    sys.exit(main())
