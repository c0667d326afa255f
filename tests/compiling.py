"""What the compile checks share: the forms of an op's Triton kernels, compiled for GPUs that need not be here."""

import os
from collections.abc import Callable, Iterable

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import gpu_bounds, registry
from benchmarks.harness.gpu_forms import Case

__all__ = ["check", "each_form", "gpu_bounds", "registry"]


def each_form(forms: Iterable[Case], is_plain: Callable[[Case], bool]) -> pytest.MarkDecorator:
    """A test of its own for each form. What users run most is plain, and fast; the rest is slow."""
    marks = {True: (), False: pytest.mark.slow}
    cases = [pytest.param(form, id=form.name, marks=marks[is_plain(form)]) for form in forms]
    assert cases
    return pytest.mark.parametrize("form", cases)


def check(form: Case) -> None:
    """No spill, no excess of shared memory, the matrix units in use, no TF32 that nobody asked for."""
    assert gpu_bounds.faults(form, gpu_bounds.compile_case(form)) == []
