"""The public call: docstring, validation, autocast, choice of implementation."""

from typing import Any, Literal

from torch import Tensor

from mmkernels import _backends
from mmkernels._checks import as_scalar, check_matches, check_number, check_pairs, check_reduction, in_one_dtype
from mmkernels._reduction import reduced
from mmkernels.distributed.ranks import RaisedByAll, group_of, rows_of_ranks
from mmkernels.distributed.total import reduced_over_ranks
from mmkernels.siglip import ops, reference, ring


def siglip(
    queries: Tensor,
    keys: Tensor,
    logit_scale: Tensor | float,
    logit_bias: Tensor | float = 0.0,
    *,
    reduction: Literal["none", "mean", "sum"] = "mean",
    process_group: Any = None,
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto",
) -> Tensor:
    """Sigmoid loss: each pair of a query and a key is classified on its own, match or no match.

    Replaces::

        logits = logit_scale * queries @ keys.T + logit_bias       # [N, M], stored for the backward pass
        labels = 2 * torch.eye(*logits.shape, device=queries.device) - 1
        loss = -F.logsigmoid(labels * logits).sum() / len(queries)

    by one pass over tiles of the logits; nothing of size N x M is stored, forward or backward. Queries and keys
    are used as they come: normalise them first for cosine similarities.

    Args:
        queries: [N, D], float32, bfloat16, float16 (accumulated in float32) or float64 (reference only).
        keys: [M, D], dtype and device of `queries`. Key i matches query i. M may exceed N: the extra keys are extra
            negatives.
        logit_scale: inverse temperature; a float or a tensor of one element, which then receives a gradient.
        logit_bias: added to every logit; a float or a tensor of one element, which then receives a gradient. SigLIP
            starts it at -10.
        reduction: "sum" over all pairs, "mean" for that sum divided by N, or "none" for one loss per query, [N],
            each the sum over its M pairs.
        process_group: a `ProcessGroup`, or a `DeviceMesh` of one dimension or of two, (outer, inner): each rank calls
            with its own rows, and the loss is that of the joined batch; see `info_nce`. The gradient that arrives at a
            "mean" or "sum" must be the same on all ranks, as under DDP it is.
        impl: "auto" picks the best implementation that can run; a name runs that one or raises.

    Returns:
        The loss: a scalar, or [N] for reduction="none"; float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes, devices or values; more queries than keys.
        RuntimeError: the `impl` asked for cannot run here; the text lists every implementation with its reason.

    Gradients flow to `queries`, `keys`, `logit_scale` and `logit_bias`; each is computed only if it is needed. The
    gradient is itself not differentiable (impl="reference" is). Results are the same bits from run to run. NaN in,
    NaN out. Under autocast the features are cast to its dtype; logits and sums stay float32.

    Source: Zhai et al. 2023 (SigLIP), algorithm 1 (arXiv:2303.15343).
    """
    group = None if process_group is None else group_of(process_group)
    with RaisedByAll(group):
        check_pairs(queries, keys)
        check_matches(queries, keys)
        check_number("logit_scale", logit_scale, queries.device)
        check_number("logit_bias", logit_bias, queries.device)
        check_reduction(reduction)
        queries, keys = in_one_dtype("queries", queries, "keys", keys)
        chosen = _backends.choose("siglip", impl, queries.device.type, queries.dtype)
    scale, bias = as_scalar(logit_scale, queries), as_scalar(logit_bias, queries)
    if group is not None:
        rows = rows_of_ranks(queries, keys, group, chosen, {"reduction == 'none'": reduction == "none"})
        if chosen == "reference":
            losses = ring.reference_over_ranks(queries, keys, scale, bias, rows, group)
        else:
            losses = ring.siglip(queries, keys, scale, bias, reduction == "none", rows, group, chosen)
        return reduced_over_ranks(losses, reduction, None, group, rows[0])
    if chosen == "reference":
        return reduced(reference.siglip(queries, keys, scale, bias), reduction)
    return ops.siglip(queries, keys, scale, bias, reduction, chosen)
