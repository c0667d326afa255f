"""What every image-text data source hands out: concepts with captions, and drawings (or photos) of them.

A *concept* is what a caption names. Several images may show one concept, and then none of them is a wrong answer for
its caption: batches therefore never hold a concept twice, nor two concepts that share a caption, and retrieval counts
any image of a concept only once.
"""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

BadDataPolicy = Literal["skip", "raise"]
_LARGEST = 4096  # pixels: the square round a longer drawing, however thin this is, would take gigabytes


class BadDataError(ValueError):
    """A file of the data set that cannot be used; the message names the file and says what is wrong with it."""


@dataclass(frozen=True)
class Concept:
    """One thing that a caption names.

    ``name`` is the caption that evaluation uses; ``captions`` are others as good, and ``keywords`` further words, for
    training. ``names`` holds the name in each language that is known, by its code. ``group`` ties together concepts
    that must not be split between training and the unseen test set (skin tones of one emoji, say). ``variant`` marks
    concepts that the headline gallery leaves out. ``labels`` maps a label set to a class.
    """

    name: str
    group: str
    keywords: tuple[str, ...] = ()
    captions: tuple[str, ...] = ()
    variant: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def texts(self) -> tuple[str, ...]:
        """Every caption, the name first."""
        return tuple(dict.fromkeys((self.name, *self.captions, *self.names.values())))


@dataclass
class ImageTextSet:
    """Images [n, 4, S, S] (uint8, straight alpha), each with the index of its concept and of its style.

    ``plain``, where the source keeps it, holds small versions of the same images [n, 4, s, s] without framing: a pixel
    baseline on them shows how much the framing alone gives.
    """

    images: Tensor
    concept_ids: Tensor
    style_ids: Tensor
    concepts: Sequence[Concept]
    styles: Sequence[str]
    plain: Tensor | None = None

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.dtype != torch.uint8 or self.images.dim() != 4 or self.images.shape[1] != 4:
            raise ValueError(f"images must be uint8 [n, 4, S, S]; got {self.images.dtype} {tuple(self.images.shape)}")
        if len(self.concept_ids) != n or len(self.style_ids) != n:
            raise ValueError(
                f"every image needs a concept and a style: {n} images, {len(self.concept_ids)} concepts, "
                f"{len(self.style_ids)} styles"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> int:
        """The side of an image in pixels."""
        return int(self.images.shape[-1])

    def select(self, rows: Tensor) -> ImageTextSet:
        """The images of ``rows``; concepts and styles keep their indices."""
        plain = self.plain[rows] if self.plain is not None else None
        ids, styles = self.concept_ids[rows], self.style_ids[rows]
        return ImageTextSet(self.images[rows], ids, styles, self.concepts, self.styles, plain)

    def rows_by_concept(self) -> dict[int, list[int]]:
        """The rows that show each concept, in order."""
        rows: dict[int, list[int]] = {}
        for row, concept in enumerate(self.concept_ids.tolist()):
            rows.setdefault(concept, []).append(row)
        return rows

    def gallery(self, *, limit: int | None = None, variants: bool = True, seed: int = 0) -> ImageTextSet:
        """One image for each concept and name: a gallery on which every name has exactly one right image.

        ``limit`` draws that many concepts at random (by ``seed``); ``variants=False`` leaves variants out.
        """
        by_name: dict[str, int] = {}
        for concept, rows in self.rows_by_concept().items():
            if variants or not self.concepts[concept].variant:
                by_name.setdefault(self.concepts[concept].name, rows[0])
        firsts = list(by_name.values())
        if limit is not None and limit < len(firsts):
            order = torch.randperm(len(firsts), generator=torch.Generator().manual_seed(seed))[:limit]
            firsts = [firsts[i] for i in sorted(order.tolist())]
        return self.select(torch.tensor(firsts, dtype=torch.long))

    def names(self, language: str | None = None) -> list[str]:
        """The name of each image's concept, as evaluation uses it or in one language."""
        own = [self.concepts[c] for c in self.concept_ids.tolist()]
        return [concept.name if language is None else concept.names[language] for concept in own]

    def languages(self) -> list[str]:
        """The languages in which the name of some image is known, in the order in which they occur."""
        return list(dict.fromkeys(code for c in self.concept_ids.tolist() for code in self.concepts[c].names))

    def labels(self, label_set: str) -> list[str]:
        """The class of each image in one label set."""
        return [self.concepts[c].labels[label_set] for c in self.concept_ids.tolist()]


@dataclass
class Splits:
    """A training set and the test sets that go with it; ``notes`` says in words what was dropped and held out.

    ``validation`` is what hyper-parameters may be chosen on; the sets of ``tests`` are for reporting alone.
    ``gallery_limit`` is the size of the headline gallery.
    """

    name: str
    train: ImageTextSet
    tests: dict[str, ImageTextSet]
    validation: ImageTextSet | None = None
    label_sets: Mapping[str, Mapping[str, Sequence[str]]] = field(default_factory=dict)
    templates: Sequence[str] = ("{}.",)
    gallery_limit: int = 1000
    notes: list[str] = field(default_factory=list)

    def all_sets(self) -> dict[str, ImageTextSet]:
        """Every set by name, the training set first."""
        sets = {"train": self.train}
        if self.validation is not None:
            sets["validation"] = self.validation
        return sets | self.tests


def found_from_anywhere(source: str, *named: str) -> str:
    """Data as a run keeps it: a path or a pattern of shards as an absolute one, a built-in source by its name."""
    is_path = source not in named and (Path(source).exists() or source.endswith(".tar"))
    return str(Path(source).resolve()) if is_path else source


def hash_share(name: str) -> float:
    """A number in 0..1 from the hash of a name: a split by it does not change when other names come or go."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


def hold_out_validation(splits: Splits, share: float, seed: int = 0) -> Splits:
    """The same data with ``share`` of the training set's groups, picked by hash, as its validation set."""
    concepts = splits.train.concepts

    def held(concept: int) -> bool:
        return hash_share(f"{seed}:validation:{concepts[concept].group}") < share

    mask = torch.tensor([held(concept) for concept in splits.train.concept_ids.tolist()])
    if not mask.any() or mask.all():
        raise ValueError(f"{len(mask)} training images are too few to hold {share:.0%} of them out for validation")
    note = f"{int(mask.sum())} training images held out for validation"
    return replace(
        splits,
        train=splits.train.select((~mask).nonzero().squeeze(1)),
        validation=splits.train.select(mask.nonzero().squeeze(1)),
        notes=[*splits.notes, note],
    )


class BadDataLog:
    """Counts the files that could not be used; with policy "raise" the first one ends the run."""

    def __init__(self, policy: BadDataPolicy = "skip", warn: Callable[[str], None] | None = None) -> None:
        if policy not in ("skip", "raise"):
            raise ValueError(f"on_bad_data must be 'skip' or 'raise'; got {policy!r}")
        self.policy = policy
        self.warn = warn
        self.files: list[str] = []
        self._known: set[str] = set()
        self.reasons: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self.files)

    def report(self, file: str, reason: str) -> None:
        """Note one bad file; raises :class:`BadDataError` if the policy says so."""
        message = f"{file}: {reason}"
        if self.policy == "raise":
            raise BadDataError(f"{message} (leave the default --on-bad-data skip to go on without such files)")
        if file in self._known:
            return  # met again: an evaluation reads its videos more than once
        self._known.add(file)
        self.files.append(file)
        self.reasons[reason] += 1
        if self.warn is not None:
            self.warn(f"skipped {message}")

    def summary(self) -> str:
        """One line with the count and the first names; empty if nothing was skipped."""
        if not self.files:
            return ""
        more = f" and {len(self.files) - 3} more" if len(self.files) > 3 else ""
        return f"skipped {len(self.files)} bad file(s): {', '.join(self.files[:3])}{more}"


