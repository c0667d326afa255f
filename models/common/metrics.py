"""Metrics of retrieval, zero-shot classes and captions, with what chance, the majority class and plain pixels reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from pycocoevalcap.cider.cider import Cider
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy
from torchmetrics.functional.text import bleu_score

from models.data.captions import caption_words
from models.data.emoji import pixel_features

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True)
class Retrieval:
    """Recall and median rank (1 is best) of one direction."""

    r1: float
    r5: float
    r10: float
    median_rank: float

    @staticmethod
    def from_ranks(ranks: Tensor) -> Retrieval:
        """From the rank of each query's right answer, counted from 0."""
        r1, r5, r10 = (float((ranks < k).double().mean()) for k in RECALL_AT)
        # The lower of two middle ranks would flatter; the mean of both is what a median is.
        return Retrieval(r1, r5, r10, float(ranks.double().quantile(0.5)) + 1)

    @staticmethod
    def chance(size: int) -> Retrieval:
        """What guessing reaches on a gallery of ``size``, in the mean."""
        r1, r5, r10 = (min(1.0, k / size) for k in RECALL_AT)
        return Retrieval(r1, r5, r10, (size + 1) / 2)


def ranks_of_scores(scores: Tensor) -> Tensor:
    """The rank of the entry (i, i) in row i of scores [n, n]: how many are higher, or as high at a lower index."""
    own = torch.arange(len(scores), device=scores.device).unsqueeze(1)
    right = scores.gather(1, own)
    columns = torch.arange(scores.shape[1], device=scores.device)
    return ((scores > right) | ((scores == right) & (columns < own))).sum(1)


@dataclass(frozen=True)
class Accuracy:
    """Zero-shot accuracy over all images (micro), over classes (macro), and what the majority class gives."""

    micro: float
    macro: float
    majority: float
    classes: int
    chance: float


def accuracy(predicted: Tensor, truth: Tensor, classes: int) -> Accuracy:
    """Accuracy of class indices; classes without an image do not count in the macro mean."""
    micro = multiclass_accuracy(predicted, truth, num_classes=classes, average="micro")
    each = multiclass_accuracy(predicted, truth, num_classes=classes, average="none")
    present = torch.bincount(truth, minlength=classes) > 0
    most = max(Counter(truth.tolist()).values()) / len(truth)
    count = int(present.sum())
    return Accuracy(float(micro), float(each[present].mean()), most, count, 1 / count)


@dataclass(frozen=True)
class CaptionScores:
    """BLEU of up to 1 to 4 words and CIDEr-D (0 to 10) of a corpus, and the share of captions that are a reference."""

    bleu1: float
    bleu2: float
    bleu3: float
    bleu4: float
    cider: float
    exact: float


def _plain(text: str) -> str:
    return " ".join(caption_words(text))


def cider_of_each(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption; how much a word counts is taken from the references of all."""
    if len(texts) != len(references):
        raise ValueError(f"every caption needs its references: {len(texts)} captions, {len(references)} references")
    right = {i: [_plain(text) for text in own] for i, own in enumerate(references)}
    _, scores = Cider().compute_score(right, {i: [_plain(text)] for i, text in enumerate(texts)})
    return [float(score) for score in scores]


def caption_scores(texts: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """The scores of a corpus; case and punctuation do not count."""
    ciders = cider_of_each(texts, references)
    plain, right = [_plain(text) for text in texts], [[_plain(text) for text in own] for own in references]
    bleu1, bleu2, bleu3, bleu4 = (float(bleu_score(plain, right, n_gram=n)) for n in range(1, 5))
    exact = sum(text in own for text, own in zip(plain, right, strict=True))
    return CaptionScores(bleu1, bleu2, bleu3, bleu4, sum(ciders) / len(ciders), exact / len(plain))


def as_dict(value: Retrieval | Accuracy | CaptionScores) -> dict[str, float]:
    """Plain numbers, for the report."""
    return asdict(value)


class PixelBaseline:
    """What the nearest training image, by pixels (16 x 16, centred cosine), knows about captions and classes.

    An image's score for a caption is its likeness to the most alike training drawing of that caption. A caption that
    training never saw is stood in for by the training captions that share most words with it.
    """

    def __init__(self, images: Tensor, concept_ids: Tensor, names: Sequence[str]) -> None:
        self.features = pixel_features(images)
        self.ids, self.concept_of = torch.unique(concept_ids, return_inverse=True)
        self.names = [names[i] for i in self.ids.tolist()]
        self._position = {c: i for i, c in enumerate(self.ids.tolist())}

    def _concept_scores(self, images: Tensor) -> Tensor:
        """Likeness of each image to each training concept, [n, concepts]."""
        features, rows = pixel_features(images), []
        for part in features.split(256):
            scores = torch.full((len(part), len(self.ids)), -2.0)
            scores.scatter_reduce_(1, self.concept_of.expand(len(part), -1), part @ self.features.T, "amax")
            rows.append(scores)
        return torch.cat(rows)

    def scores(self, images: Tensor, concept_ids: Tensor, names: Sequence[str]) -> Tensor:
        """Scores [n, n] of images against the captions ``names`` of the same gallery."""
        likeness = self._concept_scores(images)
        columns = []
        words = [set(name.replace(":", "").replace(",", "").split()) for name in self.names]
        for concept, name in zip(concept_ids.tolist(), names, strict=True):
            if concept in self._position:
                columns.append(likeness[:, self._position[concept]])
                continue
            own = set(name.replace(":", "").replace(",", "").split())
            overlap = torch.tensor([len(own & w) / len(own | w) for w in words])
            nearest = (overlap == overlap.max()).nonzero().squeeze(1)
            columns.append(likeness[:, nearest].amax(1) if overlap.max() > 0 else torch.full((len(images),), -2.0))
        return torch.stack(columns, 1)

    def nearest_concepts(self, images: Tensor) -> list[int]:
        """The concept of the most alike training image, for each image."""
        return [int(self.ids[i]) for i in self._concept_scores(images).argmax(1)]
