"""Eager, obviously right, on any device: the oracle of the tests."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._checks import check_targets, without_autocast
from mmkernels.info_nce.groups import number_groups, require_groups
from mmkernels.info_nce.options import Options


def info_nce(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    key_queue: Tensor | None,  # [Q, D]
    scale: Tensor,  # []
    options: Options,
) -> Tensor:  # [N]
    """One loss per query, from the full matrix of logits in the dtype of `scale` (float32 or float64)."""
    targets, query_groups, key_groups, symmetric, label_smoothing = options
    num_keys = keys.shape[0]
    all_keys = keys if key_queue is None else torch.cat([keys, key_queue])
    own = torch.arange(queries.shape[0], device=queries.device)
    if targets is not None:
        check_targets(targets, num_keys, "keys")
    with without_autocast(queries):  # autocast would multiply in half precision
        logits = scale * queries.to(scale.dtype) @ all_keys.to(scale.dtype).T  # [N, M + Q]

    def of_matched_keys(x: Tensor) -> Tensor:
        """The columns of a matrix that belong to the matched keys, as rows [N, N]."""
        # A slice is a view of the columns. An index copies them, forward and backward.
        return x.T[: len(own)] if targets is None else x.T[targets]

    row_targets, column_targets = own if targets is None else targets, own
    if query_groups is not None and key_groups is not None:
        if not torch.compiler.is_compiling():  # tracing sees no values
            numbered = number_groups(query_groups, key_groups)
            require_groups(numbered, query_groups, key_groups, targets, symmetric)
        row_targets = F.pad(query_groups[:, None] == key_groups[None, :], (0, len(all_keys) - num_keys))  # [N, M + Q]
        column_targets = of_matched_keys(row_targets)
    rows = _cross_entropies(logits, row_targets, label_smoothing)
    if not symmetric:
        return rows
    return (rows + _cross_entropies(of_matched_keys(logits), column_targets, label_smoothing)) / 2


def _cross_entropies(logits: Tensor, targets: Tensor, label_smoothing: float) -> Tensor:
    """One loss per row; its target is a class, or uniform over the classes that are True in a mask like the logits."""
    if targets.dtype != torch.bool:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing, reduction="none")
    log_probabilities = logits.log_softmax(1)
    # Left out, not times 0: 0 times the logarithm of a probability of 0 is NaN.
    losses = -torch.where(targets, log_probabilities, 0.0).sum(1) / targets.sum(1)
    if label_smoothing > 0:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_probabilities.mean(1)
    return losses
