"""Scores of captions against their references: BLEU, CIDEr-D, and the share that is exactly right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pycocoevalcap.cider.cider import Cider
from torchmetrics.functional.text import bleu_score

from models.data.captions import caption_words


@dataclass(frozen=True)
class CaptionScores:
    """BLEU of up to 1 to 4 words and CIDEr-D (0 to 10) of a corpus, and the share of captions that are a reference.

    CIDEr-D of fewer than two images is NaN.
    """

    bleu1: float
    bleu2: float
    bleu3: float
    bleu4: float
    cider: float
    exact: float


def _plain(text: str) -> str:
    return " ".join(caption_words(text))


def cider_of_each(texts: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """CIDEr-D of each caption; the references of all captions decide how much a word counts.

    A word counts by how few of the images have it: of fewer than two images the score says nothing, and is NaN.
    """
    if len(texts) != len(references):
        raise ValueError(f"every caption needs its references: {len(texts)} captions, {len(references)} references")
    if len(texts) < 2:
        return [float("nan")] * len(texts)
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
