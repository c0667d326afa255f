"""Eager, obviously right, on any device: the oracle of the tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._targets import check_targets


def info_nce(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    targets: Tensor | None,  # [N]
    symmetric: bool,
    label_smoothing: float,
) -> Tensor:  # [N]
    """The loss of every query, from the full matrix of logits in the dtype of `scale` (float32 or float64)."""
    own = torch.arange(queries.shape[0], device=queries.device)
    if targets is None:
        targets = own
    else:
        check_targets(targets, keys.shape[0], "keys")
    logits = scale * queries.to(scale.dtype) @ keys.to(scale.dtype).T  # [N, M]
    rows = F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    if not symmetric:
        return rows
    columns = F.cross_entropy(logits.T[targets], own, label_smoothing=label_smoothing, reduction="none")
    return (rows + columns) / 2
