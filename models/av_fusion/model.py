"""Audio-visual fusion: an image and a sound of one thing, either of them noisy, named by a model that reads both.

A small convolutional encoder reads each modality, and they meet in one of three ways: early (features joined, then a
head), late (a head each; decisions averaged, or combined with learned weights), or by attention, where a class token
attends to the tokens of both. That attention is one call of ``mmkernels.divided_attention``, in which a modality stands
for a frame. In training some examples lack a modality (modality dropout, Neverova et al. 2014, arXiv:1501.00102);
Baltrusaitis et al. 2017 (arXiv:1705.09406) survey the ways to fuse.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkernels
from models.common.layers import MLP, conv_stages

MODALITIES = ("image", "audio")
Fusion = Literal["image", "audio", "early", "late", "weighted", "attention"]
FUSIONS: tuple[Fusion, ...] = ("image", "audio", "early", "late", "weighted", "attention")


@dataclass(frozen=True)
class FusionConfig:
    """A model of images and sounds.

    ``fusion`` is "image" or "audio" (one modality alone), "early" (features joined, then a head), "late" (a head each,
    the mean of their probabilities), "weighted" (a head each, the sum of their log-probabilities with learned weights)
    or "attention". An encoder has a stage for each of ``widths``, which halves the side of its input; what it finds is
    averaged to ``tokens``, a square number of places of an image and as many moments of a sound, for every fusion.
    ``hidden`` is the width of the MLP behind the attention; the heads of the other fusions are as wide as gives them
    the same number of parameters. ``impl`` chooses the implementation of the op.
    """

    fusion: Fusion = "attention"
    classes: int = 10
    channels: int = 1  # channels of an image
    image_size: int = 28
    samples: int = 6144  # samples of a sound, 8,000 per second
    bands: int = 32  # mel bands of its spectrogram
    window: int = 256
    hop: int = 192
    widths: tuple[int, ...] = (16, 32, 64)
    hidden: int = 128
    heads: int = 4
    tokens: int = 4
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto"

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model reads."""
        return (self.fusion,) if self.fusion in MODALITIES else MODALITIES

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> FusionConfig:
        """The config that :func:`dataclasses.asdict` made ``values`` from (JSON's lists become tuples again)."""
        return FusionConfig(**{**values, "widths": tuple(values["widths"])})


PresetName = Literal["nano", "tiny", "small"]

PRESETS: dict[PresetName, FusionConfig] = {
    # Tests use this one: a few thousand parameters.
    "nano": FusionConfig(image_size=16, samples=2048, bands=16, hop=128, widths=(8, 16), hidden=16, heads=2),
    # What two CPU cores train in half a minute.
    "tiny": FusionConfig(),
    # Minutes.
    "small": FusionConfig(bands=40, hop=96, widths=(32, 64, 128), hidden=256, tokens=16),
}


def count_parameters(module: nn.Module) -> int:
    """How many numbers training sets."""
    return sum(parameter.numel() for parameter in module.parameters())


def head(inputs: int, classes: int, parameters: int) -> nn.Sequential:
    """Two layers, as wide between them as ``parameters`` allow."""
    hidden = max(1, (parameters - classes) // (inputs + 1 + classes))
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, classes))


class EarlyFusion(nn.Module):
    """The modalities' features side by side, zeros for one that is absent, and a head on them."""

    def __init__(self, config: FusionConfig, parameters: int) -> None:
        super().__init__()
        self.head = head(len(MODALITIES) * config.tokens * config.widths[-1], config.classes, parameters)

    def forward(self, tokens: Sequence[Tensor], present: Tensor) -> Tensor:
        """Tokens of each modality [B, N, C] and present [B, 2] -> logits [B, classes]."""
        return self.head((torch.stack(list(tokens), 1) * present[..., None, None]).flatten(1))


