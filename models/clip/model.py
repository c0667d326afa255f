"""CLIP: an image encoder and a text encoder that place an image and its caption at one point.

The model follows Radford et al. 2021 (arXiv:2103.00020): a Vision Transformer, a causal text Transformer read at its
end token, a linear projection of each, and a learned temperature. The largest preset is ViT-B/32, whose parameters have
the names of open_clip's, so that state dicts pass from one to the other as they are. A convolutional stem may replace
the patches; the small presets have it, for it learns much faster from few images.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.common.layers import MLP, ConvStem, Transformer


@dataclass(frozen=True)
class VisionConfig:
    """The image encoder reads patches, or has a convolutional stem: a width for each stage, which halves the side."""

    image_size: int = 224
    patch_size: int = 32
    width: int = 768
    layers: int = 12
    heads: int = 12
    stem: tuple[int, ...] = ()
    stem_depths: tuple[int, ...] = ()
    # The class token, as CLIP; the mean of all tokens; or all patches side by side, which keeps what is where.
    pool: Literal["class", "mean", "grid"] = "class"


@dataclass(frozen=True)
class TextConfig:
    """The text encoder, or ``frozen``: the name of one that is trained already and stays as it is.

    A frozen encoder is no part of the model: its unit features, ``width`` numbers for each text, come in the place of
    tokens (locked-text tuning: Zhai et al. 2022, arXiv:2111.07991). The model adapts them by a residual MLP, which
    starts as nothing, and a projection (:meth:`CLIP.spread_texts`): names of things that look alike can part.
    """

    context_length: int = 77
    vocab_size: int = 49408
    width: int = 512
    layers: int = 12
    heads: int = 8
    frozen: str = ""


@dataclass(frozen=True)
class ClipConfig:
    """A CLIP model; ``scale`` is the logit scale (the inverse temperature) to start from.

    ``centred`` puts a batch norm without parameters behind each projection. Fresh encoders map all images to nearly one
    direction (mean cosine 0.94 was seen), and the loss first has to undo that; centred features start apart.
    """

    embed_dim: int = 512
    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    quick_gelu: bool = False
    scale: float = 1 / 0.07
    centred: bool = False

    @staticmethod
    def from_dict(values: dict[str, Any]) -> ClipConfig:
        """The config that :func:`dataclasses.asdict` made ``values`` from (JSON's lists become tuples again)."""
        vision: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values["vision"].items()}
        return ClipConfig(**{**values, "vision": VisionConfig(**vision), "text": TextConfig(**values["text"])})


PresetName = Literal["nano", "tiny", "small", "vit-b-32"]

PRESETS: dict[PresetName, ClipConfig] = {
    # Tests use this one: a few hundred thousand parameters.
    "nano": ClipConfig(
        embed_dim=32,
        vision=VisionConfig(32, 8, 32, 1, 2, (16, 32, 32), (0, 0, 0)),
        text=TextConfig(24, 2048, 32, 1, 2),
        scale=10.0,
        centred=True,
    ),
    # What two CPU cores train in five minutes.
    "tiny": ClipConfig(
        embed_dim=256,
        vision=VisionConfig(32, 16, 256, 1, 4, (32, 64, 128, 256), (0, 1, 1, 1), "grid"),
        text=TextConfig(32, 16384, 192, 2, 3),
        scale=20.0,
        centred=True,
    ),
    # An hour or more on two cores.
    "small": ClipConfig(
        embed_dim=256,
        vision=VisionConfig(48, 16, 256, 2, 4, (32, 64, 128, 256), (0, 1, 1, 2), "grid"),
        text=TextConfig(32, 16384, 192, 2, 3),
        scale=20.0,
        centred=True,
    ),
    "vit-b-32": ClipConfig(),
}


