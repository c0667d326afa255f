"""The public call: docstring, validation, autocast, choice of implementation."""

import functools
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels import _backends
from mmkernels._checks import (
    as_scalar,
    check_device,
    check_flag,
    check_indices,
    check_label_smoothing,
    check_matrix,
    check_number,
    check_pairs,
    check_reduction,
    check_target_tensor,
    check_weights,
    in_one_dtype,
    require_targets,
)
from mmkernels._reduction import reduced
from mmkernels.distributed.ranks import Group, RaisedByAll, group_of, rows_of_ranks
from mmkernels.distributed.total import reduced_over_ranks
from mmkernels.info_nce import ops, reference, ring
from mmkernels.info_nce.groups import number_groups, require_groups
from mmkernels.info_nce.options import Options


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
    key_queue: Tensor | None = None,
    query_queue: Tensor | None = None,
    weights: Tensor | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    process_group: Any = None,
    impl: Literal["auto", "triton", "chunked", "cute", "cpu", "reference"] = "auto",
) -> Tensor:
    """Contrastive cross-entropy of every query against all keys, and of every matched key against all queries.

    Replaces::

        logits = logit_scale * queries @ keys.T                    # [N, M], stored for the backward pass
        labels = torch.arange(len(queries), device=queries.device)
        loss = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T[: len(queries)], labels)) / 2

    by one pass over tiles of the logits; nothing of size N x M is stored, forward or backward (except on a CPU the
    products, if they take no more than 64 MiB). Queries and keys are used as they come: normalise them first for cosine
    similarities.

    Args:
        queries: [N, D], float32, bfloat16, float16 (accumulated in float32) or float64 (reference only).
        keys: [M, D], dtype and device of `queries`. M may exceed N: the extra keys are extra negatives.
        logit_scale: inverse temperature; a float or a tensor of one element, which then receives a gradient.
        targets: [N], int64, the key that matches each query; None means key i for query i (needs N <= M).
        symmetric: average with the cross-entropy of the matched keys over the queries (columns of the logits).
            False keeps the rows alone.
        label_smoothing: in [0, 1], the share of the target that is spread evenly over all classes.
        query_groups: [N], int64. With `key_groups`, keys of a query's group are all its positives: its target is
            uniform over them, and that of a matched key (the one of `targets`) over the queries of the key's group.
        key_groups: [M], int64; see `query_groups`. Every query needs a key of its group, and every matched key a
            query of its own.
        key_queue: [Q, D], further keys that are negatives alone, of no group: a memory queue. A gradient flows to it
            if it requires one; if not, none is computed.
        query_queue: [R, D], further queries that are negatives alone, for the matched keys: each key is compared with
            [queries; query_queue] as each query is with [keys; key_queue]. No queue is compared with the other.
        weights: [N], floating-point, one for each query's loss: "mean" divides by their sum, "sum" and "none" multiply.
        reduction: "mean" or "sum" over the N queries, or "none" for one loss per query, [N].
        process_group: a `ProcessGroup`, or a `DeviceMesh` of one dimension or of two, (outer, inner): each rank calls
            with its own rows, and the loss is that of the joined batch. Keys pass round the outer dimension, and the
            inner one joins them before they are multiplied. "mean" is then the rank's share of the joint mean, which
            DDP's and FSDP's mean over ranks makes whole, gradients too; "sum" and "none" are of the own rows, and the
            gradient is that of the sum over ranks. Ranks may differ in rows, not in dtype or options. The queues are
            each rank's own, and serve all ranks. Equal group ids are one group, whatever the rank.
        impl: "auto" picks the best implementation that can run; a name runs that one or raises. "auto" never picks
            "chunked", torch's own products with a pass of Triton between, and "cute", a forward pass for Hopper that
            nobody has run on a GPU.

    Returns:
        The loss: a scalar, or [N] for reduction="none"; float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes, devices or values; targets out of range; a query or matched key without a positive
            (on a GPU the last two are assertions of the device).
        NotImplementedError: impl="chunked" or "cute" with `process_group`.
        RuntimeError: the `impl` asked for cannot run here; the text lists every implementation with its reason.

    Gradients flow to `queries`, `keys`, `logit_scale`, the queues and `weights`; each is computed only if it is
    needed. The gradient is itself not differentiable (impl="reference" is). Results are the same bits from run to run.
    NaN in, NaN out.
    Under autocast the features are cast to its dtype; sums and statistics stay float32.

    Source: van den Oord et al. 2018, eq. 4 (arXiv:1807.03748); symmetric form: Radford et al. 2021, figure 3
    (arXiv:2103.00020); groups: Khosla et al. 2020, eq. 2 (arXiv:2004.11362); queues: He et al. 2019
    (arXiv:1911.05722).
    """
    group = None if process_group is None else group_of(process_group)
    with RaisedByAll(group):
        check_pairs(queries, keys)
        check_number("logit_scale", logit_scale, queries.device)
        check_flag("symmetric", symmetric)
        check_label_smoothing(label_smoothing)
        check_reduction(reduction)
        check_weights(queries, weights)
        check_target_tensor(queries, keys, targets)
        options = Options(targets, query_groups, key_groups, symmetric, label_smoothing)
        if query_groups is not None or key_groups is not None:
            _check_groups(queries, keys, query_groups, key_groups)
        if key_queue is not None or query_queue is not None:
            _check_queues(queries, key_queue, query_queue, symmetric)
        given = queries
        queries, keys = in_one_dtype("queries", given, "keys", keys)
        if key_queue is not None:
            _, key_queue = in_one_dtype("queries", given, "key_queue", key_queue)
        if query_queue is not None:
            _, query_queue = in_one_dtype("queries", given, "query_queue", query_queue)
        call = _Call(_backends.choose("info_nce", impl, queries.device.type, queries.dtype), group, weights is not None)
        if group is not None:
            _require_matches(keys, options._replace(query_groups=None, key_groups=None))
            if call.backend in ("chunked", "cute"):
                raise NotImplementedError(
                    f"impl: expected 'auto', 'triton', 'cpu' or 'reference' with process_group, got {impl!r}"
                )
    if key_queue is None and query_queue is None:
        losses, rows = _losses(queries, keys, None, logit_scale, options, call)
    else:
        losses, rows = _losses_with_queues(queries, keys, key_queue, query_queue, logit_scale, options, call)
    if group is None:
        return reduced(losses, reduction, weights)
    return reduced_over_ranks(losses, reduction, weights, group, rows[0])


