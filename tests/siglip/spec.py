"""How siglip is called, and what it refuses: the spec that tests/contract.py holds it to."""

import torch

import mmkernels
from mmkernels.testing import features
from tests.contract import Call, Memory, Spec, bad_pairs


def rows(dtype, n, size=33, more=10):
    """[N, D] and [N + more, D], the scale and the bias."""
    queries = features(n, size, dtype, seed=1)
    keys = features(n + more, size, dtype, seed=2, like=queries, mean_cosine=0.3)
    return [queries, keys, torch.tensor(5.0), torch.tensor(-5.0)], []


def scale_is_infinite(impl, tensor, entry, result):
    """The kernels multiply the product by it, the eager lines each feature: infinity less infinity."""
    return tensor == 2 and abs(entry) == torch.inf


def call(reduction, make=rows):
    return Call(
        make, lambda impl, *tensors: mmkernels.siglip(*tensors, reduction=reduction, impl=impl), scale_is_infinite
    )


CALLS = {reduction: call(reduction) for reduction in ("mean", "sum", "none")}


def bad_inputs():
    q, k = torch.zeros(4, 8), torch.zeros(6, 8)
    return bad_pairs(1.0) | {
        "keys: expected at least N = 6 rows, .* got 4": (ValueError, (k, q, 1.0), {}),
        "logit_scale: expected one element": (ValueError, (q, k, torch.ones(2)), {}),
        "logit_scale: expected a floating": (TypeError, (q, k, torch.tensor(3)), {}),
        "logit_scale: expected a float or": (TypeError, (q, k, "3"), {}),
        "logit_bias: expected one element": (ValueError, (q, k, 1.0, torch.ones(2)), {}),
        "logit_bias: expected a floating": (TypeError, (q, k, 1.0, torch.tensor(3)), {}),
        "logit_bias: expected a float or": (TypeError, (q, k, 1.0, None), {}),
        "reduction: expected": (ValueError, (q, k, 1.0), {"reduction": "avg"}),
        "process_group: expected a ProcessGroup or a DeviceMesh": (TypeError, (q, k, 1.0), {"process_group": object()}),
    }


def pairs(size, reduction="mean"):
    """As many queries as keys; `size` is the number of features."""
    return call(reduction, lambda dtype, n: rows(dtype, n, size, more=0))


MEMORY = {reduction: Memory(pairs(256, reduction), 8192) for reduction in ("mean", "none")}
SIGLIP = Spec(CALLS, mmkernels.siglip, bad_inputs, memory=MEMORY)