class VisionTransformer(nn.Module):
    """Image encoder: patches (or a convolutional stem), a class token, a Transformer, a projection."""

    def __init__(self, config: VisionConfig, embed_dim: int, quick_gelu: bool = False) -> None:
        super().__init__()
        width = config.width
        self.pool = config.pool
        self.conv1: nn.Module
        if config.stem:
            stride = 2 ** len(config.stem)
            self.conv1 = ConvStem(config.stem, config.stem_depths, width)
        else:
            stride = config.patch_size
            self.conv1 = nn.Conv2d(3, width, stride, stride=stride, bias=False)
        if config.image_size % stride:
            raise ValueError(f"image_size {config.image_size} is not a multiple of the {stride} pixels of a token")
        tokens = (config.image_size // stride) ** 2 + 1
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, config.layers, config.heads, quick_gelu=quick_gelu)
        self.ln_post = nn.LayerNorm(width)
        pooled = width * (tokens - 1) if config.pool == "grid" else width
        self.proj = nn.Parameter(pooled**-0.5 * torch.randn(pooled, embed_dim))

    def forward(self, images: Tensor) -> Tensor:
        """images [B, 3, S, S] -> features [B, E]."""
        x = self.conv1(images).flatten(2).transpose(1, 2)  # [B, HW, C]
        x = torch.cat([self.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
        x = self.ln_pre(x + self.positional_embedding.to(x.dtype))
        x = self.transformer(x)
        if self.pool == "grid":
            return self.ln_post(x[:, 1:]).flatten(1) @ self.proj
        return self.ln_post(x[:, 0] if self.pool == "class" else x.mean(1)) @ self.proj


class CLIP(nn.Module):
    """Both encoders and the temperature, kept as the logarithm of the logit scale."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        text = config.text
        self.visual = VisionTransformer(config.vision, config.embed_dim, config.quick_gelu)
        if text.frozen:
            self.adapter = nn.Sequential(nn.LayerNorm(text.width), MLP(text.width, 4 * text.width))
        else:
            self.transformer = Transformer(text.width, text.layers, text.heads, quick_gelu=config.quick_gelu)
            self.token_embedding = nn.Embedding(text.vocab_size, text.width)
            self.positional_embedding = nn.Parameter(torch.empty(text.context_length, text.width))
            self.ln_final = nn.LayerNorm(text.width)
        self.text_projection = nn.Parameter(torch.empty(text.width, config.embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(config.scale)))
        if config.centred:
            self.image_norm = nn.BatchNorm1d(config.embed_dim, affine=False)
            self.text_norm = nn.BatchNorm1d(config.embed_dim, affine=False)
        if text.frozen:
            nn.init.orthogonal_(self.text_projection)
            mlp = self.adapter[1]
            assert isinstance(mlp, MLP)
            nn.init.zeros_(mlp.c_proj.weight)
            nn.init.zeros_(mlp.c_proj.bias)
        else:
            nn.init.normal_(self.token_embedding.weight, std=0.02)
            nn.init.normal_(self.positional_embedding, std=0.01)
            nn.init.normal_(self.text_projection, std=text.width**-0.5)

    def encode_image(self, images: Tensor, normalize: bool = True) -> Tensor:
        """images [B, 3, S, S] -> [B, E], unit vectors unless ``normalize`` is False."""
        features = self.visual(images)
        if self.config.centred:
            features = self.image_norm(features.float())
        return F.normalize(features.float(), dim=-1) if normalize else features

    def encode_text(self, tokens: Tensor | Sequence[Tensor], normalize: bool = True) -> Tensor:
        """tokens [B, L], or parts of a batch of lengths of their own -> [B, E].

        Where the text encoder is frozen, ``tokens`` are its features [B, width].
        """
        parts = [tokens] if isinstance(tokens, Tensor) else list(tokens)
        if self.config.text.frozen:
            read = torch.cat(parts)
            read = read * self.config.text.width**0.5 + self.adapter(read)
        else:
            read = torch.cat([self.read_tokens(part) for part in parts])
        features = read @ self.text_projection
        if self.config.centred:
            features = self.text_norm(features.float())
        return F.normalize(features.float(), dim=-1) if normalize else features

    def read_tokens(self, tokens: Tensor) -> Tensor:
        """tokens [B, L] -> [B, width], read at the end token, whose id is the highest of all."""
        x = self.token_embedding(tokens) + self.positional_embedding[: tokens.shape[1]]
        x = self.ln_final(self.transformer(x, causal=True))
        return x[torch.arange(x.shape[0], device=x.device), tokens.argmax(-1)]

    def forward(self, images: Tensor, tokens: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Unit image features, unit text features, and the logit scale."""
        return self.encode_image(images), self.encode_text(tokens), self.logit_scale.exp()

    @torch.no_grad()
    def spread_texts(self, features: Tensor, power: float = 0.35) -> None:
        """Start the projection of a frozen encoder's features from the captions' own [n, width], partly whitened.

        Captions differ much in few directions and little in many; a caption is told from its like by the latter, which
        this lengthens by (variance + a tenth of the mean variance) ** -power. The whole of it, a power of 0.5, would
        forget which captions are alike.
        """
        variances, axes = torch.linalg.eigh(torch.cov(features.double().T))
        whitening = axes * (variances + 0.1 * variances.mean()) ** -power @ axes.T
        self.text_projection.copy_(whitening / whitening.square().sum(0).mean().sqrt())

    @torch.no_grad()
    def clamp_scale(self, largest: float = 100.0) -> None:
        """Keep the logit scale between 1 and ``largest``, as CLIP does: beyond it training is unstable."""
        self.logit_scale.clamp_(0, math.log(largest))


def trim_padding(tokens: Tensor) -> Tensor:
    """Cut the columns that are padding in every row; exact, for the encoder is causal and read at the end token."""
    longest = int(tokens.argmax(-1).max()) + 1
    return tokens[:, :longest]
