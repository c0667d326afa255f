"""Evaluation of CLIP: zero-shot classes and retrieval on every test set, each number beside what it has to beat."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.clip.model import CLIP, trim_padding
from models.clip.text import FrozenText
from models.common.console import console, say
from models.common.gallery import (
    Baselines,
    Encoder,
    draw_gallery,
    evaluate_galleries,
    pick_sets,
    print_retrieval,
    save_report,
)
from models.common.metrics import accuracy
from models.common.plots import curves
from models.common.runs import announce_files, read_history
from models.data import ImageTextSet, Splits, Tokenizer
from models.data.sets import Concept

# One over the temperature of an image's probabilities over the words of classes.
WORD_SCALE = 10.0


def clip_encoder(model: CLIP, reader: Tokenizer | FrozenText) -> Encoder:
    """The encoder of a trained CLIP; ``reader`` is its :func:`models.clip.text.text_reader`."""
    if isinstance(reader, FrozenText):
        return Encoder(model, reader, model.config.vision.image_size)
    return Encoder(model, lambda texts: trim_padding(reader(texts)), model.config.vision.image_size)


def class_features(
    read: Callable[[Sequence[str]], Tensor], words: Mapping[str, Sequence[str]], templates: Sequence[str]
) -> Tensor:
    """One unit vector per class: the mean over all its words in all templates, [classes, E]."""
    rows = []
    for own in words.values():
        features = read([template.format(word) for word in own for template in templates])
        rows.append(F.normalize(features.mean(0), dim=0))
    return torch.stack(rows)


class ClassWords(NamedTuple):
    """What stands for the classes of a label set: unit vectors, each of one class."""

    features: Tensor  # [words, width]
    owners: Tensor  # [words], the index of the class
    classes: int

    @classmethod
    def of_means(cls, means: Tensor) -> ClassWords:
        """One vector per class, [classes, width]."""
        return cls(means, torch.arange(len(means), device=means.device), len(means))

    def nearest(self, features: Tensor) -> Tensor:
        """The likeliest class of unit features [n, width], [n]: its probability is the sum over its words of theirs."""
        likelihoods = (WORD_SCALE * features @ self.features.T).exp()
        return likelihoods.new_zeros(len(features), self.classes).index_add(1, self.owners, likelihoods).argmax(1)


def class_words(
    read: Callable[[Sequence[str]], Tensor], words: Mapping[str, Sequence[str]], templates: Sequence[str]
) -> ClassWords:
    """One unit vector per word of each class: the mean over all templates."""
    listed = [word for own in words.values() for word in own]
    features = read([template.format(word) for word in listed for template in templates])
    means = features.unflatten(0, (len(listed), len(templates))).mean(1)
    owners = torch.tensor([i for i, own in enumerate(words.values()) for _ in own], device=means.device)
    return ClassWords(F.normalize(means, dim=1), owners, len(words))


def full_caption(concept: Concept) -> str:
    """The name of a concept and all its keywords."""
    return ", ".join([concept.name, *concept.keywords])


class Meanings:
    """Places images and texts in the space of a frozen text encoder, as it is.

    Training bends the model's own space to tell captions apart, and other words were never met there. An image's place
    is the mean meaning of the training captions (names with keywords) that the model finds in it, weighted by their
    softmax (convex combination of semantic embeddings: Norouzi et al. 2014, arXiv:1312.5650).
    """

    def __init__(self, encoder: Encoder, train: ImageTextSet) -> None:
        assert isinstance(encoder.tokenize, FrozenText)
        assert isinstance(encoder.model, CLIP)
        self.read = encoder.tokenize
        trained = [train.concepts[concept] for concept in train.rows_by_concept()]
        known = [concept for concept in trained if not concept.variant]
        self.names = {name for concept in trained for name in concept.texts}
        scale = float(encoder.model.logit_scale.detach().exp())
        self.keys = scale * encoder.texts([concept.name for concept in known])
        meanings = self.read([full_caption(concept) for concept in known])
        self.centre = meanings.mean(0)
        self.meanings = meanings - self.centre

    def images(self, images: Tensor) -> Tensor:
        """Unit features of images [n, E] -> unit vectors [n, width]."""
        return F.normalize((images @ self.keys.T).softmax(1) @ self.meanings, dim=1)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit vectors [n, width]."""
        return F.normalize(self.read(texts) - self.centre, dim=1)

    def know(self, texts: Sequence[str]) -> bool:
        """Whether training met one of these texts as a caption."""
        return not self.names.isdisjoint(texts)

    def beside(self, images: Tensor, captions: Tensor, texts: Sequence[str]) -> Tensor:
        """Scores [n, m] of images for captions that training never met: the mean of the model's cosine and of meanings.

        ``images`` [n, E] and ``captions`` [m, E] are unit features of the model, ``texts`` the captions in words.
        """
        return (images @ captions.T + self.images(images) @ self.texts(texts).T) / 2


