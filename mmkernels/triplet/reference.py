"""Eager, obviously right, on any device: the oracle of the tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._checks import without_autocast
from mmkernels.triplet.options import Options


def triplet(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    options: Options,
) -> Tensor:  # [N]
    """One loss per query, from all similarities in float32 (float64 for float64 features)."""
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    with without_autocast(queries):  # autocast would multiply in half precision
        similarities = queries.to(dtype) @ keys.to(dtype).T  # [N, M]
    margin, mining, symmetric = options
    losses = _losses_of_rows(similarities, margin, mining)
    if not symmetric:
        return losses
    return (losses + _losses_of_rows(similarities[:, : len(queries)].T, margin, mining)) / 2


def _losses_of_rows(similarities: Tensor, margin: float, mining: str) -> Tensor:
    own = torch.eye(*similarities.shape, dtype=torch.bool, device=similarities.device)
    positives = similarities.diagonal()[:, None]
    above = similarities - positives + margin
    if mining == "all":
        return F.relu(above).masked_fill(own, 0.0).sum(1)
    counts = ~own
    if mining == "semi_hard":
        # Negated comparisons, so that a NaN counts: it is the worst of all.
        counts &= ~(similarities >= positives) & ~(above <= 0)
    negatives = similarities.masked_fill(~counts, -torch.inf)
    worst = negatives.gather(1, negatives.argmax(1, keepdim=True))
    return torch.where(counts.any(1), F.relu(worst - positives + margin)[:, 0], 0.0)