class _Call(NamedTuple):
    """Where the losses are computed."""

    backend: str
    group: Group | None
    weighted: bool


def _losses(
    queries: Tensor,
    keys: Tensor,
    key_queue: Tensor | None,
    logit_scale: Tensor | float,
    options: Options,
    call: _Call,
) -> tuple[Tensor, Tensor]:
    """One loss per query, [N], and the queries and keys of every rank, [2, ranks] ([0] for this process alone)."""
    backend, group, weighted = call
    if backend == "cute":
        _check_cute(queries, options)
    scale = as_scalar(logit_scale, queries)
    if group is None:
        of = reference.info_nce if backend == "reference" else functools.partial(ops.info_nce, backend=backend)
        return of(queries, keys, key_queue, scale, options), scale.new_empty(0)
    if key_queue is not None:
        keys = torch.cat([keys, key_queue])
    agreed = {"symmetric": options.symmetric, "label_smoothing": options.label_smoothing, "weights": weighted}
    agreed["groups"] = options.query_groups is not None
    rows = rows_of_ranks(queries, keys, group, backend, agreed)
    if backend == "reference":
        return ring.reference_over_ranks(queries, keys, scale, options, rows, group), rows
    return ring.info_nce(queries, keys, scale, options, rows, group, backend), rows


def _losses_with_queues(
    queries: Tensor,
    keys: Tensor,
    key_queue: Tensor | None,
    query_queue: Tensor | None,
    logit_scale: Tensor | float,
    options: Options,
    call: _Call,
) -> tuple[Tensor, Tensor]:
    """As _losses, against further keys, further queries, or both."""
    if call.group is None:
        _require_matches(keys, options)
    if query_queue is None:
        return _losses(queries, keys, key_queue, logit_scale, options, call)
    # Two one-sided losses, so that the logits of one queue with the other are never computed.
    scale = as_scalar(logit_scale, queries)
    of_rows, rows = _losses(queries, keys, key_queue, scale, options._replace(symmetric=False), call)
    targets, query_groups, key_groups, *_ = options
    # F.embedding takes rows by index, and its gradient has the same bits from run to run on a GPU, too.
    matched = keys[: queries.shape[0]] if targets is None else F.embedding(targets, keys)
    matched_groups = key_groups
    if key_groups is not None:
        matched_groups = key_groups[: queries.shape[0]] if targets is None else key_groups[targets]
    swapped = Options(None, matched_groups, query_groups, False, options.label_smoothing)
    of_columns, _ = _losses(matched, queries, query_queue, scale, swapped, call)
    return (of_rows + of_columns) / 2, rows


def _check_cute(queries: Tensor, options: Options) -> None:
    """Raise if the CuTe kernel cannot take the call."""
    limits = {
        "symmetric=False": not options.symmetric,
        "groups": options.query_groups is not None,
        f"{queries.shape[1]} features, more than 512": queries.shape[1] > 512,
    }
    for what, given in limits.items():
        if given:
            raise RuntimeError(f"mmkernels.info_nce: impl='cute' cannot take {what}; impl='triton' can")


def _check_groups(queries: Tensor, keys: Tensor, query_groups: Tensor | None, key_groups: Tensor | None) -> None:
    for name, groups, other, features in (
        ("query_groups", query_groups, key_groups, queries),
        ("key_groups", key_groups, query_groups, keys),
    ):
        if groups is not None:
            check_indices(name, groups, features.shape[0])
            check_device(name, groups, "queries", queries)
        elif other is not None:
            raise ValueError(f"{name}: expected int64 ids, as both sides need them, got None; pass {name}")


def _check_queues(queries: Tensor, key_queue: Tensor | None, query_queue: Tensor | None, symmetric: bool) -> None:
    for name, queue in (("key_queue", key_queue), ("query_queue", query_queue)):
        if queue is None:
            continue
        check_matrix(name, queue)
        if queue.shape[1] != queries.shape[1]:
            raise ValueError(f"{name}: expected D = {queries.shape[1]} as in queries, got {queue.shape[1]}")
        check_device(name, queue, "queries", queries)
    if query_queue is not None and not symmetric:
        raise ValueError(
            "query_queue: expected None with symmetric=False, got a tensor; its rows are negatives of the keys, "
            "whose losses symmetric=True adds"
        )


def _require_matches(keys: Tensor, options: Options) -> None:
    """Checks values as the implementations do, for arguments that they do not see as the caller gave them."""
    if torch.compiler.is_compiling():
        return  # tracing sees no values
    targets, query_groups, key_groups, symmetric, _ = options
    if targets is not None:
        require_targets("info_nce", targets, keys.shape[0], "keys")
    if query_groups is not None and key_groups is not None:
        numbered = number_groups(query_groups, key_groups)
        require_groups(numbered, query_groups, key_groups, targets, symmetric)
