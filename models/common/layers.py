"""Transformer and convolution blocks that the reference models share.

Parameter names follow open_clip's, so that its state dicts load as they are.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x): the activation of OpenAI's original weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply the activation."""
        return x * torch.sigmoid(1.702 * x)


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False) -> Tensor:
    """Softmax attention of [B, H, L, D] tensors."""
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16) and q.shape[-2] <= 128:
        # The CPU's flash kernel spends its time on conversions if sequences are short: forward and backward of 512
        # sequences of 10 tokens took 67 ms with it, and 7 ms with these lines.
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if causal:
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


class Attention(nn.Module):
    """Multi-head self-attention with one matrix for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of the {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        """x [B, L, C] -> [B, L, C]; ``causal`` hides later positions."""
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(-1, (3, self.heads, -1)).unbind(2)
        y = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two linear layers around an activation."""

    def __init__(self, width: int, hidden: int, quick_gelu: bool = False) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.gelu = QuickGELU() if quick_gelu else nn.GELU()
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        return self.c_proj(self.gelu(self.c_fc(x)))


class TransformerBlock(nn.Module):
    """A block of any Transformer: what FSDP2 gathers at a time, and ``--checkpoint-activations`` computes again."""


def checkpoint_activations(model: nn.Module) -> None:
    """Let each block keep its input alone, and run again in the backward pass, with the same random numbers."""
    for module in model.modules():
        if isinstance(module, TransformerBlock):
            # Within the hooks of FSDP2, which has the weights together when the block runs again.
            module.forward = functools.partial(checkpoint, module.forward, use_reentrant=False)


class BlockNorm(nn.LayerNorm):
    """A layer norm in float32 at least, also where FSDP2 hands a block its weights in a lower precision."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., C] -> the same shape."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.layer_norm(x, self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps)


class Block(TransformerBlock):
    """A pre-norm Transformer block."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, quick_gelu: bool = False) -> None:
        super().__init__()
        self.ln_1 = BlockNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = BlockNorm(width)
        self.mlp = MLP(width, int(width * mlp_ratio), quick_gelu)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        """x [B, L, C] -> [B, L, C]."""
        x = x + self.attn(self.ln_1(x), causal=causal)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """A stack of blocks, initialised as CLIP's: residual projections shrink with depth."""

    def __init__(self, width: int, layers: int, heads: int, mlp_ratio: float = 4.0, quick_gelu: bool = False) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width, heads, mlp_ratio, quick_gelu) for _ in range(layers))
        residual = width**-0.5 * (2 * layers) ** -0.5
        for module in self.resblocks:
            assert isinstance(module, Block)
            nn.init.normal_(module.attn.in_proj_weight, std=width**-0.5)
            nn.init.normal_(module.attn.out_proj.weight, std=residual)
            nn.init.zeros_(module.attn.out_proj.bias)
            nn.init.normal_(module.mlp.c_fc.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(module.mlp.c_proj.weight, std=residual)

    def forward(self, x: Tensor, *, causal: bool = False) -> Tensor:
        """x [B, L, C] -> [B, L, C]."""
        for block in self.resblocks:
            x = block(x, causal=causal)
        return x


class Residual(nn.Module):
    """Two 3 x 3 convolutions around which the input is added."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        nn.init.zeros_(self.norm2.weight)  # the block starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] -> [B, C, H, W]."""
        return F.relu(x + self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


def conv_stages(before: int, widths: Sequence[int], depths: Sequence[int]) -> nn.Sequential:
    """Stages of a convolutional network on ``before`` channels; each halves the side and has ``depth`` residuals."""
    stages: list[nn.Module] = []
    for width, depth in zip(widths, depths, strict=True):
        stages += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        stages += [Residual(width) for _ in range(depth)]
        before = width
    network = nn.Sequential(*stages)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


class ConvStem(nn.Module):
    """A small convolutional network that replaces the patch embedding; every stage halves the side of its input.

    A model trained from nothing on few images learns many times faster with it than with patches.
    """

    def __init__(self, widths: Sequence[int], depths: Sequence[int], out: int) -> None:
        super().__init__()
        self.stages = conv_stages(3, widths, depths)
        self.proj = nn.Conv2d(widths[-1], out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, 3, S, S] -> [B, out, S / 2^stages, S / 2^stages]."""
        return self.proj(self.stages(x))
