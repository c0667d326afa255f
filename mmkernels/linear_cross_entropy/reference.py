"""Eager, obviously right, on any device: the oracle of the tests."""

import torch.nn.functional as F
from torch import Tensor

from mmkernels._checks import check_targets, without_autocast
from mmkernels.linear_cross_entropy.options import Options


def linear_cross_entropy(
    hidden: Tensor,  # [N, D]
    weight: Tensor,  # [V, D]
    bias: Tensor | None,  # [V], float32 or float64
    targets: Tensor,  # [N]
    options: Options,
) -> Tensor:  # [N]
    """One loss per row, 0 where it is ignored, from all logits in float32 (float64 for float64 inputs)."""
    ignore_index, label_smoothing = options
    check_targets(targets, weight.shape[0], "rows of weight", ignore_index)
    dtype = hidden.dtype if hidden.itemsize == 8 else hidden.float().dtype
    with without_autocast(hidden):  # autocast would multiply in half precision
        logits = F.linear(hidden.to(dtype), weight.to(dtype), bias)  # [N, V]
    return F.cross_entropy(
        logits, targets, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="none"
    )
