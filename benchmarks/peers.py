"""What users run today for the contrastive loss, each as a call (queries, keys, scale) -> loss."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """The logits once, both cross-entropies from them: 3 G in all."""
    logits = scale * queries @ keys.T
    labels = torch.arange(len(queries), device=queries.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def linear_cross_entropy(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """torch's chunked linear cross-entropy, once a direction."""
    labels = torch.arange(len(queries), device=queries.device)
    scale = scale.to(queries.dtype)
    rows = F.linear_cross_entropy(scale * queries, keys, labels)
    return (rows + F.linear_cross_entropy(scale * keys, queries, labels)) / 2


def contrastive_losses(impl: str = "auto") -> dict[str, Loss]:
    """The fused loss first, then its peers: those that are installed."""
    losses: dict[str, Loss] = {
        "mmkernels": lambda queries, keys, scale: mmkernels.info_nce(queries, keys, scale, impl=impl),  # type: ignore[arg-type]
        "eager": eager,
        "torch.compile": torch.compile(eager, dynamic=False),
    }
    if hasattr(F, "linear_cross_entropy"):
        losses["linear_cross_entropy x2"] = linear_cross_entropy
    try:
        from open_clip.loss import ClipLoss
    except ImportError:
        return losses
    losses["open_clip ClipLoss"] = ClipLoss()
    return losses
