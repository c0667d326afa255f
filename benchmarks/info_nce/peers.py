"""What users run today for the contrastive loss: calls (queries, keys, scale) -> loss, or with groups of both."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels
from benchmarks.linear_cross_entropy.peers import chunked_linear_cross_entropy

# The packages whose versions a report writes beside its numbers; torch is always there.
PACKAGES = ("open-clip-torch",)

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """The logits once, both cross-entropies from them: 3 G in all."""
    logits = scale * queries @ keys.T
    labels = torch.arange(len(queries), device=queries.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def in_both_directions(cross_entropy: Callable[..., Tensor], queries: Tensor, keys: Tensor, scale: Tensor) -> Tensor:
    """A linear cross-entropy, once in each direction."""
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
