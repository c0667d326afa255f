"""Every op keeps in Triton's interpreter what the contract says of numbers that are not finite.

tests/conftest.py runs this file in a process of its own, where the interpreter is chosen before Triton is imported.
"""

import pytest
import torch

from tests import contract
from tests.specs import CALLS, SPECS

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")


FIRST = [case for case in CALLS if case.values[1] in [next(iter(spec.calls.values())) for spec in SPECS]]
CASES = [
    pytest.param(*case.values, entry, id=f"{case.id}-{entry}", marks=[] if fast else pytest.mark.slow)
    for case in CALLS
    for entry in contract.NOT_FINITE
    for fast in [case in FIRST and entry != -torch.inf]
]


@pytest.mark.parametrize(("spec", "call", "entry"), CASES)
def test_what_is_not_finite_means_the_same(spec, call, entry):
    contract.check_not_finite(spec, call, "triton", entry, size=20)
