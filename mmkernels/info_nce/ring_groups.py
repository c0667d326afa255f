"""Groups over ranks: the positives of a row are all keys of its group, on whichever rank they lie.

A row's target is uniform over its positives, so that only their mean counts, and of the gradient's positive part only
sums over groups: products of vectors, and no tile.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels.distributed.by_id import sums_by_id
from mmkernels.distributed.ranks import Group, RaisedByAll, Ranks
from mmkernels.info_nce.groups import require_positives


class RankGroups(NamedTuple):
    """The groups of the own queries and keys; keys past the end of `keys` are of none."""

    queries: Tensor  # [n], int64
    keys: Tensor  # [m'], int64

    def sums(self, of_queries: Tensor, of_keys: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
        """What all ranks' queries and keys of each own row's group add up to: for the queries [n, C + C'] and the keys
        [m', C + C'], first the columns of queries [n, C], then those of keys [m', C']."""
        values = torch.zeros(len(self.queries) + len(self.keys), of_queries.shape[1] + of_keys.shape[1]).to(of_queries)
        values[: len(self.queries), : of_queries.shape[1]] = of_queries
        values[len(self.queries) :, of_queries.shape[1] :] = of_keys
        found = sums_by_id(torch.cat(self), values, ranks)
        return found[: len(self.queries)], found[len(self.queries) :]


def losses_of_positives(
    queries: Tensor, keys: Tensor, scale: Tensor, groups: RankGroups, targets: Tensor, symmetric: bool, group: Group
) -> Tensor:
    """[n]: what the losses add where the logits of all positives replace that of the target: its logit minus their
    mean. The same error is raised on all ranks if a query or matched key has no positive."""
    ranks, size = group.ranks, queries.shape[1]
    q, k = queries.double(), keys.double()[: len(groups.keys)]
    for_queries, for_keys = groups.sums(_counted(q), _counted(k), ranks)
    for_matched = for_keys[targets]
    keys_of, queries_of = for_queries[:, size + 1], for_matched[:, 0]
    with RaisedByAll(group):
        require_positives(keys_of, queries_of if symmetric else None, *groups, targets)
    ranks.agree(queries.device, ())
    matched = k[targets]
    positive = (q * matched).sum(1)
    more = positive - (q * (for_queries[:, size + 2 :] / keys_of[:, None])).sum(1)
    if symmetric:
        more = (more + positive - (matched * (for_matched[:, 1 : size + 1] / queries_of[:, None])).sum(1)) / 2
    return scale.double() * more


def gradients_of_positives(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    groups: RankGroups,
    row_weights: Tensor,  # [n]
    col_weights: Tensor,  # [m], [0] unless symmetric
    ranks: Ranks,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of -(u_i / the keys of i's group + w_j / the queries of j's group) at every logit (i, j) of one group."""
    size = queries.shape[1]
    q, k = queries.double(), keys.double()[: len(groups.keys)]
    u = row_weights.double()[:, None]
    w = col_weights.double()[: len(k), None] if len(col_weights) else k.new_zeros(len(k), 1)
    for_queries, for_keys = groups.sums(torch.cat([_counted(q), u * q], 1), torch.cat([_counted(k), w * k], 1), ranks)
    columns = [1, size, size] * 2  # the count, the rows, the weighted rows: of queries, then of keys
    n_queries, _, _, n_keys, k_sum, k_weighted = for_queries.double().split(columns, 1)
    of_queries = u * k_sum / n_keys + k_weighted / n_queries
    of_scale = (u * q * k_sum / n_keys).sum()
    n_queries, q_sum, q_weighted, n_keys, _, _ = for_keys.double().split(columns, 1)
    n_queries = n_queries.clamp(min=1)  # a key that no query has is matched by none
    of_keys = torch.zeros_like(keys, dtype=torch.float64)
    of_keys[: len(k)] = q_weighted / n_keys + w * q_sum / n_queries
    of_scale = of_scale + (w * k * q_sum / n_queries).sum()  # this rank's share: its rows, and its columns
    return -scale.double() * of_queries, -scale.double() * of_keys, -of_scale


def _counted(x: Tensor) -> Tensor:
    """The rows with a 1 in front."""
    return torch.cat([x.new_ones(len(x), 1), x], 1)