class LateFusion(nn.Module):
    """A head for each modality, and one decision of those that are present.

    The decision is the log of the mean of their probabilities; or, with ``learned`` weights, the weighted sum of their
    logs. A single modality is decided by its head alone.
    """

    def __init__(self, config: FusionConfig, parameters: int, learned: bool = False) -> None:
        super().__init__()
        inputs, share = config.tokens * config.widths[-1], parameters // len(MODALITIES)
        self.heads = nn.ModuleList(head(inputs, config.classes, share) for _ in config.modalities)
        self.log_weights = nn.Parameter(torch.zeros(len(self.heads))) if learned else None

    def forward(self, tokens: Sequence[Tensor], present: Tensor) -> Tensor:
        """Tokens of each modality [B, N, C] and present [B, modalities] -> logits [B, classes]."""
        logits = [head(x.flatten(1)) for head, x in zip(self.heads, tokens, strict=True)]
        decisions = torch.stack(logits, 1).float().log_softmax(-1)  # [B, modalities, classes]
        absent = ~present[..., None]
        if self.log_weights is None:
            return decisions.masked_fill(absent, float("-inf")).logsumexp(1)
        return (self.log_weights.exp()[:, None] * decisions).masked_fill(absent, 0.0).sum(1)


class ModalityAttention(nn.Module):
    """Multi-head self-attention among a class token and the tokens of all modalities that are present.

    A modality is a frame of ``mmkernels.divided_attention``: one that is absent is a frame that is masked.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        if width % config.heads:
            raise ValueError(f"width {width} is not a multiple of the {config.heads} heads")
        self.heads, self.impl = config.heads, config.impl
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, present: Tensor) -> Tensor:
        """x [B, 1 + 2 N, C] and present [B, 2] -> [B, 1 + 2 N, C]."""
        y = mmkernels.divided_attention(
            self.qkv(x),
            num_frames=len(MODALITIES),
            num_heads=self.heads,
            axis="joint",
            frame_mask=present,
            impl=self.impl,
        )
        return self.proj(y)

    def class_shares(self, x: Tensor, present: Tensor) -> Tensor:
        """How much the class token attends to each token, the mean of the heads: [B, 1 + 2 N]."""
        maps = mmkernels.divided_attention_maps(
            self.qkv(x),
            torch.zeros(1, dtype=torch.long, device=x.device),
            num_frames=len(MODALITIES),
            num_heads=self.heads,
            axis="joint",
            frame_mask=present,
        )
        return maps.mean(1)[:, 0]


class AttentionFusion(nn.Module):
    """A class token that attends to the tokens of both modalities, an MLP, and a linear head.

    A modality is a frame of ``mmkernels.divided_attention``, its tokens are the patches of the frame, and all attend to
    all of those that are present ("joint"). How much the class token attends to a modality is the modality's weight.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        width = config.widths[-1]
        self.class_embedding = nn.Parameter(0.5 * torch.randn(width))
        self.token_embedding = nn.Parameter(0.1 * torch.randn(config.tokens, len(MODALITIES), width))
        self.ln_1 = nn.LayerNorm(width)
        self.attn = ModalityAttention(config)
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = MLP(width, config.hidden)
        self.ln_post = nn.LayerNorm(width)
        self.head = nn.Linear(width, config.classes)

    def embed(self, tokens: Sequence[Tensor]) -> Tensor:
        """Tokens of each modality [B, N, C] -> [B, 1 + 2 N, C], the class token first, then the modalities by turns."""
        x = torch.stack(list(tokens), 2)  # [B, N, 2, C]
        x = (x + self.token_embedding.to(x.dtype)).flatten(1, 2)
        return torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], 1)

    def forward(self, tokens: Sequence[Tensor], present: Tensor) -> Tensor:
        """Tokens of each modality [B, N, C] and present [B, 2] -> logits [B, classes]."""
        x = self.embed(tokens)
        x = x + self.attn(self.ln_1(x), present)
        x = x[:, 0]  # what follows is for each token alone
        return self.head(self.ln_post(x + self.mlp(self.ln_2(x))))

    def weights(self, tokens: Sequence[Tensor], present: Tensor) -> Tensor:
        """How much the class token attends to the image, to the sound and to itself, [B, 3], each row's sum 1."""
        x = self.ln_1(self.embed(tokens))
        shares = self.attn.class_shares(x, present)
        modalities = shares[:, 1:].unflatten(1, (-1, len(MODALITIES))).sum(1)
        return torch.cat([modalities, shares[:, :1]], 1)


