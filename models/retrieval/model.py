"""Cross-modal retrieval: images and captions in several languages in one space.

The model follows VSE++ (Faghri et al. 2018, arXiv:1707.05612): a convolutional image encoder and a text encoder (a bag
of tokens, a GRU or a Transformer), whose features are compared by their cosine.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common.layers import Transformer, conv_stages

PAD = 0  # the id that fills up a row of tokens

TextEncoderName = Literal["bag", "gru", "transformer"]
LossName = Literal["triplet", "info_nce", "siglip"]


@dataclass(frozen=True)
class RetrieverConfig:
    """A retrieval model. The image encoder has a stage for each of ``widths``; each halves the side of the image.

    ``centred`` puts a batch norm without parameters behind each projection: the features of fresh encoders all point to
    nearly one side, and a loss on cosines first has to undo that.
    """

    image_size: int = 48
    widths: tuple[int, ...] = (32, 64, 128, 256)
    depths: tuple[int, ...] = (0, 1, 1, 1)
    text: TextEncoderName = "gru"
    text_width: int = 256
    text_layers: int = 2  # layers of the Transformer
    text_heads: int = 4
    vocab_size: int = 8192
    max_tokens: int = 32
    embed_dim: int = 256
    centred: bool = True

    @staticmethod
    def from_dict(values: dict[str, Any]) -> RetrieverConfig:
        """The config that :func:`dataclasses.asdict` made ``values`` from (JSON's lists become tuples again)."""
        restored: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return RetrieverConfig(**restored)


PresetName = Literal["nano", "small", "base"]

PRESETS: dict[PresetName, RetrieverConfig] = {
    # Tests use this one.
    "nano": RetrieverConfig(
        32, (16, 32, 32), (0, 0, 0), text_width=32, text_layers=1, text_heads=2, vocab_size=512, embed_dim=32
    ),
    # What two CPU cores train in a quarter of an hour.
    "small": RetrieverConfig(),
    # Photographs.
    "base": RetrieverConfig(
        224,
        (64, 128, 256, 512, 512),
        (1, 1, 2, 2, 1),
        text_width=512,
        text_layers=4,
        text_heads=8,
        vocab_size=16384,
        embed_dim=512,
    ),
}


def lengths_of(tokens: Tensor) -> Tensor:
    """The tokens of each row [B, L], padding left out."""
    return (tokens != PAD).sum(1)


class BagEncoder(nn.Module):
    """The mean of the tokens' embeddings: no order."""

    def __init__(self, config: RetrieverConfig, vocabulary: int) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(vocabulary, config.text_width, mode="mean", padding_idx=PAD)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, C]."""
        return self.embedding(tokens)


class GRUEncoder(nn.Module):
    """A GRU in each direction, read where it has seen the whole text."""

    def __init__(self, config: RetrieverConfig, vocabulary: int) -> None:
        super().__init__()
        width = config.text_width
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.gru = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, C]."""
        # The GRU runs in float32 under autocast too: rounding errors would add up over its steps.
        with torch.autocast(tokens.device.type, enabled=False):
            packed = nn.utils.rnn.pack_padded_sequence(
                self.embedding(tokens), lengths_of(tokens).cpu(), batch_first=True, enforce_sorted=False
            )
            _, last = self.gru(packed)
        return last.transpose(0, 1).flatten(1)


class TransformerEncoder(nn.Module):
    """A causal Transformer, read at the end token."""

    def __init__(self, config: RetrieverConfig, vocabulary: int) -> None:
        super().__init__()
        width = config.text_width
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=PAD)
        self.position_embedding = nn.Parameter(0.01 * torch.randn(config.max_tokens, width))
        self.transformer = Transformer(width, config.text_layers, config.text_heads)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, C]."""
        # Four parts in order of length: most captions are short, and one part would pad them to the longest of all.
        lengths, order = lengths_of(tokens).sort()
        pooled = []
        for rows, own in zip(tokens[order].chunk(4), lengths.chunk(4), strict=True):
            part = rows[:, : int(own[-1])]
            x = self.transformer(self.embedding(part) + self.position_embedding[: part.shape[1]], causal=True)
            pooled.append(self.norm(x[torch.arange(len(x), device=x.device), own - 1]))
        return torch.cat(pooled)[order.argsort()]


TEXT_ENCODERS: dict[TextEncoderName, Callable[[RetrieverConfig, int], nn.Module]] = {
    "bag": BagEncoder,
    "gru": GRUEncoder,
    "transformer": TransformerEncoder,
}


class ImageEncoder(nn.Module):
    """A small convolutional network; its last map is read place by place, which keeps what is where."""

    def __init__(self, config: RetrieverConfig) -> None:
        super().__init__()
        stride = 2 ** len(config.widths)
        if config.image_size % stride:
            raise ValueError(f"image_size {config.image_size} is not a multiple of the encoder's stride, {stride}")
        self.stages = conv_stages(3, config.widths, config.depths)
        self.projection = nn.Linear(config.widths[-1] * (config.image_size // stride) ** 2, config.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> [B, E]."""
        return self.projection(self.stages(images).flatten(1))


class Retriever(nn.Module):
    """Both encoders, and the numbers that InfoNCE and SigLIP learn beside them."""

    def __init__(self, config: RetrieverConfig, vocabulary: int, loss: LossName) -> None:
        super().__init__()
        self.config = config
        self.image = ImageEncoder(config)
        self.text = TEXT_ENCODERS[config.text](config, vocabulary)
        self.text_projection = nn.Linear(config.text_width, config.embed_dim)
        if config.centred:
            self.image_norm = nn.BatchNorm1d(config.embed_dim, affine=False)
            self.text_norm = nn.BatchNorm1d(config.embed_dim, affine=False)
        assert isinstance(self.text.embedding, nn.Embedding | nn.EmbeddingBag)
        nn.init.normal_(self.text.embedding.weight, std=0.02)
        # The logarithm of the logit scale, as in CLIP, and SigLIP's bias; each paper's own start.
        scale = {"info_nce": 1 / 0.07, "siglip": 10.0}.get(loss)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(scale))) if scale is not None else None
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if loss == "siglip" else None

    def encode_image(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> unit features [B, E]."""
        features = self.image(images).float()
        return F.normalize(self.image_norm(features) if self.config.centred else features, dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> unit features [B, E]."""
        features = self.text_projection(self.text(tokens)).float()
        return F.normalize(self.text_norm(features) if self.config.centred else features, dim=-1)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features of images and texts."""
        return self.encode_image(images), self.encode_text(tokens)
