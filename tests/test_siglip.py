"""siglip on the CPU: numbers, gradients, memory, compilation and the refusal of bad input."""

import pytest
import torch
from siglip_cases import CASES, REDUCTIONS, Case, run, run_eager

import mmkernels
from mmkernels.testing import assert_within_budget

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_reference_is_the_eager_code(case, reduction):
    queries, keys, scale, bias = case.inputs(torch.float64)
    exact = run(queries, keys, scale, bias, "reference", reduction)
    for a, b in zip(exact, run_eager(queries, keys, scale, bias, reduction), strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-6, atol=1e-6)


def bad_inputs():
    q, k = torch.zeros(4, 8), torch.zeros(6, 8)
    return {
        "queries: expected a tensor": (TypeError, ([1.0], k, 1.0), {}),
        "keys: expected float32, bfloat16": (TypeError, (q, k.long(), 1.0), {}),
        "keys: expected the dtype of queries": (TypeError, (q, k.half(), 1.0), {}),
        "queries: expected 2 dimensions": (ValueError, (q[0], k, 1.0), {}),
        "keys: expected 2 dimensions": (ValueError, (q, k[None], 1.0), {}),
        "queries: expected at least one row": (ValueError, (q[:0], k, 1.0), {}),
        "keys: expected at least one row": (ValueError, (q, k[:0], 1.0), {}),
        "queries: expected D >= 1": (ValueError, (q[:, :0], k[:, :0], 1.0), {}),
        "keys: expected D = 8": (ValueError, (q, k[:, :5], 1.0), {}),
        "keys: expected device cpu": (ValueError, (q, k.to("meta"), 1.0), {}),
        "keys: expected at least N = 6 rows, .* got 4": (ValueError, (k, q, 1.0), {}),
        "logit_scale: expected one element": (ValueError, (q, k, torch.ones(2)), {}),
        "logit_scale: expected a floating": (TypeError, (q, k, torch.tensor(3)), {}),
        "logit_scale: expected a float or": (TypeError, (q, k, "3"), {}),
        "logit_bias: expected one element": (ValueError, (q, k, 1.0, torch.ones(2)), {}),
        "logit_bias: expected a floating": (TypeError, (q, k, 1.0, torch.tensor(3)), {}),
        "logit_bias: expected a float or": (TypeError, (q, k, 1.0, None), {}),
        "reduction: expected": (ValueError, (q, k, 1.0), {"reduction": "avg"}),
        "impl: expected 'auto' or one of": (ValueError, (q, k, 1.0), {"impl": "cuda13"}),
        "process_group": (NotImplementedError, (q, k, 1.0), {"process_group": object()}),
    }


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("text", bad_inputs())
def test_bad_input_is_named(text, impl):
    error, arguments, options = bad_inputs()[text]
    with pytest.raises(error, match=text):
        mmkernels.siglip(*arguments, **{"impl": impl, **options})


def test_bad_input_is_named_under_compile():
    compiled = torch.compile(lambda q, k: mmkernels.siglip(q, k, 1.0), fullgraph=True)
    with pytest.raises(Exception, match="keys: expected D = 8"):
        compiled(torch.zeros(4, 8), torch.zeros(6, 5))


@pytest.mark.parametrize("fault", ["zero", "off by one"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_budget_fails_for(fault, dtype):
    queries, keys, scale, bias = Case(257, 257, 64, near=0.9).inputs(dtype)
    exact = run(queries.double(), keys.double(), scale, bias, "reference")
    eager = run_eager(queries, keys, scale, bias)
    if fault == "zero":
        wrong = [torch.zeros_like(x) for x in eager]
    else:
        # Without the bias: its gradient, the sum of all probabilities less one a row, does not see which key matches.
        wrong = run(queries, keys.roll(1, 0), scale, bias, "reference")[:4]
    for a, b, c in zip(wrong, eager, exact, strict=False):
        with pytest.raises(AssertionError, match=r"error .* budget"):
            assert_within_budget(a.to(b.dtype), b, c, dtype=dtype)
