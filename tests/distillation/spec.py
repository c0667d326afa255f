"""How distillation is called, and what it refuses: the spec that tests/contract.py holds it to."""

import torch

import mmkernels
from mmkernels.testing import features
from tests.contract import Call, Memory, Spec


def rows(dtype, n, size=33, more=0, of_teacher=20):
    """Queries, keys and the scale; the teacher's queries and keys and its scale."""
    queries, teacher = features(n, size, dtype, seed=1), features(n, of_teacher, dtype, seed=3)
    keys = features(n + more, size, dtype, seed=2, like=queries, mean_cosine=0.3)
    teacher_keys = features(n + more, of_teacher, dtype, seed=4, like=teacher, mean_cosine=0.5)
    return [queries, keys, torch.tensor(5.0)], [teacher, teacher_keys, torch.tensor(7.0)]


def plain(impl, *tensors):
    return mmkernels.distillation(*tensors, impl=impl)


def rows_alone(impl, *tensors):
    return mmkernels.distillation(*tensors, symmetric=False, reduction="none", impl=impl)


CALLS = {
    # Products of 128 features are kept for the backward pass, narrower ones are not.
    "kept": Call(lambda dtype, n: rows(dtype, n, 128), plain),
    "symmetric": Call(rows, plain),
    "rows alone": Call(lambda dtype, n: rows(dtype, n, more=10), rows_alone),
}


def bad_inputs():
    q, k, t = torch.zeros(4, 8), torch.zeros(6, 8), torch.zeros(4, 5)
    good = {"queries": q, "keys": q, "logit_scale": 1.0, "teacher_queries": t, "teacher_keys": t, "teacher_scale": 1.0}
    return {
        "queries: expected a tensor": (TypeError, good | {"queries": [1.0]}),
        "logit_scale: expected a float or a tensor of one element, got str": (TypeError, good | {"logit_scale": "1"}),
        "symmetric: expected a bool, got str": (TypeError, good | {"symmetric": "no"}),
        "reduction: expected 'none', 'mean' or 'sum'": (ValueError, good | {"reduction": "max"}),
        r"weights: expected shape \(4,\)": (ValueError, good | {"weights": torch.ones(3)}),
        "teacher_scale: expected a float or a tensor of one element, got NoneType": (
            TypeError,
            good | {"teacher_scale": None},
        ),
        "teacher_queries: expected a tensor": (TypeError, good | {"teacher_queries": [1.0]}),
        "teacher_keys: expected float32": (TypeError, good | {"teacher_keys": t.long()}),
        "teacher_keys: expected 2 dimensions": (ValueError, good | {"teacher_keys": t[0]}),
        "teacher_queries: expected 4 rows, one for each of the queries, got 3": (
            ValueError,
            good | {"teacher_queries": t[:3]},
        ),
        "teacher_keys: expected 6 rows": (ValueError, good | {"keys": k, "symmetric": False}),
        "teacher_keys: expected D >= 1 as in teacher_queries, 5, got 4": (
            ValueError,
            good | {"teacher_keys": t[:, :4]},
        ),
        "teacher_keys: expected D >= 1 as in teacher_queries, 0, got 0": (
            ValueError,
            good | {"teacher_queries": t[:, :0], "teacher_keys": t[:, :0]},
        ),
        "teacher_queries: expected the dtype of queries": (TypeError, good | {"teacher_queries": t.half()}),
        "teacher_keys: expected device cpu": (ValueError, good | {"teacher_keys": t.to("meta")}),
        "teacher_scale: expected one element": (ValueError, good | {"teacher_scale": torch.ones(2)}),
        "keys: expected 4 rows, one for each query, with a teacher": (
            ValueError,
            good | {"keys": k, "teacher_keys": torch.zeros(6, 5)},
        ),
        "impl: expected 'auto' or one of 'triton', 'cpu', 'reference'": (ValueError, good | {"impl": "cuda"}),
    }


DISTILLATION = Spec(
    CALLS,
    mmkernels.distillation,
    lambda: {words: (error, (), options) for words, (error, options) in bad_inputs().items()},
    memory={"pairs": Memory(Call(lambda dtype, n: rows(dtype, n, 256, of_teacher=256), plain), 8192)},
    traced="teacher_keys: expected D >= 1 as in teacher_queries, 5, got 4",
)
