"""The public calls: docstrings, validation, autocast, choice of implementation."""

from typing import Literal

from torch import Tensor

from mmkernels import _backends
from mmkernels._checks import check_count, check_pairs, check_target_tensor, in_one_dtype
from mmkernels.retrieval import ops


def retrieval_ranks(
    queries: Tensor,
    keys: Tensor,
    targets: Tensor | None = None,
    *,
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto",
) -> Tensor:
    """The rank of every query's target among all keys, for recall at K, median and reciprocal rank.

    Replaces::

        scores = queries @ keys.T                                  # [N, M], stored and sorted
        order = scores.argsort(dim=1, descending=True, stable=True)
        ranks = (order == targets[:, None]).int().argmax(dim=1)

    by one pass over tiles of the scores that counts the keys before the target; nothing of size N x M is stored, and
    nothing is sorted. Queries and keys are used as they come: normalise them first for cosine similarities.

    Args:
        queries: [N, D], float32, bfloat16, float16 (accumulated in float32) or float64 (reference only).
        keys: [M, D], dtype and device of `queries`.
        targets: [N], int64, the key that matches each query; None means key i for query i (needs N <= M).
        impl: "auto" picks the best implementation that can run; a name runs that one or raises.

    Returns:
        [N], int64: how many keys score higher than the target, or as high at a lower index. 0 is first, so that recall
        at K is ``(ranks < K).float().mean()``.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes or devices; targets out of range.
        RuntimeError: the `impl` asked for cannot run here; the text lists every implementation with its reason.

    Ties are exact: keys that are equal bit for bit score the same bits wherever they stand. NaN never counts as a
    success: a target whose score is NaN has rank M, past the last of any K, and a key whose score is NaN comes before
    every other. The ranks carry no gradient, and are the same from run to run. Under autocast the features are cast to
    its dtype; scores stay float32.
    """
    check_pairs(queries, keys)
    check_target_tensor(queries, keys, targets)
    queries, keys = in_one_dtype("queries", queries.detach(), "keys", keys.detach())
    chosen = _backends.choose("retrieval_ranks", impl, queries.device.type, queries.dtype)
    return ops.retrieval_ranks(queries, keys, targets, chosen)


def retrieval_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto",
) -> tuple[Tensor, Tensor]:
    """The k best keys of every query, exactly: search without an index and without a matrix of scores.

    Replaces::

        scores, indices = (queries @ keys.T).topk(k, dim=1)        # [N, M], stored

    by one pass over tiles of the scores that keeps what may be among the best; nothing of size N x M is stored. Queries
    and keys are used as they come: normalise them first for cosine similarities.

    Args:
        queries: [N, D], float32, bfloat16, float16 (accumulated in float32) or float64 (reference only).
        keys: [M, D], dtype and device of `queries`.
        k: how many, 1 to M.
        impl: "auto" picks the best implementation that can run; a name runs that one or raises.

    Returns:
        Scores [N, k], float32 (float64 for float64 inputs), highest first; and the keys' indices [N, k], int64, of
        equal scores the lower first.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes or devices; k out of range.
        RuntimeError: the `impl` asked for cannot run here; the text lists every implementation with its reason.

    The order is that of `retrieval_ranks`, ties and NaN included: scores of NaN come first, where torch.topk has them,
    and have no key (index -1), so that none counts as found. The scores carry no gradient, and are the same bits from
    run to run. Under autocast the features are cast to its dtype; scores stay float32.
    """
    check_pairs(queries, keys)
    check_count("k", k, 1)
    if k > keys.shape[0]:
        raise ValueError(f"k: expected at most {keys.shape[0]}, the number of keys, got {k}; use min(k, len(keys))")
    queries, keys = in_one_dtype("queries", queries.detach(), "keys", keys.detach())
    chosen = _backends.choose("retrieval_topk", impl, queries.device.type, queries.dtype)
    return ops.retrieval_topk(queries, keys, k, chosen)
