"""TimeSformer: a Vision Transformer for video whose attention is divided into time and space.

The model follows Bertasius et al. 2021 (arXiv:2102.05095) and their code: in each block every patch first attends to
the patches of its own position in all frames, then to the patches of its own frame. Every attention is one call of
``mmkernels.divided_attention``, which reads the tokens where they lie. The preset "base" is the paper's TimeSformer.
The small presets may have a convolutional stem instead of patches, which learns faster from few clips.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmkernels
from mmkernels.divided_attention import drop_frames, drop_positions
from models.common.layers import MLP, BlockNorm, ConvStem, TransformerBlock

AttentionType = Literal["divided", "joint", "space"]
ATTENTION_TYPES: tuple[AttentionType, ...] = ("space", "joint", "divided")


@dataclass(frozen=True)
class TimesformerConfig:
    """A TimeSformer.

    ``attention`` is "divided" (time, then space), "joint" (all patches of the clip at once) or "space" (each frame for
    itself; the frames' features are averaged before the last norm). ``stem``, where given, holds the widths of a
    convolutional stem; each of its stages halves the side. ``drop_path`` is the rate of the last block; the rates of
    the others rise to it from 0. ``impl`` chooses the implementation of the op.
    """

    image_size: int = 224
    patch_size: int = 16
    num_frames: int = 8
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    classes: int = 400
    attention: AttentionType = "divided"
    stem: tuple[int, ...] = ()
    qkv_bias: bool = True
    drop_path: float = 0.0
    attention_dropout: float = 0.0
    eps: float = 1e-6
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto"

    @property
    def stride(self) -> int:
        """The pixels that a token stands for, along a side."""
        return 2 ** len(self.stem) if self.stem else self.patch_size

    @property
    def grid(self) -> int:
        """Patches along a side of a frame."""
        return self.image_size // self.stride

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> TimesformerConfig:
        """The config that :func:`dataclasses.asdict` made ``values`` from (JSON's lists become tuples again)."""
        return TimesformerConfig(**{**values, "stem": tuple(values["stem"])})


PresetName = Literal["nano", "tiny", "small", "base"]

PRESETS: dict[PresetName, TimesformerConfig] = {
    # Tests use this one: a few ten thousand parameters.
    "nano": TimesformerConfig(16, 8, 4, 32, 2, 2),
    # What two CPU cores train in minutes.
    "tiny": TimesformerConfig(32, 8, 8, 128, 4, 4),
    # An hour on two cores.
    "small": TimesformerConfig(48, 8, 8, 192, 6, 6, drop_path=0.1),
    # The paper's TimeSformer: ViT-B/16, 8 frames of 224 x 224.
    "base": TimesformerConfig(),
}


class DividedAttention(nn.Module):
    """Multi-head self-attention of a class token and N T patches along one axis, by ``mmkernels.divided_attention``.

    The op reads qkv and writes its output where they lie.
    """

    def __init__(self, config: TimesformerConfig, axis: Literal["time", "space", "joint"]) -> None:
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"width {config.width} is not a multiple of the {config.heads} heads")
        self.axis, self.heads, self.dropout, self.impl = axis, config.heads, config.attention_dropout, config.impl
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, num_frames: int, frame_mask: Tensor | None = None) -> Tensor:
        """x [B, 1 + N T, C] -> [B, 1 + N T, C]; on the time axis the class token takes no part."""
        y = mmkernels.divided_attention(
            self.qkv(x),
            num_frames=num_frames,
            num_heads=self.heads,
            axis=self.axis,
            frame_mask=frame_mask,
            dropout_p=self.dropout if self.training else 0.0,
            impl=self.impl,
        )
        # The op averages the class token over the frames. The projection is linear, so it may follow the mean.
        return self.proj(y)

    def maps(self, x: Tensor, num_frames: int) -> Tensor:
        """How much every token attends to every other, the mean of the heads: [B, 1 + N T, 1 + N T]."""
        tokens = torch.arange(x.shape[1], device=x.device)
        qkv, axis = self.qkv(x), self.axis
        maps = mmkernels.divided_attention_maps(qkv, tokens, num_frames=num_frames, num_heads=self.heads, axis=axis)
        return maps.mean(1)


