"""What users run today: for the contrastive loss, calls (queries, keys, scale) -> loss; for the sigmoid loss, calls
(queries, keys, scale, bias) -> loss; for linear cross-entropy, calls (hidden, weight, targets) -> loss; for divided
attention, calls (qkv) -> output."""

import functools
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
Attention = Callable[[Tensor], Tensor]


def eager(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """The logits once, both cross-entropies from them: 3 G in all."""
    logits = scale * queries @ keys.T
    labels = torch.arange(len(queries), device=queries.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def chunked_linear_cross_entropy() -> Callable[..., Tensor] | None:
    """torch's linear cross-entropy in chunks, where torch has it: without options the call is the eager code."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        return None
    return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions())


def in_both_directions(cross_entropy: Callable[..., Tensor], queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """A linear cross-entropy once a direction."""
    labels = torch.arange(len(queries), device=queries.device)
    scale = scale.to(queries.dtype)
    return (cross_entropy(scale * queries, keys, labels) + cross_entropy(scale * keys, queries, labels)) / 2


def contrastive_losses(impl: str = "auto") -> dict[str, Loss]:
    """The fused loss first, then its peers: those that are installed."""
    losses: dict[str, Loss] = {
        "mmkernels": lambda queries, keys, scale: mmkernels.info_nce(queries, keys, scale, impl=impl),  # type: ignore[arg-type]
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
    }
    if (chunked := chunked_linear_cross_entropy()) is not None:
        losses["F.linear_cross_entropy x 2"] = functools.partial(in_both_directions, chunked)
    try:
        from open_clip.loss import ClipLoss
    except ImportError:
        return losses
    losses["open_clip ClipLoss"] = ClipLoss()
    return losses


def eager_sigmoid(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The logits and the labels as tensors."""
    logits = scale * queries @ keys.T + bias
    labels = 2 * torch.eye(len(queries), device=queries.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(queries)


def sigmoid_losses(impl: str = "auto") -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """The fused loss first, then its peers: those that are installed."""
    losses: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
        "mmkernels": functools.partial(mmkernels.siglip, impl=impl),  # type: ignore[arg-type]
        "eager": eager_sigmoid,
        "torch.compile": torch.compile(eager_sigmoid, dynamic=False),
    }
    try:
        from open_clip.loss import SigLipLoss
    except ImportError:
        return losses
    losses["open_clip SigLipLoss"] = SigLipLoss()
    return losses


def eager_groups(queries: Tensor, keys: Tensor, scale: Tensor, groups: Tensor) -> Tensor:
    """Several positives as a matrix of targets."""
    logits = scale * queries @ keys.T
    targets = (groups[:, None] == groups).to(logits.dtype)
    targets = targets / targets.sum(1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def group_losses(impl: str = "auto") -> dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]]:
    """The fused loss first, then its peers: calls (queries, keys, scale, groups of both) -> loss."""
    return {
        "mmkernels": lambda queries, keys, scale, groups: mmkernels.info_nce(
            queries,
            keys,
            scale,
            query_groups=groups,
            key_groups=groups,
            impl=impl,  # type: ignore[arg-type]
        ),
        "eager": eager_groups,
        "torch.compile": torch.compile(eager_groups, dynamic=False),
    }


def eager_distillation(
    queries: Tensor, keys: Tensor, scale: Tensor, teacher_queries: Tensor, teacher_keys: Tensor, teacher_scale: Tensor
) -> Tensor:
    """The logits of student and teacher once, both cross-entropies from them: 4 G in all."""
    logits = scale * queries @ keys.T
    with torch.no_grad():
        teacher = teacher_scale * teacher_queries @ teacher_keys.T
        rows, columns = teacher.softmax(1), teacher.T.softmax(1)
    return (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2


def distillation_losses(impl: str = "auto") -> dict[str, Callable[..., Tensor]]:
    """The fused loss first, then its peers: calls (queries, keys, scale, the teacher's) -> loss; and open_clip's class,
    whose loss is the sum with that of CLIP, beside ours."""

    losses: dict[str, Callable[..., Tensor]] = {
        "mmkernels": functools.partial(mmkernels.distillation, impl=impl),  # type: ignore[arg-type]
        "eager": eager_distillation,
        "torch.compile": torch.compile(eager_distillation, dynamic=False),
        "mmkernels DistillClipLoss": lambda *features: sum(mmkernels.DistillClipLoss()(*features)),
    }
    try:
        from open_clip.loss import DistillClipLoss
    except ImportError:
        return losses
    losses["open_clip DistillClipLoss"] = lambda *features: sum(DistillClipLoss()(*features))
    return losses


def eager_classification(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The logits as a tensor."""
    return F.cross_entropy(F.linear(hidden, weight), targets)


def classification_losses(impl: str = "auto") -> dict[str, Loss]:
    """The fused loss first, then its peers. Liger and cut-cross-entropy are Triton kernels: no CPU runs them."""
    losses: dict[str, Loss] = {
        "mmkernels": lambda hidden, weight, targets: mmkernels.linear_cross_entropy(hidden, weight, targets, impl=impl),  # type: ignore[arg-type]
        "eager": eager_classification,
        "torch.compile": torch.compile(eager_classification, dynamic=False),
    }
    if (chunked := chunked_linear_cross_entropy()) is not None:
        losses["F.linear_cross_entropy"] = chunked
    return losses


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
        out = mmkernels.divided_attention(qkv, num_frames=frames, num_heads=heads, axis=axis, impl=impl)  # type: ignore[arg-type]
        assert isinstance(out, Tensor)
        return out

    return {
        "mmkernels": fused,
        "eager": eager,
        "SDPA": sdpa,
        "torch.compile eager": torch.compile(eager, dynamic=False),
        "torch.compile SDPA": torch.compile(sdpa, dynamic=False),
    }
