"""Several positives per query: the keys of the query's own group. Shared by the implementations in Python."""

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """The groups of queries and keys by numbers below M, and how many positives each has."""

    queries: Tensor  # [N], int32
    keys: Tensor  # [M], int32
    of_query: Tensor  # [N], int64, the keys of its group
    of_key: Tensor  # [M], int64, the queries of its group


def number_groups(query_groups: Tensor, key_groups: Tensor) -> Groups:
    """Numbers each group by its first place among the sorted groups of the keys; never waits for the device. A query
    whose group no key has gets a number with no keys."""
    # searchsorted warns of a column of a table, and copies it.
    query_groups, key_groups = query_groups.contiguous(), key_groups.contiguous()
    keys, queries = key_groups.sort().values, query_groups.sort().values

    def range_in(groups: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
        return torch.searchsorted(groups, of), torch.searchsorted(groups, of, right=True)

    query_first, query_end = range_in(keys, query_groups)
    key_first, _ = range_in(keys, key_groups)
    first, end = range_in(queries, key_groups)
    return Groups(query_first.int(), key_first.int(), query_end - query_first, end - first)


def require_groups(
    groups: Groups, query_groups: Tensor, key_groups: Tensor, targets: Tensor | None, symmetric: bool
) -> None:
    """Raise if a query or a matched key has no positive: at once on a CPU, through a device assertion on a GPU."""
    if query_groups.is_meta:
        return  # there are no values to see
    matched = torch.arange(len(query_groups), device=key_groups.device) if targets is None else targets
    queries_of = groups.of_key[matched] if symmetric else None
    require_positives(groups.of_query, queries_of, query_groups, key_groups, matched)


def require_positives(
    keys_of: Tensor, queries_of: Tensor | None, query_groups: Tensor, key_groups: Tensor, matched: Tensor
) -> None:
    """As require_groups, by how many keys each query has [N], and how many queries each matched key [N]."""
    lonely_query = keys_of == 0
    lonely_key = None if queries_of is None else queries_of == 0
    if query_groups.is_cuda:
        torch._assert_async(~lonely_query.any(), "mmkernels.info_nce: query_groups: a query's group is that of no key")
        if lonely_key is not None:
            text = "mmkernels.info_nce: key_groups: a matched key's group is that of no query"
            torch._assert_async(~lonely_key.any(), text)
        return
    if lonely_query.any():
        i = int(lonely_query.int().argmax())
        raise ValueError(
            f"query_groups: expected groups of key_groups, query {i} is of group {int(query_groups[i])}, and no key is"
            "; leave the query out or pass a key of its group"
        )
    if lonely_key is not None and lonely_key.any():
        i = int(lonely_key.int().argmax())
        raise ValueError(
            f"key_groups: key {int(matched[i])} is matched by query {i}, and its group is that of no query; "
            "pass symmetric=False or the group of a query"
        )
