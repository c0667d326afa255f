"""Reduces one loss per row as `reduction` asks."""

from torch import Tensor


def reduced(losses: Tensor, reduction: str, weights: Tensor | None = None) -> Tensor:
    """The losses [N], their sum or their mean; of weighted losses the weighted mean."""
    if weights is not None:
        weights = weights.to(losses.dtype)
        losses = losses * weights
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.mean() if weights is None else losses.sum() / weights.sum()
