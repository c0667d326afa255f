"""How retrieval is called, and what it refuses: the spec that tests/contract.py holds it to."""

import torch

import mmkernels
from mmkernels.testing import features
from tests.contract import Call, Memory, Spec, bad_pairs


def rows(dtype, n):
    queries = features(n, 33, dtype, seed=1)
    return [queries, features(n + 10, 33, dtype, seed=2)], [torch.arange(n) * 7 % (n + 10)]


def ranks(impl, queries, keys, targets):
    return mmkernels.retrieval_ranks(queries, keys, targets, impl=impl)


def ranks_of_the_diagonal(impl, queries, keys, *targets):
    return mmkernels.retrieval_ranks(queries, keys, impl=impl)


def topk(k, make=rows):
    return Call(make, lambda impl, queries, keys, *targets: mmkernels.retrieval_topk(queries, keys, k, impl=impl))


def bad_ranks():
    q, k, t = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(4).long()
    return bad_pairs() | {
        "targets: 6 queries and 4 keys do not match": (ValueError, (k, q), {}),
        "targets: expected an int64 tensor": (TypeError, (q, k, [0, 1, 2, 3]), {}),
        "targets: expected int64": (TypeError, (q, k, t.int()), {}),
        r"targets: expected shape \(4,\)": (ValueError, (q, k, t[:3]), {}),
        "targets: expected device cpu": (ValueError, (q, k, t.to("meta")), {}),
        "targets: expected indices of the 6 keys, 0 to 5, got 6": (ValueError, (q, k, torch.tensor([0, 6, 1, 2])), {}),
        "targets: expected indices of the 6 keys, 0 to 5, got -1": (
            ValueError,
            (q, k, torch.tensor([0, -1, 1, 2])),
            {},
        ),
    }


def bad_topk():
    q, k = torch.zeros(4, 8), torch.zeros(6, 8)
    return bad_pairs(1) | {
        "k: expected an int, got float": (TypeError, (q, k, 2.0), {}),
        "k: expected an int, got bool": (TypeError, (q, k, True), {}),
        "k: expected at least 1, got 0": (ValueError, (q, k, 0), {}),
        "k: expected at most 6, the number of keys, got 7; use min": (ValueError, (q, k, 7), {}),
    }


def pairs(dtype, n):
    """As many queries as keys, of 64 features."""
    return [features(n, 64, dtype, seed=seed) for seed in (0, 1)], []


def scores_of_a_tile(tensors, scratch):
    return max(2 << 20, scratch)


RETRIEVAL_RANKS = Spec(
    {"targets": Call(rows, ranks), "diagonal": Call(rows, ranks_of_the_diagonal)},
    mmkernels.retrieval_ranks,
    bad_ranks,
    memory={"pairs": Memory(Call(pairs, ranks_of_the_diagonal), 8192, scores_of_a_tile)},
    differentiable=False,
)
RETRIEVAL_TOPK = Spec(
    {"topk": topk(5)},
    mmkernels.retrieval_topk,
    bad_topk,
    memory={f"k = {k}": Memory(topk(k, pairs), 8192, scores_of_a_tile) for k in (1, 10, 100)},
    differentiable=False,
)