class AVFusion(nn.Module):
    """An encoder for each modality that the model reads, and their fusion."""

    def __init__(self, config: FusionConfig) -> None:
        super().__init__()
        if config.fusion not in FUSIONS:
            raise ValueError(f"fusion must be one of {', '.join(FUSIONS)}; got {config.fusion!r}")
        side = round(config.tokens**0.5)
        if side**2 != config.tokens:
            raise ValueError(f"tokens: expected a square number, got {config.tokens}")
        self.config = config
        self.grids = {"image": (side, side), "audio": (1, config.tokens)}
        channels = {"image": config.channels, "audio": 1}
        self.encoders = nn.ModuleDict(
            {name: conv_stages(channels[name], config.widths, (0,) * len(config.widths)) for name in config.modalities}
        )
        self.fusion: EarlyFusion | LateFusion | AttentionFusion
        if config.fusion == "attention":
            self.fusion = AttentionFusion(config)
            return
        with torch.device("meta"):
            parameters = count_parameters(AttentionFusion(config))
        if config.fusion == "early":
            self.fusion = EarlyFusion(config, parameters)
        else:
            self.fusion = LateFusion(config, parameters, learned=config.fusion == "weighted")

    def _tokens(
        self, images: Tensor | None, spectrograms: Tensor | None, present: Tensor | None
    ) -> tuple[list[Tensor], Tensor]:
        """The tokens of what the model reads, [B, N, C] each, and which of them are present, [B, modalities]."""
        given = {"image": images, "audio": spectrograms}
        tokens = []
        for name, encoder in self.encoders.items():
            x = given[name]
            if x is None:
                raise ValueError(f"this model reads the modality {name}, which was not given")
            channels = self.config.channels if name == "image" else 1
            if x.ndim != 4 or x.shape[1] != channels:
                raise ValueError(f"{name}: expected shape [B, {channels}, H, W], got {tuple(x.shape)}")
            tokens.append(F.adaptive_avg_pool2d(encoder(x), self.grids[name]).flatten(2).transpose(1, 2))
        B = len(tokens[0])
        if present is None:
            present = torch.ones(B, len(MODALITIES), dtype=torch.bool, device=tokens[0].device)
        if present.dtype != torch.bool or present.shape != (B, len(MODALITIES)):
            raise ValueError(f"present: expected bool [B, 2] = ({B}, 2), got {present.dtype} {tuple(present.shape)}")
        if len(tokens) == 1:
            present = torch.ones_like(present[:, :1])  # it sees what it reads
        return tokens, present

    def forward(self, images: Tensor | None, spectrograms: Tensor | None, present: Tensor | None = None) -> Tensor:
        """images [B, C, S, S] and spectrograms [B, 1, F, T] -> logits [B, classes].

        ``present`` [B, 2] (bool) says which modalities of an example count; without it both do. A model of one modality
        takes None in the place of the other, and ``present`` means nothing to it.
        """
        return self.fusion(*self._tokens(images, spectrograms, present))

    @torch.no_grad()
    def weights(self, images: Tensor, spectrograms: Tensor, present: Tensor | None = None) -> Tensor:
        """The attention on the image, on the sound and on the class token itself, [B, 3]."""
        if not isinstance(self.fusion, AttentionFusion):
            raise ValueError(f"a model with {self.config.fusion} fusion has no attention weights")
        return self.fusion.weights(*self._tokens(images, spectrograms, present))
