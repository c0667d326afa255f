"""What users run today for the sigmoid loss: calls (queries, keys, scale, bias) -> loss."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels

# The packages whose versions a report writes beside its numbers; torch is always there.
PACKAGES = ("open-clip-torch",)

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def eager_sigmoid(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """The logits and the labels as tensors."""
    logits = scale * queries @ keys.T + bias
    labels = 2 * torch.eye(len(queries), device=queries.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(queries)


def sigmoid_losses(impl: str = "auto") -> dict[str, Loss]:
    """The fused loss first, then its peers: those that are installed."""
    losses: dict[str, Loss] = {
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
