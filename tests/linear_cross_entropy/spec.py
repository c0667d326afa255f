"""How linear_cross_entropy is called, and what it refuses: the spec that tests/contract.py holds it to."""

import torch

import mmkernels
from mmkernels.testing import features
from tests.contract import Call, Memory, Spec, inputs_or_scratch


def rows(dtype, n, bias, ignored, size=33, classes=None):
    """Hidden rows, weight and perhaps a bias; the targets, some or all of them ignored."""
    classes = classes or n + 10
    tensors = [10 * features(n, size, dtype, seed=1), features(classes, size, dtype, seed=2)]
    targets = torch.arange(n) * 7 % classes
    return tensors + [torch.linspace(-1, 1, classes)] * bias, [targets.masked_fill(torch.arange(n) % 3 < ignored, -100)]


def with_bias(impl, hidden, weight, bias, targets):
    return mmkernels.linear_cross_entropy(hidden, weight, targets, bias=bias, label_smoothing=0.1, impl=impl)


def without_bias(impl, hidden, weight, targets):
    return mmkernels.linear_cross_entropy(hidden, weight, targets, reduction="none", impl=impl)


CALLS = {
    "bias, some ignored": Call(lambda dtype, n: rows(dtype, n, bias=True, ignored=1), with_bias),
    "no bias": Call(lambda dtype, n: rows(dtype, n, bias=False, ignored=1), without_bias),
}


def bad_inputs():
    h, w, t, b = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(4).long(), torch.zeros(6)
    return {
        "hidden: expected a tensor": (TypeError, ([1.0], w, t), {}),
        "weight: expected float32, bfloat16": (TypeError, (h, w.long(), t), {}),
        "weight: expected the dtype of hidden": (TypeError, (h, w.half(), t), {}),
        "weight: expected a dense tensor": (TypeError, (h, w.to_sparse(), t), {}),
        "targets: expected a dense tensor": (TypeError, (h, w, t.to_sparse()), {}),
        "bias: expected a dense tensor": (TypeError, (h, w, t), {"bias": b.to_sparse()}),
        r"hidden: expected 2 dimensions .*flatten": (ValueError, (h[None], w, t), {}),
        "weight: expected 2 dimensions": (ValueError, (h, w[0], t), {}),
        "weight: expected at least one class": (ValueError, (h, w[:0], t), {}),
        "hidden: expected D >= 1": (ValueError, (h[:, :0], w[:, :0], t), {}),
        "weight: expected D = 8": (ValueError, (h, w[:, :5], t), {}),
        "weight: expected device cpu": (ValueError, (h, w.to("meta"), t), {}),
        "bias: expected device cpu": (ValueError, (h, w, t), {"bias": b.to("meta")}),
        "bias: expected a tensor or None": (TypeError, (h, w, t), {"bias": 1.0}),
        "bias: expected a floating-point": (TypeError, (h, w, t), {"bias": b.long()}),
        r"bias: expected shape \(6,\)": (ValueError, (h, w, t), {"bias": b[:5]}),
        "targets: expected an int64 tensor": (TypeError, (h, w, [0, 1, 2, 3]), {}),
        "targets: expected int64": (TypeError, (h, w, t.int()), {}),
        r"targets: expected shape \(4,\)": (ValueError, (h, w, t[:3]), {}),
        "targets: expected indices of the 6 rows of weight, 0 to 5, or ignore_index=-100, got 6": (
            ValueError,
            (h, w, torch.tensor([0, 6, 1, -100])),
            {},
        ),
        "0 to 5, or ignore_index=-1, got -100": (
            ValueError,
            (h, w, torch.tensor([0, -100, 1, -1])),
            {"ignore_index": -1},
        ),
        "ignore_index: expected an int": (TypeError, (h, w, t), {"ignore_index": None}),
        "label_smoothing: expected a float": (TypeError, (h, w, t), {"label_smoothing": None}),
        r"label_smoothing: expected a value in \[0, 1\], got 1.5": (ValueError, (h, w, t), {"label_smoothing": 1.5}),
        r"label_smoothing: expected a value in \[0, 1\], got nan": (
            ValueError,
            (h, w, t),
            {"label_smoothing": float("nan")},
        ),
        "reduction: expected": (ValueError, (h, w, t), {"reduction": "avg"}),
        "impl: expected 'auto' or one of": (ValueError, (h, w, t), {"impl": "cuda13"}),
    }


def vocabulary(ignored):
    return Call(lambda dtype, n: rows(dtype, n, True, ignored, size=256, classes=20_000), with_bias)


LINEAR_CROSS_ENTROPY = Spec(
    CALLS,
    mmkernels.linear_cross_entropy,
    bad_inputs,
    memory={
        "all count": Memory(vocabulary(0), 4096),
        # The rows that count are copied together if some do not.
        "some ignored": Memory(
            vocabulary(1), 4096, lambda tensors, scratch: inputs_or_scratch(tensors, scratch) + tensors[0].nbytes
        ),
    },
    traced="weight: expected D = 8",
)