class Block(TransformerBlock):
    """Attention over time (if divided), attention over space or over all, and an MLP: each with a residual.

    In training, drop-path takes residuals away as the reference implementation does: in time for a position in all
    frames, in space for a whole frame (a class token's share in the mean over frames included), else for a clip.
    """

    def __init__(self, config: TimesformerConfig, drop_path: float) -> None:
        super().__init__()
        self.drop_path = drop_path
        self.divided = config.attention == "divided"
        if self.divided:
            self.ln_time = BlockNorm(config.width, eps=config.eps)
            self.time_attn = DividedAttention(config, "time")
            self.time_fc = nn.Linear(config.width, config.width)
        self.ln_1 = BlockNorm(config.width, eps=config.eps)
        self.attn = DividedAttention(config, "space" if self.divided else "joint")
        self.ln_2 = BlockNorm(config.width, eps=config.eps)
        self.mlp = MLP(config.width, int(config.width * config.mlp_ratio))

    def forward(self, x: Tensor, num_frames: int) -> Tensor:
        """x [B, 1 + N T, C] -> [B, 1 + N T, C], the frames of a position side by side."""
        if self.divided:
            x = self.over_time(x, num_frames)
            x = self.over_space(x, num_frames)
        else:
            x = x + self._drop_clips(self.attn(self.ln_1(x), 1))
        return x + self._drop_clips(self.mlp(self.ln_2(x)))

    def over_time(self, x: Tensor, num_frames: int) -> Tensor:
        """The temporal step; the class token stays as it is."""
        y = self.time_attn(self.ln_time(x), num_frames)
        if self.drop_path and self.training:
            y = y * drop_positions(y, num_frames, self.drop_path)
        return torch.cat([x[:, :1], x[:, 1:] + self.time_fc(y)[:, 1:]], 1)

    def over_space(self, x: Tensor, num_frames: int) -> Tensor:
        """The spatial step, whose class token is averaged over the frames."""
        if not (self.drop_path and self.training):
            return x + self.attn(self.ln_1(x), num_frames)
        # The op leaves out the frames that are dropped, and weights make the mean over all frames of what it gives.
        kept, weights = drop_frames(x, num_frames, self.drop_path)
        return x + self.attn(self.ln_1(x), num_frames, kept) * weights

    def _drop_clips(self, y: Tensor) -> Tensor:
        if not (self.drop_path and self.training):
            return y
        keep = 1 - self.drop_path
        return y / keep * torch.floor(torch.rand((len(y), 1, 1), dtype=y.dtype, device=y.device) + keep)


