"""Evaluation of CLIP: zero-shot classes and retrieval on every test set, each number beside what it has to beat."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.clip import CLIP, trim_padding
from models.data import ImageTextSet, Splits, Tokenizer
from models.data.augment import prepare
from models.metrics import Accuracy, PixelBaseline, Retrieval, accuracy, as_dict, ranks_of_diagonal, ranks_of_scores


@dataclass
class Encoder:
    """A trained model with its tokenizer, ready to encode images and texts in batches."""

    model: CLIP
    tokenizer: Tokenizer
    batch: int = 512

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return self.model.logit_scale.device

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """uint8 [n, 4, S, S] -> unit features [n, E] on the CPU."""
        size = self.model.config.vision.image_size
        parts = [self.model.encode_image(prepare(part.to(self.device), size)) for part in images.split(self.batch)]
        return torch.cat(parts).float().cpu()

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """Texts -> unit features [n, E] on the CPU."""
        parts = []
        for start in range(0, len(texts), self.batch):
            tokens = trim_padding(self.tokenizer(texts[start : start + self.batch]))
            parts.append(self.model.encode_text(tokens.to(self.device)))
        return torch.cat(parts).float().cpu()

    def classes(self, words: Mapping[str, Sequence[str]], templates: Sequence[str]) -> Tensor:
        """One unit vector a class: the mean over all its words in all templates, [classes, E]."""
        rows = []
        for own in words.values():
            features = self.texts([template.format(word) for word in own for template in templates])
            rows.append(F.normalize(features.mean(0), dim=0))
        return torch.stack(rows)


def retrieval(images: Tensor, texts: Tensor, baselines: Mapping[str, Tensor]) -> dict[str, dict[str, Retrieval]]:
    """Both directions of one gallery, from features [n, E] and the scores [n, n] of each baseline."""
    return {
        "image to text": {
            "model": Retrieval.from_ranks(ranks_of_diagonal(images, texts)),
            **{name: Retrieval.from_ranks(ranks_of_scores(scores)) for name, scores in baselines.items()},
            "chance": Retrieval.chance(len(images)),
        },
        "text to image": {
            "model": Retrieval.from_ranks(ranks_of_diagonal(texts, images)),
            **{name: Retrieval.from_ranks(ranks_of_scores(scores.T)) for name, scores in baselines.items()},
            "chance": Retrieval.chance(len(images)),
        },
    }


def galleries(data: ImageTextSet, limit: int) -> dict[str, ImageTextSet]:
    """The headline gallery (no variants, at most ``limit`` concepts) and the full one, where they differ."""
    headline, full = data.gallery(limit=limit, variants=False), data.gallery()
    return {"base": headline, "full": full} if len(headline) < len(full) else {"full": full}


def evaluate(encoder: Encoder, splits: Splits, sets: Mapping[str, ImageTextSet] | None = None) -> dict[str, Any]:
    """The report: for every test set its galleries and label sets, as plain numbers.

    ``sets`` defaults to the test sets; hyper-parameters are chosen on ``{"validation": splits.validation}`` alone.
    """
    encoder.model.eval()
    train = splits.train
    names = [c.name for c in train.concepts]
    pixels = PixelBaseline(train.images, train.concept_ids, names)
    unframed = PixelBaseline(train.plain, train.concept_ids, names) if train.plain is not None else None
    report: dict[str, Any] = {"data": splits.name, "notes": list(splits.notes), "sets": {}}
    prototypes = {name: encoder.classes(words, splits.templates) for name, words in splits.label_sets.items()}
    for name, data in (splits.tests if sets is None else sets).items():
        full = data.gallery()
        images, texts = encoder.images(full.images), encoder.texts(full.names())
        scores = {"pixels": pixels.scores(full.images, full.concept_ids, full.names())}
        if unframed is not None and full.plain is not None:
            scores["pixels, unframed"] = unframed.scores(full.plain, full.concept_ids, full.names())
        row_of = {concept: row for row, concept in enumerate(full.concept_ids.tolist())}
        entry: dict[str, Any] = {"retrieval": {}, "zero_shot": {}}
        for kind, part in galleries(data, splits.gallery_limit).items():
            rows = torch.tensor([row_of[c] for c in part.concept_ids.tolist()])
            result = retrieval(images[rows], texts[rows], {who: s[rows][:, rows] for who, s in scores.items()})
            entry["retrieval"][kind] = {"size": len(part)} | {
                way: {who: as_dict(value) for who, value in found.items()} for way, found in result.items()
            }
        nearest = pixels.nearest_concepts(full.images)
        for label_set, words in splits.label_sets.items():
            index = {label: i for i, label in enumerate(words)}
            truth = torch.tensor([index[label] for label in full.labels(label_set)])
            guess = (images @ prototypes[label_set].T).argmax(1)
            by_pixel = torch.tensor([index[data.concepts[c].labels[label_set]] for c in nearest])
            model: Accuracy = accuracy(guess, truth, len(index))
            base = accuracy(by_pixel, truth, len(index))
            entry["zero_shot"][label_set] = as_dict(model) | {"pixel_micro": base.micro, "pixel_macro": base.macro}
        report["sets"][name] = entry
    return report


def save_report(report: Mapping[str, Any], path: Path) -> None:
    """Write the report as JSON."""
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the tables of a report."""
    table = Table(title="Retrieval (R@k higher is better, median rank lower; chance and nearest pixel beside)")
    for column in ("set", "gallery", "direction", "", "R@1", "R@5", "R@10", "median rank"):
        table.add_column(column, justify="right" if column.startswith(("R@", "med", "gal")) else "left")
    for name, entry in report["sets"].items():
        for kind, found in entry["retrieval"].items():
            for way in ("image to text", "text to image"):
                for who in found[way]:
                    value, first = found[way][who], who == "model"
                    table.add_row(
                        name if first and way == "image to text" else "",
                        f"{found['size']} {kind}" if first else "",
                        way if first else "",
                        f"[bold]{who}" if first else who,
                        *(f"{value[k]:.3f}" if value[k] >= 0.001 else f"{value[k]:.4f}" for k in ("r1", "r5", "r10")),
                        f"{value['median_rank']:.0f}",
                        end_section=who == "chance",
                    )
    console.print(table)
    if any(entry["zero_shot"] for entry in report["sets"].values()):
        table = Table(title="Zero-shot accuracy (pixels: the class of the nearest training image)")
        for column in ("set", "classes", "micro", "macro", "majority", "chance", "pixels micro", "pixels macro"):
            table.add_column(column, justify="left" if column == "set" else "right")
        for name, entry in report["sets"].items():
            for label_set, value in entry["zero_shot"].items():
                numbers = ("micro", "macro", "majority", "chance", "pixel_micro", "pixel_macro")
                table.add_row(name, f"{value['classes']} {label_set}", *(f"{value[k]:.3f}" for k in numbers))
        console.print(table)
    for note in report["notes"]:
        console.print(f"[dim]{note}")