def search(encoder: Encoder, train: ImageTextSet, images: Tensor, texts: Sequence[str]) -> Tensor:
    """Scores [texts, n] of images [n, 4, S, S]: cosines of the model, or of meanings for words that no caption has."""
    features = encoder.images(images)
    scores = encoder.texts(texts) @ features.T
    if isinstance(encoder.tokenize, FrozenText):
        meanings = Meanings(encoder, train)
        free = [row for row, text in enumerate(texts) if text.lower() not in meanings.names]
        if free:
            scores[free] = meanings.texts([texts[row] for row in free]) @ meanings.images(features).T
    return scores


class ZeroShot:
    """Finds the class of an image by the words of the classes; no label is seen.

    With a frozen text encoder images and classes meet by their meanings, and a class is as likely as all its words
    together; without, a class is the mean of its words.
    """

    def __init__(self, encoder: Encoder, splits: Splits) -> None:
        self.meanings = Meanings(encoder, splits.train) if isinstance(encoder.tokenize, FrozenText) else None
        self.texts = self.meanings.texts if self.meanings is not None else encoder.texts
        self.classes = {
            name: self._class_words(encoder, words, splits.templates) for name, words in splits.label_sets.items()
        }

    def _class_words(
        self, encoder: Encoder, words: Mapping[str, Sequence[str]], templates: Sequence[str]
    ) -> ClassWords:
        if self.meanings is None:
            return ClassWords.of_means(class_features(encoder.texts, words, templates))
        return class_words(self.meanings.read, words, templates)

    def __call__(self, images: Tensor, label_set: str) -> Tensor:
        """Unit features of images [n, E] -> the index of each one's class, [n]."""
        if self.meanings is not None:
            images = self.meanings.images(images)
        return self.classes_of(images, label_set)

    def of_words(self, data: ImageTextSet, label_set: str) -> Tensor:
        """The class by the words of each image's own concept, [n]: what an image encoder without fault would reach.

        A variant (skin tone) takes the words of its group's first concept that is none, as :class:`Meanings` would.
        """
        plain: dict[str, Concept] = {}
        for concept in data.concepts:
            if not concept.variant:
                plain.setdefault(concept.group, concept)
        own = (data.concepts[concept] for concept in data.concept_ids.tolist())
        captions = [full_caption(plain.get(c.group, c) if c.variant else c) for c in own]
        return self.classes_of(self.texts(captions), label_set)

    def classes_of(self, features: Tensor, label_set: str) -> Tensor:
        """Unit features [n, width], where classes lie too -> the index of each one's class, [n]."""
        return self.classes[label_set].nearest(features)


