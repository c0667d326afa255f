"""Metrics of retrieval and of classes, with what chance, the majority class and plain pixels reach."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.data.pixels import pixel_features

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
        """The numbers of one direction; ``ranks`` holds the rank of each query's right answer, counted from 0."""
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
    """Accuracy over all examples (micro), over classes (macro), and what the majority class gives."""

    micro: float
    macro: float
    majority: float
    classes: int
    chance: float


def accuracy(predicted: Tensor, truth: Tensor, classes: int) -> Accuracy:
    """Accuracy of class indices; classes without an image do not count in the macro mean."""
    # torchmetrics takes seconds to import, which training need not wait for.
    from torchmetrics.functional.classification import multiclass_accuracy

    micro = multiclass_accuracy(predicted, truth, num_classes=classes, average="micro")
    each = multiclass_accuracy(predicted, truth, num_classes=classes, average="none")
    present = torch.bincount(truth, minlength=classes) > 0
    most = max(Counter(truth.tolist()).values()) / len(truth)
    count = int(present.sum())
    return Accuracy(float(micro), float(each[present].mean()), most, count, 1 / count)


class PixelBaseline:
    """What the nearest training image, by pixels (16 x 16, centred cosine), knows about captions and classes.

    An image's score for a caption is its likeness to the most alike training drawing of that caption. The training
    captions that share most words with a caption stand in for it where training never saw it.
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
