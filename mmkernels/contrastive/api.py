"""The public call: docstring, validation, autocast, choice of implementation."""

from typing import Any, Literal

from torch import Tensor

from mmkernels import _backends
from mmkernels._checks import (
    as_scalar,
    check_label_smoothing,
    check_number,
    check_pairs,
    check_reduction,
    check_targets,
    in_one_dtype,
)
from mmkernels.contrastive import ops, reference


def info_nce(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    *,
    targets: Tensor | None = None,
    symmetric: bool = True,
    label_smoothing: float = 0.0,
    query_groups: Tensor | None = None,
    key_groups: Tensor | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    process_group: Any = None,
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto",
) -> Tensor:
    """Contrastive cross-entropy of every query against all keys, and of every matched key against all queries.

    Replaces::

        logits = logit_scale * queries @ keys.T                    # [N, M], stored for the backward pass
        labels = torch.arange(len(queries), device=queries.device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T[: len(queries)], labels)) / 2

    by one pass over tiles of the logits; nothing of size N x M is stored, forward or backward. Queries and keys
    are used as they come: normalise them first for cosine similarities.

    Args:
        queries: [N, D], float32, bfloat16, float16 (accumulated in float32) or float64 (reference only).
        keys: [M, D], dtype and device of `queries`. M may exceed N: the extra keys are extra negatives.
        logit_scale: inverse temperature; a float or a tensor of one element, which then receives a gradient.
        targets: [N], int64, the key that matches each query; None means key i for query i (needs N <= M).
        symmetric: average with the cross-entropy of the matched keys over the queries (columns of the logits).
            False keeps the rows alone.
        label_smoothing: in [0, 1], the share of the target that is spread evenly over all classes.
        query_groups: several positives by equal id; not implemented yet.
        key_groups: see `query_groups`.
        reduction: "mean" or "sum" over the N queries, or "none" for one loss a query, [N].
        process_group: features of other ranks as further negatives; not implemented yet.
        impl: "auto" picks the best implementation that can run; a name runs that one or raises.

    Returns:
        The loss: a scalar, or [N] for reduction="none"; float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes, devices or values; targets out of range.
        NotImplementedError: `query_groups`, `key_groups`, `process_group`.
        RuntimeError: the `impl` asked for cannot run here; the text lists every implementation with its reason.

    Gradients flow to `queries`, `keys` and `logit_scale`; each is computed only if it is needed. The gradient is
    itself not differentiable (impl="reference" is). Results are the same bits from run to run. NaN in, NaN out.
    Under autocast the features are cast to its dtype; sums and statistics stay float32.

    Source: van den Oord et al. 2018, eq. 4 (arXiv:1807.03748); symmetric form: Radford et al. 2021, figure 3
    (arXiv:2103.00020).
    """
    _check(queries, keys, logit_scale, targets, label_smoothing, reduction)
    if query_groups is not None or key_groups is not None:
        raise NotImplementedError("query_groups, key_groups: several positives by group id are not implemented yet")
    if process_group is not None:
        raise NotImplementedError("process_group: features of other ranks are not implemented yet; pass None")

    queries, keys = in_one_dtype("queries", queries, "keys", keys)
    chosen = _backends.choose("info_nce", impl, queries.device.type, queries.dtype)
    scale = as_scalar(logit_scale, queries)
    if chosen == "reference":
        losses = reference.info_nce(queries, keys, scale, targets, symmetric, label_smoothing)
    else:
        losses = ops.info_nce(queries, keys, scale, targets, symmetric, label_smoothing, chosen)
    if reduction == "none":
        return losses
    return losses.mean() if reduction == "mean" else losses.sum()


def _check(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    targets: Tensor | None,
    label_smoothing: float,
    reduction: str,
) -> None:
    check_pairs(queries, keys)
    check_number("logit_scale", logit_scale, queries.device)
    check_targets(queries, keys, targets)
    check_label_smoothing(label_smoothing)
    check_reduction(reduction)
