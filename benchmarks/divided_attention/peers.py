"""What users run today for divided attention: calls (qkv) -> output."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels

# The packages whose versions a report writes beside its numbers; torch is always there.
PACKAGES: tuple[str, ...] = ()

Attention = Callable[[Tensor], Tensor]


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as TimeSformer's own code does it: the probabilities as a tensor."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


def time_attention(qkv: Tensor, attention: Callable[..., Tensor], frames: int, heads: int) -> Tensor:
    """TimeSformer's step in time, tokens [cls, (n t)]: [B, 1 + N T, 3 C] to the patches' [B, N T, C]."""
    batch = len(qkv)
    patches = qkv[:, 1:].reshape(-1, frames, 3, heads, qkv.shape[-1] // (3 * heads))  # [B N, T, 3, H, D]
    out = attention(*patches.permute(2, 0, 3, 1, 4).unbind(0))  # [B N, H, T, D]
    return out.transpose(1, 2).reshape(batch, -1, qkv.shape[-1] // 3)


def space_attention(qkv: Tensor, attention: Callable[..., Tensor], frames: int, heads: int) -> Tensor:
    """TimeSformer's step in space: the class token in every frame, its outputs averaged; [B, 1 + N T, C]."""
    batch, _, width = qkv.shape
    cls = qkv[:, :1].expand(-1, frames, -1).reshape(batch * frames, 1, width)
    patches = qkv[:, 1:].reshape(batch, -1, frames, width).transpose(1, 2).reshape(batch * frames, -1, width)
    tokens = torch.cat([cls, patches], 1).unflatten(-1, (3, heads, -1))  # [B T, 1 + N, 3, H, D]
    out = attention(*tokens.permute(2, 0, 3, 1, 4).unbind(0)).transpose(1, 2).flatten(2)  # [B T, 1 + N, C]
    out = out.unflatten(0, (batch, frames))
    patches = out[:, :, 1:].transpose(1, 2).reshape(batch, -1, width // 3)
    return torch.cat([out[:, :, 0].mean(1, keepdim=True), patches], 1)


def attentions(axis: Literal["time", "space"], frames: int, heads: int, impl: str = "auto") -> dict[str, Attention]:
    """The fused attention of TimeSformer first, then what it replaces."""
    step = time_attention if axis == "time" else space_attention

    def eager(qkv: Tensor) -> Tensor:
        return step(qkv, softmax_attention, frames, heads)

    def sdpa(qkv: Tensor) -> Tensor:
        return step(qkv, F.scaled_dot_product_attention, frames, heads)

    def fused(qkv: Tensor) -> Tensor:
        options = {"num_frames": frames, "num_heads": heads, "axis": axis, "impl": impl}
        return mmkernels.divided_attention(qkv, **options)  # type: ignore[call-overload]

    return {
        "mmkernels": fused,
        "eager": eager,
        "SDPA": sdpa,
        "torch.compile eager": torch.compile(eager, dynamic=False),
        "torch.compile SDPA": torch.compile(sdpa, dynamic=False),
    }
