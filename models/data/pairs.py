"""What every audio-visual data source hands out, and how examples get their noise: images and sounds of one class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.data.audio import LogMel
from models.data.batches import generator_of


@dataclass
class PairSet:
    """Labelled images, and the sounds that may go with them.

    An image goes with any sound of its group: where anyone may have spoken the word, the group is the class; where a
    sound belongs to one image, the pair. ``voices`` says who speaks in each sound.
    """

    images: Tensor  # uint8 [n, C, S, S]
    labels: Tensor  # [n]
    groups: Tensor  # [n]
    clips: Tensor  # int16 [m, L], a sound and silence after it
    lengths: Tensor  # [m], of the sounds
    clip_groups: Tensor  # [m]
    voices: Sequence[str]  # m
    classes: Sequence[str]

    def __post_init__(self) -> None:
        n, m = len(self.images), len(self.clips)
        if self.images.dtype != torch.uint8 or self.images.dim() != 4:
            raise ValueError(f"images must be uint8 [n, C, S, S]; got {self.images.dtype} {tuple(self.images.shape)}")
        if self.clips.dtype != torch.int16 or self.clips.dim() != 2:
            raise ValueError(f"clips must be int16 [m, L]; got {self.clips.dtype} {tuple(self.clips.shape)}")
        if len(self.labels) != n or len(self.groups) != n:
            raise ValueError(f"{n} images need as many labels and groups; got {len(self.labels)}, {len(self.groups)}")
        if len(self.lengths) != m or len(self.clip_groups) != m or len(self.voices) != m:
            raise ValueError(f"{m} clips need as many lengths, groups and voices")
        # The sounds of a group side by side: one is drawn by a number.
        self._order = self.clip_groups.argsort(stable=True)
        count = int(max(self.groups.max(), self.clip_groups.max())) + 1 if n and m else 0
        self._counts = torch.bincount(self.clip_groups, minlength=count)
        self._starts = self._counts.cumsum(0) - self._counts
        if n and (self._counts[self.groups] == 0).any():
            raise ValueError("every image needs a sound of its group")

    def __len__(self) -> int:
        return len(self.images)

    def partners(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """A sound for each image of ``rows``, any of its group."""
        groups = self.groups[rows]
        chosen = torch.rand(len(rows), generator=generator, dtype=torch.float64) * self._counts[groups]
        return self._order[self._starts[groups] + chosen.long()]

    def describe(self) -> str:
        """Its size, its chance level and its largest class."""
        most = torch.bincount(self.labels, minlength=len(self.classes)).max().item() / len(self.labels)
        speakers = len(set(self.voices))
        return (
            f"{len(self)} images, {len(self.clips)} sounds of {speakers} voice{'s' * (speakers > 1)}, "
            f"chance {1 / len(self.classes):.3f}, largest class {most:.3f}"
        )


@dataclass
class PairSplits:
    """A training set and the sets that go with it; hyper-parameters are chosen on ``validation`` alone."""

    name: str
    train: PairSet
    tests: Mapping[str, PairSet]
    validation: PairSet | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        sets = {"train": self.train} | ({"validation": self.validation} if self.validation else {}) | dict(self.tests)
        self.notes = [*self.notes, *(f"{name}: {data.describe()}" for name, data in sets.items())]


Range = tuple[float, float]


@dataclass(frozen=True)
class Noise:
    """How bad examples are: each draws its own three levels, evenly between the two ends of each range.

    ``snr`` is in decibels: the mean power of a sound over its own length above that of white noise over all of the
    clip. ``sigma`` is the deviation of white noise on pixels that go from 0 to 1; ``hidden`` the share of the image
    behind a square of one grey at a random place. A level is drawn for each example and each modality on its own, so
    that nothing but the example itself says which modality to trust.
    """

    snr: Range = field(default=(-9.0, 15.0), metadata={"help": "Range of the sounds' signal-to-noise ratio in dB."})
    sigma: Range = field(default=(0.0, 1.0), metadata={"help": "Range of the deviation of pixel noise."})
    hidden: Range = field(default=(0.0, 0.4), metadata={"help": "Range of the share of an image that is hidden."})

    def __post_init__(self) -> None:
        for name in ("snr", "sigma", "hidden"):
            low, high = getattr(self, name)
            if not low <= high:
                raise ValueError(f"{name}: expected a range from low to high, got {low} to {high}")
        if self.sigma[0] < 0:
            raise ValueError(f"sigma: expected deviations of 0 or more, got {self.sigma[0]}")
        if self.hidden[0] < 0 or self.hidden[1] > 1:
            raise ValueError(f"hidden: expected shares from 0 to 1, got {self.hidden[0]} to {self.hidden[1]}")

    def fixed(self, **levels: float) -> Noise:
        """The same with some levels the same for every example."""
        return replace(self, **{name: (level, level) for name, level in levels.items()})


def _draw(span: Range, count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator) * (span[1] - span[0]) + span[0]


def noisy_images(images: Tensor, sigma: Tensor, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """uint8 [b, C, S, S] -> float, a square of each hidden and noise over all of it."""
    b, _, _, side = images.shape
    x = images.float() / 255
    edge = hidden.sqrt() * side
    corner = torch.rand((b, 2), generator=generator) * (side - edge)[:, None]
    middle = torch.arange(side) + 0.5
    down, across = ((middle >= at[:, None]) & (middle < (at + edge)[:, None]) for at in corner.T)
    grey = torch.rand(b, generator=generator)
    x = torch.where((down[:, :, None] & across[:, None])[:, None], grey[:, None, None, None], x)
    return x + sigma[:, None, None, None] * torch.randn(x.shape, generator=generator)


def noisy_waves(clips: Tensor, lengths: Tensor, snr: Tensor, generator: torch.Generator) -> Tensor:
    """int16 [b, L] -> float, each sound of power 1 somewhere in its clip, under noise of the ratio."""
    b, samples = clips.shape
    x = clips.float()
    power = x.square().sum(1) / lengths
    start = (torch.rand(b, generator=generator) * (samples - lengths + 1)).long()
    source = torch.arange(samples) - start[:, None]
    moved = x.gather(1, torch.where(source < 0, source + samples, source))
    noise = torch.randn((b, samples), generator=generator)
    return moved * power.rsqrt()[:, None] + 10 ** (-snr / 20)[:, None] * noise


@dataclass
class PairBatch:
    """``images`` [B, C, S, S] and ``spectrograms`` [B, 1, F, T] as a model reads them, with their levels of noise.

    ``present`` [B, 2] says whether the model may see the image, and whether the sound.
    """

    images: Tensor
    spectrograms: Tensor
    present: Tensor
    labels: Tensor
    snr: Tensor
    sigma: Tensor
    hidden: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> PairBatch:
        """The same batch on ``device``."""
        return PairBatch(**{name: value.to(device) for name, value in vars(self).items()})

    def split(self, size: int) -> Iterator[PairBatch]:
        """The same examples in smaller batches."""
        for start in range(0, len(self), size):
            yield PairBatch(**{name: value[start : start + size] for name, value in vars(self).items()})


def draw_pairs(data: PairSet, rows: Tensor, noise: Noise, mel: LogMel, generator: torch.Generator) -> PairBatch:
    """Examples of the images ``rows``: a sound for each, and noise on both."""
    levels = {name: _draw(getattr(noise, name), len(rows), generator) for name in ("snr", "sigma", "hidden")}
    partners = data.partners(rows, generator)
    images = noisy_images(data.images[rows], levels["sigma"], levels["hidden"], generator)
    waves = noisy_waves(data.clips[partners], data.lengths[partners], levels["snr"], generator)
    present = torch.ones(len(rows), 2, dtype=torch.bool)
    return PairBatch(2 * images - 1, mel(waves), present, data.labels[rows], **levels)


def fixed_pairs(data: PairSet, count: int, noise: Noise, mel: LogMel, seed: int = 0) -> PairBatch:
    """``count`` examples for evaluation, the same each time: every image as often as any other, or once more."""
    rows = torch.arange(count) % len(data)
    return draw_pairs(data, rows, noise, mel, generator_of(seed, 21))


class PairPlan:
    """Training batches as a function of (seed, step); an epoch is one pass over the images in a fresh order.

    ``dropout`` is the share of examples that lack a modality, either one as often; none lacks both. ``drawn`` holds
    the batches drawn so far by plans of the same data, noise, size and seed, for models trained one after the other.
    """

    def __init__(
        self,
        data: PairSet,
        noise: Noise,
        mel: LogMel,
        *,
        batch_size: int,
        dropout: float = 0.0,
        seed: int = 0,
        drawn: dict[int, PairBatch] | None = None,
    ) -> None:
        self.data, self.noise, self.mel, self.drawn = data, noise, mel, drawn
        self.batch_size, self.dropout, self.seed = batch_size, dropout, seed
        self.steps_per_epoch = len(data) // batch_size
        if self.steps_per_epoch == 0:
            raise ValueError(f"batch size {batch_size} exceeds the {len(data)} images of an epoch: choose a smaller")
        self._epoch: tuple[int, Tensor] | None = None

    def __call__(self, step: int) -> PairBatch:
        """The batch of one step."""
        batch = self.drawn.get(step) if self.drawn is not None else None
        if batch is None:
            batch = self._draw(step)
            if self.drawn is not None:
                self.drawn[step] = batch
        generator = generator_of(self.seed, 3, step)
        lacking = torch.rand(len(batch), generator=generator) < self.dropout
        which = F.one_hot(torch.randint(2, (len(batch),), generator=generator), 2).bool()
        return replace(batch, present=~(which & lacking[:, None]))

    def _draw(self, step: int) -> PairBatch:
        epoch, index = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = epoch, torch.randperm(len(self.data), generator=generator_of(self.seed, 1, epoch))
        rows = self._epoch[1][index * self.batch_size : (index + 1) * self.batch_size]
        return draw_pairs(self.data, rows, self.noise, self.mel, generator_of(self.seed, 2, step))
