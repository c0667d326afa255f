"""Eager, obviously right, on any device: the oracle of the tests."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mmkernels._checks import check_targets, without_autocast

_CHUNK = 1 << 24  # scores held at once: 64 MiB of float32


def score_chunks(queries: Tensor, keys: Tensor) -> Iterator[Tensor]:
    """The scores [rows, M] of a few queries at a time, in float32 (float64 for float64 inputs).

    Equal keys get the same bits: their score is computed once. A matrix product alone does not promise that.
    """
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    distinct, place = torch.unique(keys, dim=0, return_inverse=True)
    distinct = distinct.to(dtype).T
    for part in queries.split(max(1, _CHUNK // len(keys))):
        with without_autocast(queries):
            scores = part.to(dtype) @ distinct
        yield scores[:, place]


def retrieval_ranks(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    targets: Tensor | None,  # [N]
) -> Tensor:  # [N]
    """How many keys come before each query's target, int64; M where the target's score is NaN."""
    if targets is None:
        targets = torch.arange(len(queries), device=queries.device)
    else:
        check_targets(targets, len(keys), "keys")
    index = torch.arange(len(keys), device=keys.device)
    ranks, start = [], 0
    for scores in score_chunks(queries, keys):
        own = targets[start : start + len(scores), None]
        positive = scores.gather(1, own)
        before = (scores > positive) | scores.isnan() | ((scores == positive) & (index < own))
        ranks.append(torch.where(positive[:, 0].isnan(), len(keys), before.sum(1)))
        start += len(scores)
    return torch.cat(ranks)


def retrieval_topk(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    k: int,
) -> tuple[Tensor, Tensor]:  # [N, k] and [N, k]
    """The k first of each query's scores, and their keys, int64: NaN first, without a key (-1), then the highest, of
    equal scores the lower index."""
    found = [scores.sort(dim=1, descending=True, stable=True) for scores in score_chunks(queries, keys)]
    scores = torch.cat([part.values[:, :k] for part in found])
    indices = torch.cat([part.indices[:, :k] for part in found])
    return scores, indices.masked_fill(scores.isnan(), -1)