def open_image(data: bytes, *, name: str) -> Image.Image:
    """Decode an image file's bytes; raises :class:`BadDataError`, naming ``name``, where they are no whole image."""
    try:
        if data.startswith(b"\x89PNG"):  # load() decodes pixels without a look at their checksums
            with Image.open(io.BytesIO(data)) as image:
                image.verify()
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # decodes all of it: a truncated file shows only now
            return in_8_bits(ImageOps.exif_transpose(image)).convert("RGBA")
    except UnidentifiedImageError:
        raise BadDataError(f"{name}: not an image") from None
    except Exception as error:  # each of Pillow's decoders raises errors of its own
        raise BadDataError(f"{name}: cannot be decoded ({error or type(error).__name__})") from error


def in_8_bits(image: Image.Image) -> Image.Image:
    """An image of 16-bit grey values scaled to 8 bits, any other as it is; a ValueError for values without a scale."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65535:
        raise ValueError(f"its {image.mode} pixels have no known white: save it with 8 or 16 bits")
    return Image.fromarray(np.round(values / 257).astype(np.uint8))


def decode_image(data: bytes, size: int, *, name: str) -> Tensor:
    """Decode an image file's bytes to uint8 [4, size, size], framed by :func:`fit_square`."""
    return fit_square(open_image(data, name=name), size)


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """Scale a square RGBA image to uint8 [4, size, size]."""
    # "RGBa" is premultiplied: scaling straight alpha would bleed the colour of invisible pixels into the edges.
    scaled = image.convert("RGBa").resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0).convert("RGBA")
    return torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous()


def fit_square(image: Image.Image, size: int, *, margin: float = 0.04) -> Tensor:
    """Frame an RGBA image the same way whatever its source, as uint8 [4, size, size].

    Transparent borders are cut (drawing styles differ in nothing as much as in their margins) and the rest is centred
    on a transparent square; an opaque image is cropped to its central square, as CLIP does.
    """
    if image.getchannel("A").getextrema()[0] == 255:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        square = image.crop((left, top, left + side, top + side))
    else:
        # Alpha below 16 is the soft shadow of an edge, not content.
        box = image.getchannel("A").point([255 if a >= 16 else 0 for a in range(256)]).getbbox()
        if box is not None:
            image = image.crop(box)
        if max(image.size) > _LARGEST:
            image = image.convert("RGBa")
            image.thumbnail((_LARGEST, _LARGEST))
            image = image.convert("RGBA")
        side = max(1, round(max(image.size) * (1 + 2 * margin)))
        square = Image.new("RGBA", (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return to_tensor(square, size)


def read_image(path: Path, size: int) -> Tensor:
    """Read an image file to uint8 [4, size, size]; raises :class:`BadDataError` that names it."""
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as error:  # a ValueError for a path with a NUL
        raise BadDataError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    return decode_image(data, size, name=str(path))
