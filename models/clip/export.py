"""CLIP as a torch.export program with free batch sizes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from models.clip.model import CLIP
from models.data import Tokenizer


class ExportClip(nn.Module):
    """What is exported: images and tokens (or a frozen encoder's features) to unit features and the logit scale."""

    def __init__(self, model: CLIP) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same as :meth:`CLIP.forward`."""
        return self.model(images, tokens)


def export_model(model: CLIP, path: Path) -> float:
    """Save a torch.export program with free batch sizes; returns its largest difference from the eager model."""
    model = model.eval()
    size, text = model.config.vision.image_size, model.config.text
    tokenizer = None if text.frozen else Tokenizer(text.context_length, text.vocab_size)

    def inputs(images: int, texts: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(images)
        words = ["a red apple", "grinning face", "flag", "dog", "sun behind cloud"]
        read = tokenizer(words[:texts]) if tokenizer else torch.randn(texts, text.width, generator=generator)
        return torch.randn(images, 3, size, size, generator=generator), read

    shapes = ({0: torch.export.Dim("images")}, {0: torch.export.Dim("texts")})
    program = torch.export.export(ExportClip(model), inputs(3, 4), dynamic_shapes=shapes)
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, path)
    # Checked as a user will run it: read back from disk, with other batch sizes than it was traced with.
    loaded, check = torch.export.load(path).module(), inputs(2, 5)
    with torch.no_grad():
        pairs = zip(loaded(*check), model(*check), strict=True)
        return max(float((a - b).abs().max()) for a, b in pairs)
