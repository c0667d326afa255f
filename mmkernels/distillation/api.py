"""The public call: docstring, validation, autocast, choice of implementation."""

from typing import Literal

from torch import Tensor

from mmkernels import _backends
from mmkernels._checks import (
    as_scalar,
    check_device,
    check_flag,
    check_matrix,
    check_number,
    check_pairs,
    check_reduction,
    check_weights,
    in_one_dtype,
)
from mmkernels._reduction import reduced
from mmkernels.distillation import ops, reference
from mmkernels.distillation.options import Options


def distillation(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    teacher_scale: Tensor | float,
    *,
    symmetric: bool = True,
    weights: Tensor | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto",
) -> Tensor:
    """Contrastive cross-entropy of a student under a teacher: the teacher's softmaxes are the targets.

    Replaces::

        logits = logit_scale * queries @ keys.T                    # [N, M], here N = M, stored for the backward pass
        teacher = teacher_scale * teacher_queries @ teacher_keys.T
        rows, columns = teacher.detach().softmax(1), teacher.detach().T.softmax(1)
        loss = (F.cross_entropy(logits, rows) + F.cross_entropy(logits.T, columns)) / 2

    by one pass over tiles of both logits; nothing of size N x M is stored, forward or backward (except on a CPU the
    products of both, if they take no more than 64 MiB). Features are used as they come: normalise them first for cosine
    similarities.

    Args:
        queries: [N, D], float32, bfloat16, float16 (accumulated in float32) or float64 (reference only).
        keys: [M, D], dtype and device of `queries`.
        logit_scale: inverse temperature of the student; a float or a tensor of one element, which then receives a
            gradient.
        teacher_queries: [N, D'], dtype and device of `queries`. The target of row i is
            softmax_j(teacher_scale * <teacher_queries_i, teacher_keys_j>), and that of column j the softmax of the same
            logits over the queries. The teacher gets no gradient.
        teacher_keys: [M, D']; see `teacher_queries`.
        teacher_scale: inverse temperature of the teacher; a float or a tensor of one element.
        symmetric: average with the cross-entropies of the columns; all of them count, so this needs N = M. False keeps
            the rows alone.
        weights: [N], floating-point, one for each query's loss: "mean" divides by their sum, "sum" and "none" multiply.
        reduction: "mean" or "sum" over the N queries, or "none" for one loss per query, [N].
        impl: "auto" picks the best implementation that can run; a name runs that one or raises.

    Returns:
        The loss: a scalar, or [N] for reduction="none"; float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes, devices or values.
        RuntimeError: the `impl` asked for cannot run here; the text lists every implementation with its reason.

    Gradients flow to `queries`, `keys`, `logit_scale` and `weights`; each is computed only if it is needed. The
    gradient is itself not differentiable (impl="reference" is). Results are the same bits from run to run. NaN in, NaN
    out. Under autocast the features are cast to its dtype; sums and statistics stay float32.

    Source: Hinton et al. 2015 (arXiv:1503.02531); for contrastive logits: open_clip's DistillClipLoss.
    """
    check_reduction(reduction)
    losses, _ = distillation_losses(
        queries, keys, logit_scale, teacher_queries, teacher_keys, teacher_scale, symmetric, impl
    )
    check_weights(queries, weights)
    return reduced(losses, reduction, weights)


def distillation_losses(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    teacher_scale: Tensor | float,
    symmetric: bool = True,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The loss of each query under the teacher and that of info_nce, [N] each, from the same tiles."""
    check_pairs(queries, keys)
    check_number("logit_scale", logit_scale, queries.device)
    _check_teacher(queries, keys, teacher_queries, teacher_keys, teacher_scale, symmetric)
    given = queries
    queries, keys = in_one_dtype("queries", given, "keys", keys)
    _, teacher_queries = in_one_dtype("queries", given, "teacher_queries", teacher_queries.detach())
    _, teacher_keys = in_one_dtype("queries", given, "teacher_keys", teacher_keys.detach())
    chosen = _backends.choose("distillation", impl, queries.device.type, queries.dtype)
    scale, teacher_scale = as_scalar(logit_scale, queries), as_scalar(teacher_scale, queries).detach()
    options = Options(teacher_queries, teacher_keys, teacher_scale, symmetric)
    if chosen == "reference":
        return reference.distillation(queries, keys, scale, options)
    return ops.distillation(queries, keys, scale, options, chosen)


def _check_teacher(
    queries: Tensor,
    keys: Tensor,
    teacher_queries: Tensor,
    teacher_keys: Tensor,
    teacher_scale: Tensor | float,
    symmetric: bool,
) -> None:
    for name, features, of, rows in (
        ("teacher_queries", teacher_queries, "queries", queries.shape[0]),
        ("teacher_keys", teacher_keys, "keys", keys.shape[0]),
    ):
        check_matrix(name, features)
        if features.shape[0] != rows:
            raise ValueError(f"{name}: expected {rows} rows, one for each of the {of}, got {features.shape[0]}")
        check_device(name, features, "queries", queries)
    if teacher_queries.shape[1] != teacher_keys.shape[1] or teacher_keys.shape[1] == 0:
        raise ValueError(
            f"teacher_keys: expected D >= 1 as in teacher_queries, {teacher_queries.shape[1]}, "
            f"got {teacher_keys.shape[1]}"
        )
    check_number("teacher_scale", teacher_scale, queries.device)
    check_flag("symmetric", symmetric)
    if symmetric and queries.shape[0] != keys.shape[0]:
        raise ValueError(
            f"keys: expected {queries.shape[0]} rows, one for each query, with a teacher and symmetric=True, "
            f"got {keys.shape[0]}; pass symmetric=False for the rows alone"
        )
