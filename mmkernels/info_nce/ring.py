"""InfoNCE over ranks: each brings its own rows, and the loss is that of the joined batch.

Blocks of keys visit all ranks (mmkernels.distributed.tour). Forward, what comes home is the log-sum-exp of each key's
logits; backward, the key's gradient. No rank holds the features of all, and no matrix of logits is stored.

The gradient is that of the sum of all ranks' losses: each rank's is complete for its features, and its share for the
scale. Own and others' statistics stay apart until they meet in

    loss_i = own loss_i + (softplus(others' lse_i - own lse_i) + the same of column t_i) / 2,

so that a loss near zero keeps its digits.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._autograd import refuse_second_derivatives
from mmkernels._flops import gradients, product
from mmkernels._library import register_everywhere
from mmkernels.distributed.by_id import sum_by_index
from mmkernels.distributed.gathered import GatheredRows
from mmkernels.distributed.ranks import Group, Ranks, ranks_by_name
from mmkernels.distributed.tour import Chunk, Tensors, summed_tour, tour
from mmkernels.info_nce import ops, reference
from mmkernels.info_nce.options import Options
from mmkernels.info_nce.ring_groups import RankGroups, gradients_of_positives, losses_of_positives

_NO_TARGET = -1
_NO_GROUP = torch.iinfo(torch.int64).min  # of a queue's keys


class _Sizes(NamedTuple):
    """Of every rank."""

    queries: list[int]
    keys: list[int]


def ring_forward(
    queries: Tensor,  # [n, D]
    keys: Tensor,  # [m, D]
    scale: Tensor,  # []
    targets: Tensor | None,  # [n], of the own keys
    query_groups: Tensor | None,  # [n]
    key_groups: Tensor | None,  # of the first keys
    rows: Tensor,  # [2, ranks], how many queries and keys each has
    symmetric: bool,
    label_smoothing: float,
    outer: str,
    inner: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses [n], and the log-sum-exps over all ranks as the backend has them: rows [2, n], columns [2, m]."""
    ranks = ranks_by_name(outer, inner)
    sizes = _Sizes(*rows.tolist())
    unit = math.log(2) if backend == "triton" else 1.0  # Triton's logarithms are in base 2
    own_rows = targets_or_diagonal(targets, queries)
    anywhere = torch.zeros_like(own_rows)
    of_rows: list[Tensor] = []  # log-sum-exps, own first
    losses = scale.new_empty(0)

    def visit(chunk: Chunk) -> Tensors:
        nonlocal losses
        shifted = anywhere if chunk.own is None else own_rows + chunk.own.start
        found, row_lse, col_lse, _ = ops.forward[backend](
            queries, chunk.tensors[0], scale, shifted, None, None, symmetric, 0.0, False
        )
        if chunk.own is not None:
            losses = found
        row = row_lse.double().sum(0) * unit
        of_rows.append(row if len(of_rows) < 2 else torch.logaddexp(of_rows.pop(), row))
        return (col_lse.double().sum(0) * unit,) if symmetric else ()

    own, others = tour(ranks, (keys,), sizes.keys, visit, lambda a, b: tuple(map(torch.logaddexp, a, b)))
    row_lse, more = _joined(*of_rows)
    if symmetric:
        col_lse, of_columns = _joined(*own, *(others or ()))
        more = (more + of_columns[own_rows]) / 2
    else:
        col_lse = row_lse[:0]
    if query_groups is not None and key_groups is not None:
        groups, group = RankGroups(query_groups, key_groups), Group(outer, inner, ranks.size, ranks.rank)
        more += (1 - label_smoothing) * losses_of_positives(queries, keys, scale, groups, own_rows, symmetric, group)
    losses = (losses + more).float()
    if label_smoothing > 0:
        losses += label_smoothing * _smoothing(queries, keys, scale, own_rows, symmetric, ranks, sizes)
    return losses, _in_two(row_lse / unit), _in_two(col_lse / unit)


