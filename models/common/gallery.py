"""Retrieval between images and texts that two encoders bring together: what CLIP and the triplet model share.

Every number stands beside what it has to beat: chance, and the training image whose pixels are nearest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mmkernels
from models.common import plots
from models.common.metrics import PixelBaseline, Retrieval, ranks_of_scores
from models.data import ImageTextSet, Splits
from models.data.augment import prepare

WAYS = ("image to text", "text to image")


class DualEncoder(Protocol):
    """A model of two encoders whose unit features are compared."""

    def encode_image(self, images: Tensor) -> Tensor:
        """images [n, 3, S, S] -> [n, E]."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [n, L] -> [n, E]."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters."""

    def eval(self) -> object:
        """Switch to evaluation."""


@dataclass
class Encoder:
    """A trained model with its tokenizer, ready to encode images and texts in batches."""

    model: DualEncoder
    tokenize: Callable[[Sequence[str]], Tensor]
    image_size: int
    batch: int = 512

    def __post_init__(self) -> None:
        self.model.eval()

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """uint8 [n, 4, S, S] -> unit features [n, E] on the CPU."""
        parts = images.split(self.batch)
        found = [self.model.encode_image(prepare(part.to(self.device), self.image_size)) for part in parts]
        return torch.cat(found).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit features [n, E] on the CPU."""
        found = []
        for start in range(0, len(texts), self.batch):
            tokens = self.tokenize(texts[start : start + self.batch])
            found.append(self.model.encode_text(tokens.to(self.device)))
        return torch.cat(found).float().cpu()


class Baselines:
    """What the nearest training image by pixels scores, with every drawing cropped to its frame and as it comes."""

    def __init__(self, train: ImageTextSet) -> None:
        names = [c.name for c in train.concepts]
        self.framed = PixelBaseline(train.images, train.concept_ids, names)
        self.unframed = PixelBaseline(train.plain, train.concept_ids, names) if train.plain is not None else None

    def scores(self, data: ImageTextSet) -> dict[str, Tensor]:
        """Scores [n, n] of the images of a gallery against its captions, of each baseline."""
        found = {"pixels": self.framed.scores(data.images, data.concept_ids, data.names())}
        if self.unframed is not None and data.plain is not None:
            found["pixels, unframed"] = self.unframed.scores(data.plain, data.concept_ids, data.names())
        return found


def retrieval(images: Tensor, texts: Tensor, others: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Both directions of one gallery, from features [n, E] and the scores [n, n] of others, such as baselines."""
    found: dict[str, dict[str, Any]] = {}
    for way in WAYS:
        forth = way == WAYS[0]
        ranks = mmkernels.retrieval_ranks(images, texts) if forth else mmkernels.retrieval_ranks(texts, images)
        by = {"model": Retrieval.from_ranks(ranks)}
        for who, scores in others.items():
            by[who] = Retrieval.from_ranks(ranks_of_scores(scores if forth else scores.T))
        by["chance"] = Retrieval.chance(len(images))
        found[way] = {who: asdict(value) for who, value in by.items()}
    return found


def galleries(data: ImageTextSet, limit: int) -> dict[str, ImageTextSet]:
    """The headline gallery (no variants, at most ``limit`` concepts) and the full one, where they differ."""
    headline, full = data.gallery(limit=limit, variants=False), data.gallery()
    return {"base": headline, "full": full} if len(headline) < len(full) else {"full": full}


def evaluate_galleries(
    data: ImageTextSet,
    limit: int,
    images: Tensor,
    texts: Tensor,
    baselines: Baselines,
    further: Mapping[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Retrieval in each gallery of a set; features, and ``further`` scores [n, n], are those of its full gallery."""
    full = data.gallery()
    scores = {**(further or {}), **baselines.scores(full)}
    row_of = {concept: row for row, concept in enumerate(full.concept_ids.tolist())}
    found: dict[str, Any] = {}
    for kind, part in galleries(data, limit).items():
        rows = torch.tensor([row_of[c] for c in part.concept_ids.tolist()])
        own = {who: s[rows][:, rows] for who, s in scores.items()}
        found[kind] = {"size": len(part)} | retrieval(images[rows], texts[rows], own)
    return found


def pick_sets(splits: Splits, validation: bool) -> dict[str, ImageTextSet]:
    """The test sets, or the validation set alone; a ValueError where the data has none."""
    if validation:
        if splits.validation is None:
            raise ValueError("this data has no validation set: name one with --validation-style when training")
        return {"validation": splits.validation}
    if not splits.tests:
        raise ValueError("this data has no test set")
    return splits.tests


def save_report(report: Mapping[str, Any], path: Path) -> None:
    """Write the report as JSON."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def recalls(value: Mapping[str, float]) -> list[str]:
    """R@1, R@5 and R@10 as a table shows them."""
    return [f"{value[k]:.3f}" if value[k] >= 0.001 else f"{value[k]:.4f}" for k in ("r1", "r5", "r10")]


def print_retrieval(report: Mapping[str, Any], console: Console) -> None:
    """Print the retrieval table of a report."""
    table = Table(title="Retrieval (R@k higher is better, median rank lower; chance and nearest pixel beside)")
    for column in ("set", "gallery", "direction", "", "R@1", "R@5", "R@10", "median rank"):
        table.add_column(column, justify="right" if column.startswith(("R@", "med", "gal")) else "left")
    for name, entry in report["sets"].items():
        for kind, found in entry["retrieval"].items():
            for way in WAYS:
                for who, value in found[way].items():
                    first = who == "model"
                    table.add_row(
                        name if first and way == WAYS[0] else "",
                        f"{found['size']} {kind}" if first else "",
                        way if first else "",
                        f"[bold]{who}" if first else who,
                        *recalls(value),
                        f"{value['median_rank']:.0f}",
                        end_section=who == "chance",
                    )
    console.print(table)


def draw_gallery(encoder: Encoder, data: ImageTextSet, limit: int, out: Path) -> None:
    """Pictures of a set's headline gallery: cosines of some of it, and what random queries find."""
    gallery = data.gallery(limit=limit, variants=False)
    images, texts = encoder.images(gallery.images), encoder.texts(gallery.names())
    pick = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(1))[:24]
    plots.similarity(images[pick], texts[pick], gallery.select(pick), out / "similarity.png")
    plots.retrievals(images, texts, gallery, out / "retrieval.png")
