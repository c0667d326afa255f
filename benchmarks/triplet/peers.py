"""What users run today for the triplet loss: calls (queries, keys) -> loss, for each mining."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmkernels

# The packages whose versions a report writes beside its numbers; torch is always there.
PACKAGES = ("pytorch-metric-learning",)

MARGIN = 0.2
Loss = Callable[[Tensor, Tensor], Tensor]


def eager(mining: str, queries: Tensor, keys: Tensor) -> Tensor:
    """The matrix of similarities once, both directions from it: 3 G in all."""
    similarities = queries @ keys.T
    positives = similarities.diagonal()
    own = torch.eye(len(queries), dtype=torch.bool, device=queries.device)
    total = queries.new_zeros((), dtype=torch.float32)
    for negatives in (similarities, similarities.T):
        above = negatives - positives[:, None] + MARGIN
        if mining == "all":
            losses = F.relu(above).masked_fill(own, 0.0).sum(1)
        elif mining == "hardest":
            losses = F.relu(negatives.masked_fill(own, -torch.inf).amax(1) - positives + MARGIN)
        else:
            semi_hard = (negatives < positives[:, None]) & (above > 0)
            losses = F.relu(negatives.masked_fill(~semi_hard, -torch.inf).amax(1) - positives + MARGIN)
        total = total + losses.float().mean()
    return total / 2


def metric_learning(mining: str) -> Loss | None:
    """pytorch-metric-learning's loss in both directions, if it is installed."""
    try:
        from pytorch_metric_learning.distances import DotProductSimilarity
        from pytorch_metric_learning.losses import TripletMarginLoss
        from pytorch_metric_learning.miners import BatchEasyHardMiner, BatchHardMiner
        from pytorch_metric_learning.reducers import SumReducer
    except ImportError:
        return None
    distance = DotProductSimilarity(normalize_embeddings=False)
    loss_of = TripletMarginLoss(margin=MARGIN, distance=distance, reducer=SumReducer())
    miners: dict[str, Any] = {
        "all": None,
        "hardest": BatchHardMiner(distance=distance),
        "semi_hard": BatchEasyHardMiner(distance=distance, pos_strategy="easy", neg_strategy="semihard"),
    }
    miner = miners[mining]

    def one_way(anchors: Tensor, others: Tensor, labels: Tensor) -> Tensor:
        mined = None if miner is None else miner(anchors, labels, others, labels)
        return loss_of(anchors, labels, mined, others, labels)

    def loss(queries: Tensor, keys: Tensor) -> Tensor:
        labels = torch.arange(len(queries), device=queries.device)
        return (one_way(queries, keys, labels) + one_way(keys, queries, labels)) / (2 * len(queries))

    return loss


def triplet_losses(mining: str, impl: str = "auto") -> dict[str, Loss]:
    """The fused loss first, then its peers: those that are installed."""
    losses: dict[str, Loss] = {
        "mmkernels": functools.partial(mmkernels.triplet, margin=MARGIN, mining=mining, impl=impl),  # type: ignore[arg-type]
        "eager": functools.partial(eager, mining),
        "torch.compile": torch.compile(functools.partial(eager, mining), dynamic=False),
    }
    if (theirs := metric_learning(mining)) is not None:
        losses["pytorch-metric-learning"] = theirs
    return losses
