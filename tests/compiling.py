"""What the compile checks share: the forms of an op's Triton kernels, compiled for GPUs that need not be here."""

import os
from collections.abc import Callable, Iterable

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import gpu_bounds, gpu_limits, registry
from benchmarks.harness.gpu_forms import Case

__all__ = ["check", "each_form", "gpu_bounds", "registry"]


def each_form(forms: Iterable[Case], is_plain: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """Makes a test for each form. Those that users run most are plain, and fast; the rest is slow."""
    marks = {True: (), False: pytest.mark.slow}
    cases = [pytest.param(form, id=form.name, marks=marks[is_plain(form)]) for form in forms]
    assert cases
    return pytest.mark.parametrize("form", cases)


def check(form: Case) -> None:
    """The form neither spills nor takes too much shared memory; it uses the matrix units, and TF32 only if asked to. By
    the model of the scheduler it is no slower than its limit."""
    found = gpu_bounds.faults(form, gpu_bounds.compile_case(form))
    assert not found, "; ".join(found)  # pytest explains the asserts of test files alone
    assert gpu_limits.excess(form) == ""
