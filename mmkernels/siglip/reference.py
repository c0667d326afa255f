"""Eager, obviously right, on any device: the oracle of the tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._checks import without_autocast


def siglip(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    bias: Tensor,  # []
) -> Tensor:  # [N]
    """One loss per query, from the full matrix of logits in the dtype of `scale` (float32 or float64)."""
    with without_autocast(queries):  # autocast would multiply in half precision
        logits = scale * queries.to(scale.dtype) @ keys.to(scale.dtype).T + bias  # [N, M]
    labels = 2 * torch.eye(*logits.shape, dtype=scale.dtype, device=scale.device) - 1
    return -F.logsigmoid(labels * logits).sum(1)
