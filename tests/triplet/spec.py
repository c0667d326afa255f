"""How triplet is called, and what it refuses: the spec that tests/contract.py holds it to."""

import torch

import mmkernels
from mmkernels.testing import features
from tests.contract import Call, Memory, Spec, bad_pairs
from tests.triplet.cases import MININGS


def rows(dtype, n):
    queries = features(n, 33, dtype, seed=1)
    return [queries, features(n + 10, 33, dtype, seed=2, like=queries, mean_cosine=0.3)], []


def pairs(dtype, n):
    """As many queries as keys, of 256 features."""
    return [features(n, 256, dtype, seed=seed) for seed in (0, 1)], []


def differs(mining):
    """A worst negative at infinity is taken for a NaN. NaN costs have a gradient, unlike those of torch.relu, and pairs
    without a cost have none, not even 0 times infinity."""
    return lambda impl, tensor, entry, result: result > 0 or (mining != "all" and abs(entry) == torch.inf)


def call(mining, reduction, symmetric, make=rows):
    # At this margin every query has negatives that cost something, semi-hard ones among them.
    options = {"margin": 1.0, "mining": mining, "reduction": reduction, "symmetric": symmetric}
    return Call(make, lambda impl, *tensors: mmkernels.triplet(*tensors, impl=impl, **options), differs(mining))


CALLS = {
    f"{mining}-{reduction}": call(mining, reduction, symmetric=reduction == "mean")
    for mining in MININGS
    for reduction in ("mean", "none")
}


def bad_inputs():
    q, k = torch.zeros(4, 8), torch.zeros(6, 8)
    return bad_pairs() | {
        "keys: expected at least N = 6 rows, .* got 4": (ValueError, (k, q), {}),
        "margin: expected a float, got Tensor": (TypeError, (q, k), {"margin": torch.tensor(0.2)}),
        "margin: expected a finite value of at least 0, got -0.1": (ValueError, (q, k), {"margin": -0.1}),
        "margin: expected a finite value of at least 0, got nan": (ValueError, (q, k), {"margin": float("nan")}),
        "margin: expected a finite value of at least 0, got inf": (ValueError, (q, k), {"margin": float("inf")}),
        "mining: expected one of 'all', 'hardest', 'semi_hard', got 'semihard'": (
            ValueError,
            (q, k),
            {"mining": "semihard"},
        ),
        "symmetric: expected a bool, got int": (TypeError, (q, k), {"symmetric": 1}),
        "reduction: expected": (ValueError, (q, k), {"reduction": "avg"}),
    }


def statistics(tensors, scratch):
    """The worst negatives: nothing as large as the features, 64 bytes for each query and the scratch of a thread."""
    return max(64 * len(tensors[0]) + (1 << 20), scratch)


def gradients_of_one_pass(tensors, scratch):
    """They wait in float32 until the backward pass has made of them what it returns; from other dtypes, the queries'
    are cast first."""
    queries, keys = tensors
    waiting = 4 * (queries.numel() + keys.numel())
    return max(waiting + (0 if queries.dtype == torch.float32 else waiting // 2), scratch)


TRIPLET = Spec(
    CALLS,
    mmkernels.triplet,
    bad_inputs,
    memory={
        mining: Memory(
            call(mining, "mean", symmetric=True, make=pairs),
            8192,
            gradients_of_one_pass if mining == "all" else statistics,
        )
        for mining in MININGS
    },
)
