"""Every op keeps the contract of tests/contract.py, on every implementation that runs on a CPU."""

import itertools

import pytest
import torch

import mmkernels
from mmkernels import _backends
from tests import contract
from tests.cpu_kernels import DTYPES, needs_library
from tests.specs import CALLS, SPECS

FAKE = ["triton", "cpu"]  # what runs on meta tensors through fake kernels
IMPLS = [pytest.param("cpu", marks=needs_library), "reference"]
LEARNING = [case for case in CALLS if case.values[0].differentiable]
FIRST = [pytest.param(spec, next(iter(spec.calls.values())), id=spec.op) for spec in SPECS]
GRAPHS = [case for case in CALLS if case.values[0].one_graph]
RANKING = [case for case in CALLS if not case.values[0].differentiable]
MEMORY = [pytest.param(spec, memory, id=f"{spec.op}-{name}") for spec in SPECS for name, memory in spec.memory.items()]
BAD = [pytest.param(spec, words, id=f"{spec.op}-{words}") for spec in SPECS for words in spec.bad_inputs()]


def test_every_op_has_a_spec():
    public = {name for name in mmkernels.__all__ if not isinstance(getattr(mmkernels, name), type)}
    # These are eager torch and have no implementation to choose: tests/divided_attention/test_cpu.py holds the maps,
    # tests/distributed/test_contrastive_step.py the step.
    assert {spec.op for spec in SPECS} == public - {"divided_attention_maps", "contrastive_step"}


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op)
def test_every_spec_bounds_the_memory(spec):
    assert spec.memory


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("spec", "call"), CALLS)
@needs_library
def test_opcheck(spec, call, dtype):
    contract.check_opcheck(spec, call, dtype)


@pytest.mark.parametrize(("spec", "call"), GRAPHS)
@needs_library
def test_compile_whole_graph_with_dynamic_shapes(spec, call):
    """The first call of each op under inductor; opcheck sees the strides that inductor alone relies on."""
    contract.check_compile(spec, call, "inductor" if call is next(iter(spec.calls.values())) else "aot_eager")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("spec", "call"), CALLS)
def test_autocast(spec, call, impl, dtype):
    contract.check_autocast(spec, call, impl, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "call"), LEARNING)
@needs_library
def test_second_backward_with_retain_graph(spec, call, dtype):
    contract.check_second_backward(call, dtype)


@pytest.mark.parametrize(("spec", "call"), LEARNING)
@needs_library
def test_double_backward_is_refused_and_the_reference_offers_it(spec, call):
    contract.check_double_backward(spec, call)


@pytest.mark.parametrize(("spec", "call"), RANKING)
@needs_library
def test_nan_is_seen_where_there_is_no_gradient(spec, call):
    contract.check_nan_is_seen(call)


@pytest.mark.parametrize("entry", contract.NOT_FINITE)
@pytest.mark.parametrize(("spec", "call"), CALLS)
@needs_library
def test_what_is_not_finite_means_the_same(spec, call, entry):
    contract.check_not_finite(spec, call, "cpu", entry)


@pytest.mark.parametrize(("count", "scratch"), [(1, 0), (64, 64 << 20)], ids=["1 thread", "64 threads"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("spec", "memory"), MEMORY)
@needs_library
def test_memory_is_bounded(spec, memory, dtype, count, scratch, threads):
    threads(count)
    contract.check_memory(spec, memory, dtype, scratch)


@pytest.mark.parametrize(
    ("impl", "dtype"),
    [*itertools.product(["auto", "reference"], [torch.float64, torch.bfloat16]), *itertools.product(FAKE, DTYPES[1:2])],
    ids=str,
)
@pytest.mark.parametrize(("spec", "call"), GRAPHS)
def test_meta_tensors_give_shapes_and_dtypes(spec, call, impl, dtype):
    contract.check_meta(spec, call, impl, dtype)


@pytest.mark.parametrize("impl", FAKE)
@pytest.mark.parametrize(("spec", "call"), GRAPHS)
def test_flops_are_those_of_the_reference(spec, call, impl):
    contract.check_flops(spec, call, impl)


@pytest.mark.parametrize("strides", contract.STRIDES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(("spec", "call"), CALLS)
def test_strides_do_not_matter(spec, call, impl, strides):
    contract.check_strides(spec, call, impl, strides)


@pytest.mark.parametrize(("spec", "call"), FIRST)
@needs_library
def test_float64_runs_in_the_reference(spec, call):
    contract.check_float64(spec, call)


@pytest.mark.skipif(torch.cuda.is_available() or _backends.triton_interprets(), reason="Triton can run here")
@pytest.mark.parametrize(("spec", "call"), FIRST)
def test_triton_is_refused_with_every_reason(spec, call):
    contract.check_triton_is_refused(call)


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize(("spec", "words"), BAD)
def test_bad_input_is_named(spec, words, impl):
    contract.check_bad_input(spec, words, impl)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.op)
def test_bad_input_is_named_under_compile(spec):
    contract.check_bad_input_under_compile(spec)
