"""The public call: docstring, validation, autocast, choice of implementation."""

from typing import Any, Literal

import torch
from torch import Tensor

from mmkernels import _backends
from mmkernels.contrastive import ops, reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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

    device_type = queries.device.type
    if torch.is_autocast_enabled(device_type) and queries.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        queries, keys = queries.to(dtype), keys.to(dtype)
    elif queries.dtype != keys.dtype:
        raise TypeError(f"keys: expected the dtype of queries, {queries.dtype}, got {keys.dtype}; cast one of them")
    chosen = _backends.choose("info_nce", impl, device_type, queries.dtype)

    statistics_dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    if isinstance(logit_scale, Tensor):
        scale = logit_scale.reshape(()).to(queries.device, statistics_dtype)
    else:
        scale = torch.full((), logit_scale, dtype=statistics_dtype, device=queries.device)

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
    for name, features in (("queries", queries), ("keys", keys)):
        if not isinstance(features, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(features).__name__}")
        if features.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {features.dtype}")
        if features.ndim != 2:
            raise ValueError(f"{name}: expected 2 dimensions [rows, D], got shape {tuple(features.shape)}")
        if features.shape[0] == 0:
            raise ValueError(
                f"{name}: expected at least one row, got shape {tuple(features.shape)}; skip empty batches"
            )
        if features.shape[1] == 0:
            raise ValueError(f"{name}: expected D >= 1, got shape {tuple(features.shape)}")
    if queries.shape[1] != keys.shape[1]:
        raise ValueError(
            f"keys: expected D = {queries.shape[1]} as in queries, got {keys.shape[1]}; project both to one size"
        )
    if queries.device != keys.device:
        raise ValueError(f"keys: expected device {queries.device} as of queries, got {keys.device}; move one of them")

    if isinstance(logit_scale, Tensor):
        if logit_scale.numel() != 1:
            raise ValueError(f"logit_scale: expected one element, got shape {tuple(logit_scale.shape)}")
        if not logit_scale.is_floating_point():
            raise TypeError(f"logit_scale: expected a floating-point tensor, got {logit_scale.dtype}")
        if logit_scale.device != queries.device and logit_scale.device.type != "cpu":
            raise ValueError(f"logit_scale: expected device {queries.device} or cpu, got {logit_scale.device}")
    elif not isinstance(logit_scale, (int, float)):
        raise TypeError(f"logit_scale: expected a float or a tensor of one element, got {type(logit_scale).__name__}")

    if targets is None:
        if queries.shape[0] > keys.shape[0]:
            raise ValueError(
                f"targets: {queries.shape[0]} queries and {keys.shape[0]} keys do not match one to one; "
                "pass targets [N], the index of the key of each query"
            )
    else:
        if not isinstance(targets, Tensor):
            raise TypeError(f"targets: expected an int64 tensor, got {type(targets).__name__}")
        if targets.dtype != torch.int64:
            raise TypeError(f"targets: expected int64, got {targets.dtype}; use targets.long()")
        if targets.shape != queries.shape[:1]:
            raise ValueError(f"targets: expected shape ({queries.shape[0]},), got {tuple(targets.shape)}")
        if targets.device != queries.device:
            raise ValueError(f"targets: expected device {queries.device} as of queries, got {targets.device}")

    if not isinstance(label_smoothing, (int, float)):
        raise TypeError(f"label_smoothing: expected a float, got {type(label_smoothing).__name__}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing: expected a value in [0, 1], got {label_smoothing}")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction: expected 'none', 'mean' or 'sum', got {reduction!r}")
