"""How info_nce is called, and what it refuses: the spec that tests/contract.py holds it to."""

import torch

import mmkernels
from mmkernels.testing import features
from tests.contract import Call, Memory, Spec, bad_pairs
from tests.info_nce.cases import repeated_targets


def rows(dtype, n, size=33, more=10):
    """[N, D] and [N + more, D] and the scale."""
    queries = features(n, size, dtype, seed=1)
    return queries, features(n + more, size, dtype, seed=2, like=queries, mean_cosine=0.3), torch.tensor(5.0)


def plain(impl, queries, keys, scale):
    return mmkernels.info_nce(queries, keys, scale, impl=impl)


def rows_alone(impl, queries, keys, scale, targets):
    return mmkernels.info_nce(queries, keys, scale, targets=targets, symmetric=False, label_smoothing=0.1, impl=impl)


def grouped(impl, queries, keys, scale, key_queue, query_queue, query_groups, key_groups, weights):
    return mmkernels.info_nce(
        queries, keys, scale, key_queue=key_queue, query_queue=query_queue, query_groups=query_groups,
        key_groups=key_groups, weights=weights, reduction="none", impl=impl,
    )  # fmt: skip


def queued(impl, queries, keys, scale, key_queue, query_groups, key_groups):
    return mmkernels.info_nce(
        queries, keys, scale, key_queue=key_queue, query_groups=query_groups, key_groups=key_groups,
        label_smoothing=0.1, reduction="sum", impl=impl,
    )  # fmt: skip


def groups(n, more=10):
    return [torch.arange(n) % 9, torch.arange(n + more) % 9]


CALLS = {
    # Products of 128 features are kept for the backward pass, narrower ones are not.
    "kept": Call(lambda dtype, n: ([*rows(dtype, n, 128)], []), plain),
    "symmetric": Call(lambda dtype, n: ([*rows(dtype, n)], []), plain),
    "rows alone, smoothing": Call(lambda dtype, n: ([*rows(dtype, n)], [repeated_targets(n, n + 10)]), rows_alone),
    "groups, both queues, weights": Call(
        lambda dtype, n: (
            [*rows(dtype, n), features(n + 5, 33, dtype, seed=3), features(n + 7, 33, dtype, seed=4)],
            [*groups(n), torch.linspace(0.1, 2.0, n)],
        ),
        grouped,
    ),
    "groups, queue without a gradient": Call(
        lambda dtype, n: ([*rows(dtype, n)], [features(n + 5, 33, dtype, seed=3), *groups(n)]), queued
    ),
}