def ring_backward(
    grad_losses: Tensor,  # [n]
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    targets: Tensor | None,
    query_groups: Tensor | None,
    key_groups: Tensor | None,
    rows: Tensor,  # [2, ranks]
    row_lse: Tensor,  # [2, n]
    col_lse: Tensor,  # [2, m]
    symmetric: bool,
    label_smoothing: float,
    outer: str,
    inner: str,
    backend: str,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and scale; an empty tensor for each false entry of output_mask."""
    ranks, sizes = ranks_by_name(outer, inner), _Sizes(*rows.tolist())
    own_rows = targets_or_diagonal(targets, queries)
    row_weights = grad_losses.float() * (0.5 if symmetric else 1.0)
    col_weights = row_weights[:0]
    if symmetric:
        col_weights = sum_by_index(row_weights[:, None], own_rows, len(keys))[:, 0].contiguous()
    groups = None if query_groups is None or key_groups is None else RankGroups(query_groups, key_groups)
    nowhere = torch.full_like(own_rows, _NO_TARGET)
    grad_queries = queries.new_zeros(queries.shape if output_mask[0] else 0, dtype=torch.float32)
    grad_scale = scale.new_zeros((), dtype=torch.float64)

    def visit(chunk: Chunk) -> Tensors:
        block_keys, *of_columns = chunk.tensors
        block_lse, block_weights = (
            (of_columns[0].T.contiguous(), of_columns[1]) if symmetric else (col_lse, col_weights)
        )
        here = nowhere if chunk.own is None or groups is not None else own_rows + chunk.own.start
        of_queries, of_keys, of_scale = ops.block_backward[backend](
            queries, block_keys, scale, here, row_lse, block_lse, row_weights, block_weights, label_smoothing,
            output_mask,
        )  # fmt: skip
        if output_mask[0]:
            grad_queries.add_(of_queries)
        if output_mask[2]:
            grad_scale.add_(of_scale)
        return (of_keys,) if output_mask[1] else ()  # all ranks want them or none

    block = (keys, col_lse.T.contiguous(), col_weights) if symmetric else (keys,)
    (grad_keys,) = summed_tour(ranks, block, sizes.keys, visit) or (keys.new_empty(0, dtype=torch.float32),)
    more = []
    if groups is not None:
        u, w = ((1 - label_smoothing) * weights for weights in (row_weights, col_weights))
        more.append(gradients_of_positives(queries, keys, scale, groups, u, w, ranks))
    if label_smoothing > 0:
        more.append(
            _smoothing_gradients(
                queries, keys, scale, row_weights, col_weights, symmetric, label_smoothing, ranks, sizes
            )
        )
    for of in more:
        if output_mask[0]:
            grad_queries += of[0]
        if output_mask[1]:
            grad_keys += of[1]
        grad_scale += of[2]
    return (
        grad_queries.to(queries.dtype),
        grad_keys.to(keys.dtype),
        grad_scale.float() if output_mask[2] else scale.new_empty(0),
    )


def targets_or_diagonal(targets: Tensor | None, queries: Tensor) -> Tensor:
    return torch.arange(len(queries), device=queries.device) if targets is None else targets


def _joined(own: Tensor, others: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of both, and by how much it is above one's own."""
    if others is None:
        return own, torch.zeros_like(own)
    return torch.logaddexp(own, others), F.softplus(others - own, threshold=1e30)


def _in_two(lse: Tensor) -> Tensor:
    """[2, ...] float32: the rounded value and its rounding error."""
    value = lse.float()
    return torch.stack([value, (lse - value).float()])


def _smoothing(
    queries: Tensor, keys: Tensor, scale: Tensor, targets: Tensor, symmetric: bool, ranks: Ranks, sizes: _Sizes
) -> Tensor:
    """[n]: what label smoothing adds to the losses per unit: the logit of the positive minus the mean of all."""
    q, matched = queries.double(), keys.double()[targets]
    mean_key = ranks.total(keys.double().sum(0)) / sum(sizes.keys)
    positive = (q * matched).sum(1)
    more = positive - q @ mean_key
    if symmetric:
        mean_query = ranks.total(q.sum(0)) / sum(sizes.queries)
        more = (more + positive - matched @ mean_query) / 2
    return (scale.double() * more).float()


def _smoothing_gradients(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    row_weights: Tensor,  # [n]
    col_weights: Tensor,  # [m], [0] unless symmetric
    symmetric: bool,
    label_smoothing: float,
    ranks: Ranks,
    sizes: _Sizes,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of -eps (u_i / M + w_j / N) at every logit (i, j): products of vectors, as the matrix has rank 2."""
    q, k, u, w = queries.double(), keys.double(), row_weights.double(), col_weights.double()
    num_queries, num_keys = sum(sizes.queries), sum(sizes.keys)
    sums = [k.sum(0) / num_keys, u @ q / num_keys]
    if symmetric:
        sums += [q.sum(0) / num_queries, w @ k / num_queries]
    own, totals = torch.stack(sums), ranks.total(torch.stack(sums))
    of_queries = u[:, None] * totals[0]
    of_keys = totals[1].expand_as(k)
    # This rank's share: its rows over all keys, its columns over all queries.
    of_scale = own[1] @ totals[0] * num_keys
    if symmetric:
        of_queries = of_queries + totals[3]
        of_keys = of_keys + w[:, None] * totals[2]
        of_scale = of_scale + own[3] @ totals[2] * num_queries
    factor = -label_smoothing * scale.double()
    return (factor * of_queries).float(), (factor * of_keys).float(), -label_smoothing * of_scale


def _forward_fake(queries: Tensor, keys: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    symmetric = rest[4]
    shapes = ((len(queries),), (2, len(queries)), (2, len(keys) if symmetric else 0))
    return tuple(map(scale.new_empty, shapes))


def _backward_fake(_: Tensor, queries: Tensor, keys: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    inputs = zip((queries, keys, scale), rest[-1], strict=True)
    return tuple(x.new_empty(x.shape if wanted else 0) for x, wanted in inputs)


def _forward_flops(queries: Sequence[int], keys: Sequence[int], *rest: Any) -> int:
    return ranks_by_name(*rest[-3:-1]).size * product(queries, keys)  # as if all ranks had as many rows


def _backward_flops(_: Any, queries: Sequence[int], keys: Sequence[int], *rest: Any) -> int:
    return ranks_by_name(*rest[-4:-2]).size * gradients(queries, keys, *rest[-1])


_OF = (
    "Tensor queries, Tensor keys, Tensor scale, Tensor? targets, Tensor? query_groups, Tensor? key_groups, Tensor rows"
)
_OPTIONS = "bool symmetric, float label_smoothing, str outer, str inner, str backend"
_forward = register_everywhere(
    "info_nce_ring_forward",
    f"({_OF}, {_OPTIONS})"
    " -> (Tensor losses, Tensor row_lse, Tensor col_lse)",
    ring_forward, _forward_fake, _forward_flops,
)  # fmt: skip
_backward = register_everywhere(
    "info_nce_ring_backward",
    f"(Tensor grad_losses, {_OF}, Tensor row_lse, Tensor col_lse, {_OPTIONS}, bool[3] output_mask)"
    " -> (Tensor grad_queries, Tensor grad_keys, Tensor grad_scale)",
    ring_backward, _backward_fake, _backward_flops,
)  # fmt: skip


class _RingInfoNCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, options: Options, rows: Tensor, *where: str
    ) -> Tensor:
        *tensors, symmetric, label_smoothing = options
        ctx.options = symmetric, label_smoothing, *where
        losses, *lse = _forward(queries, keys, scale, *tensors, rows, *ctx.options)
        ctx.save_for_backward(queries, keys, scale, *tensors, rows, *lse)
        return losses

    @staticmethod
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor | None, ...]:
        saved, mask = ctx.saved_tensors, list(ctx.needs_input_grad[:3])
        with torch.no_grad():
            grads = _backward(grad_losses, *saved, *ctx.options, mask)
        if torch.is_grad_enabled():  # create_graph=True
            grads = refuse_second_derivatives("info_nce", grads, grad_losses, *saved[:3])
        found = (grad if needed else None for grad, needed in zip(grads, mask, strict=True))
        return *found, *(None,) * 5


def info_nce(
    queries: Tensor, keys: Tensor, scale: Tensor, options: Options, rows: Tensor, group: Group, backend: str
) -> Tensor:
    """One loss per own query, [n] float32; differentiable."""
    return _RingInfoNCE.apply(queries, keys, scale, options, rows, group.outer, group.inner, backend)


def reference_over_ranks(
    queries: Tensor, keys: Tensor, scale: Tensor, options: Options, rows: Tensor, group: Group
) -> Tensor:
    """One loss per own query, [n], from the matrix of logits of all ranks."""
    sizes, ranks = _Sizes(*rows.tolist()), group.ranks
    first_query, first_key = (sum(counts[: ranks.rank]) for counts in sizes)
    own = targets_or_diagonal(options.targets, queries) + first_key
    targets = ranks.gather(own, sizes.queries)
    all_queries, all_keys = (
        GatheredRows.apply(x, counts, ranks) for x, counts in zip((queries, keys), sizes, strict=True)
    )
    options = options._replace(targets=targets)
    if options.query_groups is not None and options.key_groups is not None:
        of_none = options.key_groups.new_full((len(keys) - len(options.key_groups),), _NO_GROUP)
        options = options._replace(
            query_groups=ranks.gather(options.query_groups, sizes.queries),
            key_groups=ranks.gather(torch.cat([options.key_groups, of_none]), sizes.keys),
        )
    losses = reference.info_nce(all_queries, all_keys, None, scale, options)
    return losses[first_query : first_query + len(queries)]
