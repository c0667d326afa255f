"""The public call: docstring, validation, autocast, choice of implementation."""

from typing import Literal

from torch import Tensor

from mmkernels import _backends
from mmkernels._checks import check_choice, check_flag, check_matches, check_pairs, check_reduction, in_one_dtype
from mmkernels._reduction import reduced
from mmkernels.triplet import ops, reference
from mmkernels.triplet.options import Options

_MININGS = ("all", "hardest", "semi_hard")


def triplet(
    queries: Tensor,
    keys: Tensor,
    *,
    margin: float = 0.2,
    mining: Literal["all", "hardest", "semi_hard"] = "all",
    symmetric: bool = True,
    reduction: Literal["none", "mean", "sum"] = "mean",
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto",
) -> Tensor:
    """Triplet loss of matched rows, whose negatives are all the other rows of the batch.

    Replaces::

        similarities = queries @ keys.T                            # [N, M], stored for the backward pass, here N = M
        positives = similarities.diagonal()
        own = torch.eye(len(queries), dtype=torch.bool, device=queries.device)
        rows = F.relu(similarities - positives[:, None] + margin).masked_fill(own, 0.0)
        columns = F.relu(similarities - positives + margin).masked_fill(own, 0.0)
        loss = (rows.sum(1) + columns.sum(0)).mean() / 2           # "hardest": rows.amax(1), columns.amax(0)

    by one pass over tiles of the similarities; nothing of size N x M is stored, forward or backward. Key i is the
    positive of query i, and the other keys are its negatives. Queries and keys are used as they come: normalise them
    first for cosine similarities.

    Args:
        queries: [N, D], float32, bfloat16, float16 (accumulated in float32) or float64 (reference only).
        keys: [M, D], dtype and device of `queries`, M >= N. The keys past the N-th are negatives of every query.
        margin: by how much a positive must be above a negative to cost nothing; finite, at least 0.
        mining: which negatives of a query count, h = max(0, negative - positive + margin) being the cost of one:
            "all": the sum of h over all of them;
            "hardest": h of the most similar one;
            "semi_hard": h of the most similar one among those with positive - margin < negative < positive, 0 where
            there is none.
            Of equally similar ones the first counts.
        symmetric: average with the loss of the other direction, in which key i < N has the other queries for its
            negatives. False keeps the queries' direction alone.
        reduction: "mean" or "sum" over the N rows, or "none" for one loss per row, [N].
        impl: "auto" picks the best implementation that can run; a name runs that one or raises.

    Returns:
        The loss: a scalar, or [N] for reduction="none"; float32 (float64 for float64 inputs). A row without negatives
        (N = M = 1) has loss 0.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes, devices or values.
        RuntimeError: the `impl` asked for cannot run here; the text lists every implementation with its reason.

    Gradients flow to `queries` and `keys`; each is computed only if it is needed. A negative whose cost is exactly 0
    has none, as with torch.relu. The gradient is itself not differentiable (impl="reference" is). Results are the same
    bits from run to run. NaN in, NaN out. Under autocast the features are cast to its dtype; similarities and sums
    stay float32.

    Source: Faghri et al. 2018 ("all" and "hardest" in both directions, VSE++, arXiv:1707.05612); Schroff et al. 2015
    ("semi_hard", arXiv:1503.03832).
    """
    _check(queries, keys, margin, mining, symmetric, reduction)
    queries, keys = in_one_dtype("queries", queries, "keys", keys)
    chosen = _backends.choose("triplet", impl, queries.device.type, queries.dtype)
    options = Options(margin, mining, symmetric)
    if chosen == "reference":
        return reduced(reference.triplet(queries, keys, options), reduction)
    return ops.triplet(queries, keys, options, reduction, chosen)


def _check(queries: Tensor, keys: Tensor, margin: float, mining: str, symmetric: bool, reduction: str) -> None:
    check_pairs(queries, keys)
    check_matches(queries, keys)
    if not isinstance(margin, (int, float)):
        raise TypeError(f"margin: expected a float, got {type(margin).__name__}; of a tensor take margin.item()")
    if not 0.0 <= margin < float("inf"):
        raise ValueError(f"margin: expected a finite value of at least 0, got {margin}")
    check_choice("mining", mining, _MININGS)
    check_flag("symmetric", symmetric)
    check_reduction(reduction)