def evaluate(
    encoder: Encoder,
    splits: Splits,
    sets: Mapping[str, ImageTextSet] | None = None,
    until: float = math.inf,
) -> dict[str, Any]:
    """The report: for every test set its galleries and label sets, as plain numbers.

    ``sets`` defaults to the test sets; hyper-parameters are chosen on ``{"validation": splits.validation}`` alone.
    After ``until``, by ``time.monotonic()``, no further set is begun, and a note says so.
    """
    baselines = Baselines(splits.train)
    report: dict[str, Any] = {"data": splits.name, "notes": list(splits.notes), "sets": {}}
    zero_shot = ZeroShot(encoder, splits)
    for name, data in (splits.tests if sets is None else sets).items():
        if report["sets"] and time.monotonic() > until:
            report["notes"].append(f"not evaluated, for the time was over: {name}")
            continue
        full = data.gallery()
        names = full.names()
        images, texts = encoder.images(full.images), encoder.texts(names)
        further = {}
        if zero_shot.meanings is not None and not zero_shot.meanings.know(names):
            further["model and meanings"] = zero_shot.meanings.beside(images, texts, names)
        found = evaluate_galleries(data, splits.gallery_limit, images, texts, baselines, further)
        entry: dict[str, Any] = {"retrieval": found, "zero_shot": {}}
        nearest = baselines.framed.nearest_concepts(full.images)
        for label_set, words in splits.label_sets.items():
            index = {label: i for i, label in enumerate(words)}
            truth = torch.tensor([index[label] for label in full.labels(label_set)])
            guess = zero_shot(images, label_set)
            by_pixel = torch.tensor([index[data.concepts[c].labels[label_set]] for c in nearest])
            value = asdict(accuracy(guess, truth, len(index)))
            for who, other in (("pixel", by_pixel), ("words", zero_shot.of_words(full, label_set))):
                beside = accuracy(other, truth, len(index))
                value |= {f"{who}_micro": beside.micro, f"{who}_macro": beside.macro}
            entry["zero_shot"][label_set] = value
        report["sets"][name] = entry
    return report


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the tables of a report."""
    print_retrieval(report, console)
    if any(entry["zero_shot"] for entry in report["sets"].values()):
        table = Table(
            title="Zero-shot accuracy (words: an image's own name and keywords in its place, as if it were understood "
            "whole; pixels: the class of the nearest training image, which knows the labels)"
        )
        numbers = ("micro", "macro", "words_micro", "words_macro", "majority", "chance", "pixel_micro", "pixel_macro")
        for column in ("set", "classes", *(number.replace("_", " ") for number in numbers)):
            table.add_column(column, justify="left" if column == "set" else "right")
        for name, entry in report["sets"].items():
            for label_set, value in entry["zero_shot"].items():
                table.add_row(name, f"{value['classes']} {label_set}", *(f"{value[k]:.3f}" for k in numbers))
        console.print(table)
    for note in report["notes"]:
        say(note, "dim")


def draw(encoder: Encoder, data: ImageTextSet, limit: int, out: Path, batch_size: int | None) -> None:
    """The pictures of a run in ``out``: the headline gallery of a set, and the curves of the training.

    ``batch_size``, the captions in a training batch, places the chance line in the plot of the loss.
    """
    draw_gallery(encoder, data, limit, out)
    if history := read_history(out):
        curves(
            history,
            out / "curves.png",
            loss="InfoNCE loss",
            chance=math.log(batch_size) if batch_size else None,
            second=("scale", "logit scale (1 / temperature)", "Temperature"),
        )


def evaluate_run(
    encoder: Encoder, splits: Splits, out: Path, *, validation: bool = False, batch_size: int | None = None
) -> dict[str, Any]:
    """Print the tables of a model, and write ``report.json`` and the pictures to ``out``."""
    sets = pick_sets(splits, validation)
    report = evaluate(encoder, splits, sets)
    out.mkdir(parents=True, exist_ok=True)
    save_report(report, out / "report.json")
    print_report(report, console)
    draw(encoder, next(iter(sets.values())), splits.gallery_limit, out, batch_size)
    announce_files(out, "curves.png", "similarity.png", "retrieval.png", "report.json")
    return report
