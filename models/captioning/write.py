"""Captions of images: written greedily or by beam search, and drawn with where the model looked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models.captioning.model import Captioner
from models.captioning.plots import word_attention
from models.data import ImageTextSet, Vocabulary
from models.data.augment import prepare


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


def draw_looks(
    model: Captioner, vocabulary: Vocabulary, images: Sequence[Tensor], written: Sequence[Written], path: Path
) -> None:
    """Draw where the model looks at each word of its captions, one row per image."""
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
    word_attention(rows, path)