def bad_inputs():
    q, k = torch.zeros(4, 8), torch.zeros(6, 8)

    def groups(of_queries, of_keys, **options):
        return {"query_groups": of_queries, "key_groups": of_keys, **options}

    return bad_pairs(1.0) | {
        "logit_scale: expected one element": (ValueError, (q, k, torch.ones(2)), {}),
        "logit_scale: expected a floating": (TypeError, (q, k, torch.tensor(3)), {}),
        "logit_scale: expected a dense tensor": (TypeError, (q, k, torch.ones(1).to_sparse()), {}),
        "weights: expected a dense tensor": (TypeError, (q, k, 1.0), {"weights": torch.ones(4).to_sparse()}),
        "logit_scale: expected a float or": (TypeError, (q, k, "3"), {}),
        "targets: 6 queries and 4 keys": (ValueError, (k, q, 1.0), {}),
        "targets: expected an int64 tensor": (TypeError, (q, k, 1.0), {"targets": [0, 1, 2, 3]}),
        "targets: expected int64": (TypeError, (q, k, 1.0), {"targets": torch.zeros(4)}),
        r"targets: expected shape \(4,\)": (ValueError, (q, k, 1.0), {"targets": torch.zeros(6).long()}),
        "targets: expected indices of the 6 keys, 0 to 5, got 6": (
            ValueError,
            (q, k, 1.0),
            {"targets": torch.tensor([0, 6, 1, 2])},
        ),
        "0 to 5, got -1": (ValueError, (q, k, 1.0), {"targets": torch.tensor([0, -1, 1, 2])}),
        "label_smoothing: expected a float": (TypeError, (q, k, 1.0), {"label_smoothing": None}),
        r"label_smoothing: expected a value in \[0, 1\], got 1.5": (ValueError, (q, k, 1.0), {"label_smoothing": 1.5}),
        r"label_smoothing: expected a value in \[0, 1\], got nan": (
            ValueError,
            (q, k, 1.0),
            {"label_smoothing": float("nan")},
        ),
        "reduction: expected": (ValueError, (q, k, 1.0), {"reduction": "avg"}),
        "key_groups: expected int64 ids, as both sides": (
            ValueError,
            (q, k, 1.0),
            {"query_groups": torch.zeros(4).long()},
        ),
        "query_groups: expected int64 ids, as both sides": (
            ValueError,
            (q, k, 1.0),
            {"key_groups": torch.zeros(6).long()},
        ),
        "query_groups: expected an int64 tensor": (TypeError, (q, k, 1.0), groups([1] * 4, torch.ones(6).long())),
        "key_groups: expected int64, got torch.int32": (
            TypeError,
            (q, k, 1.0),
            groups(torch.ones(4).long(), torch.ones(6).int()),
        ),
        r"key_groups: expected shape \(6,\)": (
            ValueError,
            (q, k, 1.0),
            groups(torch.ones(4).long(), torch.ones(4).long()),
        ),
        "key_groups: expected device cpu": (
            ValueError,
            (q, k, 1.0),
            groups(torch.ones(4).long(), torch.ones(6, device="meta").long()),
        ),
        "query 2 is of group -7, and no key is": (
            ValueError,
            (q, k, 1.0),
            groups(torch.tensor([3, 4, -7, 9]), torch.tensor([9, 3, 4, 4, 10, 1])),
        ),
        "key_groups: key 1 is matched by query 1, and its group is that of no query": (
            ValueError,
            (q, k, 1.0),
            groups(torch.tensor([3, 4, 4, 9]), torch.tensor([9, 5, 4, 3, 10, 1])),
        ),
        "key_groups: key 5 is matched by query 0": (
            ValueError,
            (q, k, 1.0),
            groups(torch.tensor([3, 4, 4, 9]), torch.tensor([9, 5, 4, 3, 10, 1]), targets=torch.tensor([5, 0, 2, 3])),
        ),
        "key_groups: key 1 is matched": (
            ValueError,
            (q, k, 1.0),
            groups(torch.tensor([3, 4, 4, 9]), torch.tensor([9, 5, 4, 3, 10, 1]), query_queue=q),
        ),
        "key_queue: expected a tensor": (TypeError, (q, k, 1.0), {"key_queue": [1.0]}),
        "key_queue: expected float32, bfloat16": (TypeError, (q, k, 1.0), {"key_queue": k.long()}),
        "key_queue: expected the dtype of queries": (TypeError, (q, k, 1.0), {"key_queue": k.half()}),
        "key_queue: expected D = 8": (ValueError, (q, k, 1.0), {"key_queue": k[:, :5]}),
        "query_queue: expected the dtype of queries": (TypeError, (q, k, 1.0), {"query_queue": k.half()}),
        "query_queue: expected 2 dimensions": (ValueError, (q, k, 1.0), {"query_queue": k[0]}),
        "query_queue: expected device cpu": (ValueError, (q, k, 1.0), {"query_queue": k.to("meta")}),
        "query_queue: expected None with symmetric=False": (
            ValueError,
            (q, k, 1.0),
            {"query_queue": q, "symmetric": False},
        ),
        "the 6 keys, 0 to 5, got 7": (
            ValueError,
            (q, k, 1.0),
            {"targets": torch.tensor([0, 7, 1, 2]), "key_queue": k},
        ),
        "weights: expected a floating-point tensor, got list": (TypeError, (q, k, 1.0), {"weights": [1.0] * 4}),
        "weights: expected a floating-point tensor, got torch.int64": (
            TypeError,
            (q, k, 1.0),
            {"weights": torch.ones(4).long()},
        ),
        r"weights: expected shape \(4,\)": (ValueError, (q, k, 1.0), {"weights": torch.ones(6)}),
        "weights: expected device cpu": (ValueError, (q, k, 1.0), {"weights": torch.ones(4, device="meta")}),
        "symmetric: expected a bool, got str": (TypeError, (q, k, 1.0), {"symmetric": "no"}),
        "process_group: expected a ProcessGroup or a DeviceMesh": (TypeError, (q, k, 1.0), {"process_group": object()}),
    }


def pairs(size):
    """As many queries as keys; `size` is the number of features."""
    return Call(lambda dtype, n: ([*rows(dtype, n, size, more=0)], []), plain)


INFO_NCE = Spec(CALLS, mmkernels.info_nce, bad_inputs, memory={"pairs": Memory(pairs(256), 8192)})