class TimeSformer(nn.Module):
    """Patches of every frame, embeddings of position and time, blocks, and a classifier on the class token."""

    def __init__(self, config: TimesformerConfig) -> None:
        super().__init__()
        if config.attention not in ATTENTION_TYPES:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION_TYPES)}; got {config.attention!r}")
        if config.image_size % config.stride:
            raise ValueError(
                f"image_size {config.image_size} is not a multiple of the {config.stride} pixels of a token"
            )
        self.config = config
        width = config.width
        self.conv1: nn.Module
        if config.stem:
            self.conv1 = ConvStem(config.stem, (0,) * len(config.stem), width)
        else:
            self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size)
        self.class_embedding = nn.Parameter(torch.empty(width))
        self.positional_embedding = nn.Parameter(torch.empty(1 + config.grid**2, width))
        if config.attention != "space":
            self.time_embedding = nn.Parameter(torch.empty(config.num_frames, width))
        rates = [config.drop_path * i / max(1, config.layers - 1) for i in range(config.layers)]
        self.blocks = nn.ModuleList(Block(config, rate) for rate in rates)
        self.ln_post = nn.LayerNorm(width, eps=config.eps)
        self.head = nn.Linear(width, config.classes)
        self._initialise()

    def _initialise(self) -> None:
        """Draw weights as CLIP's, for training from nothing: matrices by width, residual projections by depth too.

        The authors start from an image model, and therefore with attention over time switched off (zero ``time_fc``
        and time embeddings). A model that starts from nothing needs embeddings of position and time as large as what
        they are added to, as sines would be: with the usual 0.02 small models see no order of frames for hundreds of
        steps.
        """
        width = self.config.width
        residual = width**-0.5 * (2 * self.config.layers) ** -0.5
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                std = residual if name.endswith(("proj", "c_proj")) else width**-0.5
                nn.init.normal_(module.weight, std=(2 * width) ** -0.5 if name.endswith("c_fc") else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("_embedding"):
                nn.init.normal_(parameter, std=0.7)

    def embed(self, videos: Tensor) -> Tensor:
        """videos [B, T, 3, H, W] -> tokens [B, 1 + N T, C], or [B T, 1 + N, C] where frames do not meet.

        Embeddings of other sizes and lengths than the config's are interpolated (to the nearest, as the reference).
        """
        if videos.ndim != 5 or videos.shape[2] != 3:
            raise ValueError(f"videos: expected shape [B, T, 3, H, W], got {tuple(videos.shape)}")
        B, T = videos.shape[:2]
        if any(side % self.config.stride for side in videos.shape[3:]):
            raise ValueError(
                f"videos: expected sides that are multiples of the {self.config.stride} pixels of a token, "
                f"got {tuple(videos.shape[3:])}"
            )
        patches = self.conv1(videos.flatten(0, 1))  # [B T, C, h, w]
        position = self.positional_embedding[1:].T.unflatten(1, (self.config.grid, -1))  # [C, g, g]
        if position.shape[1:] != patches.shape[2:]:
            position = F.interpolate(position[None], patches.shape[2:], mode="nearest")[0]
        patches = (patches + position.to(patches.dtype)).flatten(2)  # [B T, C, N]
        cls = (self.class_embedding + self.positional_embedding[0]).to(patches.dtype)
        if self.config.attention == "space":
            x = patches.transpose(1, 2)
        else:
            moment = self.time_embedding.T  # [C, T]
            if moment.shape[1] != T:
                moment = F.interpolate(moment[None], T, mode="nearest")[0]
            x = patches.unflatten(0, (B, T)).permute(0, 3, 1, 2) + moment.T.to(patches.dtype)  # [B, N, T, C]
            x = x.flatten(1, 2)
        return torch.cat([cls.expand(len(x), 1, -1), x], 1)

    def features(self, videos: Tensor) -> Tensor:
        """videos [B, T, 3, H, W] -> what the classifier reads, [B, C]."""
        x, frames = self.embed(videos), videos.shape[1]
        for block in self.blocks:
            x = block(x, frames)
        x = x[:, 0]
        if self.config.attention == "space":
            x = x.unflatten(0, (-1, frames)).mean(1)
        return self.ln_post(x)

    def forward(self, videos: Tensor) -> Tensor:
        """videos [B, T, 3, H, W], normalised -> logits [B, classes]."""
        return self.head(self.features(videos))

    @torch.no_grad()
    def rollout(self, videos: Tensor) -> Tensor:
        """How much the class token draws on each patch through all blocks: [B, T, h, w], each clip's sum 1.

        Attention rollout (Abnar and Zuidema 2020, arXiv:2005.00928): the product of the blocks' attention, each mixed
        with the residual by halves.
        """
        x, frames = self.embed(videos), videos.shape[1]
        eye = torch.eye(x.shape[1], device=x.device)
        flow = eye.expand(len(x), -1, -1)
        for block in self.blocks:
            assert isinstance(block, Block)
            if block.divided:
                over_time = block.time_attn.maps(block.ln_time(x), frames)
                over_time[:, 0, 0] = 1  # the class token is only its residual there
                flow = (eye + over_time) / 2 @ flow
                space = block.attn.maps(block.ln_1(block.over_time(x, frames)), frames)
            else:
                space = block.attn.maps(block.ln_1(x), 1)
            flow = (eye + space) / 2 @ flow
            x = block(x, frames)
        shares = flow[:, 0, 1:]
        height, width = (side // self.config.stride for side in videos.shape[3:])
        if self.config.attention == "space":
            grid = shares.view(len(videos), frames, height, width)
        else:
            grid = shares.view(len(videos), height, width, frames).permute(0, 3, 1, 2)
        return grid / grid.sum((1, 2, 3), keepdim=True)
