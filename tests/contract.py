"""What every op must do, over a spec of each op: tests/<op>/spec.py says how it is called, tests/test_contract.py runs
the checks below on it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mmkernels.testing import peak_allocated
from tests.op_arguments import op_calls

# Sizes of one compiled graph: less than a vector tile, a panel, more than one.
SIZES = (33, 64, 130)


@dataclass(frozen=True)
class Call:
    """One way to call an op."""

    make: Callable[[torch.dtype, int], tuple[list[Tensor], list[Tensor]]]  # differentiable tensors, and the others
    run: Callable[..., Any]  # run(impl, *differentiable, *others)
    # differs(impl, tensor, entry, result): whether an `entry` of that tensor may make result number `result` (the
    # outputs, then the gradients) of another kind than the reference's: NaN, infinite or finite. The op's page says so.
    differs: Callable[[str, int, float, int], bool] = lambda impl, tensor, entry, result: False

    def outputs(self, impl: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.run(impl, *tensors)
        return tuple(result) if isinstance(result, tuple) else (result,)


# kSharedBytes of csrc/common/engine.cpp: keys that all panels read packed.
SHARED_KEYS = 8 << 20


def inputs_or_scratch(tensors: list[Tensor], scratch: int) -> int:
    """The op holds no more than queries, keys and packed keys, or than the scratch of many threads."""
    return max(tensors[0].nbytes + tensors[1].nbytes + SHARED_KEYS, scratch)


def matrix(tensors: list[Tensor]) -> int:
    """[N, M] of queries [N, D] and keys [M, D]."""
    return len(tensors[0]) * len(tensors[1]) * tensors[0].dtype.itemsize


@dataclass(frozen=True)
class Memory:
    """A call at a size at which the tensor that the op must not store would show."""

    call: Call
    size: int
    # Bytes that the op may hold beside its results, of its tensors and the scratch that many threads may take.
    allowed: Callable[[list[Tensor], int], int] = inputs_or_scratch
    unwanted: Callable[[list[Tensor]], int] = matrix  # bytes of what it must not store


@dataclass(frozen=True)
class Spec:
    calls: dict[str, Call]
    # The public call, and what it must refuse: the words of the message (a regular expression) -> the error, the
    # arguments, the options.
    public: Callable[..., Any]
    bad_inputs: Callable[[], dict[str, tuple[type[Exception], tuple, dict[str, Any]]]]
    memory: dict[str, Memory]
    differentiable: bool = True
    autocast: bool = True  # casts the features; False: takes them as they are
    one_graph: bool = True  # can be compiled without a graph break
    backward_flops: Fraction = Fraction(1)  # what the backward pass counts, of what the reference's does
    traced: str = "keys: expected D = 8"  # the words of the bad input that is tried under torch.compile

    @property
    def op(self) -> str:
        return self.public.__name__


def bad_pairs(*more: Any) -> dict[str, tuple[type[Exception], tuple, dict[str, Any]]]:
    """What every op over queries [N, D] and keys [M, D] refuses; `more` are the arguments behind them."""
    q, k = torch.zeros(4, 8), torch.zeros(6, 8)
    return {
        "queries: expected a tensor": (TypeError, ([1.0], k, *more), {}),
        "keys: expected float32, bfloat16": (TypeError, (q, k.long(), *more), {}),
        "keys: expected the dtype of queries": (TypeError, (q, k.half(), *more), {}),
        "queries: expected a dense tensor, got layout torch.sparse_coo": (TypeError, (q.to_sparse(), k, *more), {}),
        "keys: expected a dense tensor, got layout torch.sparse_coo": (TypeError, (q, k.to_sparse(), *more), {}),
        "queries: expected 2 dimensions": (ValueError, (q[0], k, *more), {}),
        "keys: expected 2 dimensions": (ValueError, (q, k[None], *more), {}),
        "queries: expected at least one row": (ValueError, (q[:0], k, *more), {}),
        "keys: expected at least one row": (ValueError, (q, k[:0], *more), {}),
        "queries: expected D >= 1": (ValueError, (q[:, :0], k[:, :0], *more), {}),
        "keys: expected D = 8": (ValueError, (q, k[:, :5], *more), {}),
        "keys: expected device cpu": (ValueError, (q, k.to("meta"), *more), {}),
        "impl: expected 'auto' or one of": (ValueError, (q, k, *more), {"impl": "cuda13"}),
    }


def total(outputs: tuple[Tensor, ...]) -> Tensor:
    """A number whose gradient arrives at every entry of the first output with a weight of its own."""
    first = outputs[0]
    weights = torch.linspace(0.5, 1.5, first.numel(), dtype=torch.float64, device=first.device).view_as(first)
    return (first.double() * weights).sum()


def learning(tensors: list[Tensor], needed: Callable[[int], bool] = lambda index: True) -> list[Tensor]:
    return [x.detach().clone().requires_grad_(needed(index)) for index, x in enumerate(tensors)]


def check_opcheck(spec: Spec, call: Call, dtype: torch.dtype) -> None:
    """torch.library.opcheck of every op that a call and its backward pass dispatch, for all gradients, one and none."""
    found = []
    for needed in (lambda index: True, lambda index: index == 1, lambda index: False):
        leaves, others = call.make(dtype, 70)
        leaves = learning(leaves, lambda index, needed=needed: spec.differentiable and needed(index))
        with op_calls() as calls:
            outputs = call.outputs("cpu", *leaves, *others)
            if outputs[0].requires_grad:
                total(outputs).backward()
        found += calls
    assert found, "no registered op ran"
    for function, arguments in found:
        detached = [x.detach() if isinstance(x, Tensor) else x for x in arguments]
        torch.library.opcheck(function, detached)


def check_compile(spec: Spec, call: Call, backend: str) -> None:
    """One graph, forward and backward, for several sizes, that gives what the eager call gives."""
    torch.compiler.reset()

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return call.outputs("cpu", *(x * 1 if x.is_floating_point() else x for x in tensors))

    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for size in SIZES:
        leaves, others = call.make(torch.float32, size)
        results = []
        for function in (run, compiled):
            own = learning(leaves, lambda _: spec.differentiable)
            outputs = function(*own, *others)
            grads = torch.autograd.grad(total(outputs), own) if spec.differentiable else ()
            results.append((*outputs, *grads))
        for eager, graph in zip(*results, strict=True):
            torch.testing.assert_close(graph, eager, rtol=1e-4, atol=1e-6)


def check_autocast(spec: Spec, call: Call, impl: str, dtype: torch.dtype) -> None:
    """The features are cast, if any are; other numbers and the losses stay float32, a gradient has its leaf's dtype."""
    leaves, others = call.make(torch.float32, 100)
    own = learning(leaves, lambda _: spec.differentiable)
    with torch.autocast("cpu", dtype=dtype):
        actual = call.outputs(impl, *own, *others)
    given = (*leaves, *others)
    cast = [x.to(dtype) if spec.autocast and x.is_floating_point() and x.ndim > 1 else x for x in given]
    for a, b in zip(actual, call.outputs(impl, *cast), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)
    if spec.differentiable:
        total(actual).backward()
        assert all(x.grad.dtype == x.dtype for x in own)


def check_second_backward(call: Call, dtype: torch.dtype) -> None:
    """A graph that is retained gives the same gradients again, and does not write into those it has given."""
    leaves, others = call.make(dtype, 100)
    own = learning(leaves)
    loss = total(call.outputs("cpu", *own, *others))
    first = torch.autograd.grad(loss, own, retain_graph=True)
    kept = [x.clone() for x in first]
    doubled = torch.autograd.grad(2 * loss, own, retain_graph=True)
    third = torch.autograd.grad(loss, own)
    for a, b, c, d in zip(first, doubled, third, kept, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(2 * a, b, rtol=1e-6, atol=2.0**-24 if dtype == torch.float16 else 0)
        assert torch.equal(a, c)
        assert torch.equal(a, d)


def check_double_backward(spec: Spec, call: Call) -> None:
    """The compiled kernels refuse a second derivative by name; the reference has it."""

    def second_derivatives(impl: str, through: int) -> list[Tensor]:
        leaves, others = call.make(torch.float32, 10)
        own = learning(leaves)
        (grad,) = torch.autograd.grad(total(call.outputs(impl, *own, *others)), own[through], create_graph=True)
        return [x for x in torch.autograd.grad(grad.square().sum(), own, allow_unused=True) if x is not None]

    for through in range(len(call.make(torch.float32, 10)[0])):
        with pytest.raises(RuntimeError, match=f"{spec.op}: second derivatives are not implemented; impl='reference'"):
            second_derivatives("cpu", through)
    assert any(x.abs().max() > 0 for x in second_derivatives("reference", 0))


def check_nan_is_seen(call: Call) -> None:
    """A row of NaN in what an op only ranks: the reference sees it, and the kernels give what the reference gives."""
    clean = call.outputs("reference", *itertools.chain(*call.make(torch.float32, 70)))
    for where in range(len(call.make(torch.float32, 70)[0])):
        tensors, others = call.make(torch.float32, 70)
        rows = tensors[where].flatten(0, -2)
        rows[len(rows) * 5 // 7] = torch.nan  # a whole row: most of its tokens may be forbidden
        actual, expected = (call.outputs(impl, *tensors, *others) for impl in ("cpu", "reference"))
        assert not all(torch.equal(a, b) for a, b in zip(expected, clean, strict=True)), where
        torch.testing.assert_close(actual, expected, equal_nan=True)


NOT_FINITE = (torch.nan, torch.inf, -torch.inf)


def kinds(x: Tensor) -> Tensor:
    """0 where a number is finite, else 1 for NaN, 2 for infinity and 3 for minus infinity."""
    return x.isnan().int() + 2 * (x == torch.inf) + 3 * (x == -torch.inf)


def check_not_finite(spec: Spec, call: Call, impl: str, entry: float, size: int = 70) -> None:
    """One entry that is not finite, in each tensor by turns. An output is NaN, infinite or finite where the reference's
    is; a gradient is finite everywhere if the reference's is, and not if that is not. A NaN reaches outputs and
    gradients."""
    for where in range(sum(map(len, call.make(torch.float32, size)))):
        results = []
        for chosen in (impl, "reference"):
            leaves, others = call.make(torch.float32, size)
            tensors = [*leaves, *others]
            if not tensors[where].is_floating_point():
                break
            tensors[where].view(-1)[tensors[where].numel() * 5 // 7] = entry
            own = learning(tensors[: len(leaves)], lambda _: spec.differentiable)
            outputs = call.outputs(chosen, *own, *tensors[len(leaves) :])
            results.append((outputs, torch.autograd.grad(total(outputs), own) if spec.differentiable else ()))
        if not results:
            continue
        (outputs, grads), (expected_outputs, expected_grads) = results
        if grads and where < len(leaves) and entry != entry:
            assert any(x.isnan().any() for x in expected_outputs), f"tensor {where}: no output shows it"
        for number, (a, b) in enumerate(zip(outputs, expected_outputs, strict=True)):
            named = f"tensor {where}, output {number}"
            if not a.is_floating_point():
                assert torch.equal(a, b), named
            elif call.differs(impl, where, entry, number):
                assert torch.equal(a.isfinite(), b.isfinite()), named
            else:
                assert torch.equal(kinds(a), kinds(b)), named
        for number, (a, b) in enumerate(zip(grads, expected_grads, strict=True)):
            if not call.differs(impl, where, entry, len(outputs) + number):
                assert a.isfinite().all() == b.isfinite().all(), f"tensor {where}, gradient {number}"
        if grads and outputs[0].isnan().any():
            assert not all(x.isfinite().all() for x in grads), f"tensor {where}: no gradient shows it"


def bytes_beyond_results(call: Call, leaves: list[Tensor], others: list[Tensor], differentiable: bool) -> int:
    """Bytes that torch holds at most at one time beside outputs and, after a backward pass, gradients."""
    own = learning(leaves, lambda _: differentiable)
    outputs: list[Tensor] = []

    def step() -> tuple[Tensor, ...]:
        outputs[:] = call.outputs("cpu", *own, *others)
        return torch.autograd.grad(outputs[0].sum(), own) if differentiable else ()

    peak = peak_allocated(step)
    results = sum(x.nbytes for x in (*(own if differentiable else ()), *outputs))
    assert peak >= results, "no allocation was seen"
    return peak - results


def check_memory(spec: Spec, memory: Memory, dtype: torch.dtype, scratch: int) -> None:
    leaves, others = memory.call.make(dtype, memory.size)
    allowed = memory.allowed([*leaves, *others], scratch) + (1 << 16)
    assert allowed < memory.unwanted([*leaves, *others])
    assert bytes_beyond_results(memory.call, leaves, others, spec.differentiable) <= allowed


def on_meta(tensors: list[Tensor], needed: Callable[[int], bool] = lambda index: True) -> list[Tensor]:
    floats = [x.is_floating_point() and needed(index) for index, x in enumerate(tensors)]
    return [x.to("meta").requires_grad_(learns) for x, learns in zip(tensors, floats, strict=True)]


def check_meta(spec: Spec, call: Call, impl: str, dtype: torch.dtype) -> None:
    """Tensors without data: results and gradients have the shapes and dtypes that the reference has with data."""
    results = []
    for without_data in (False, True):
        leaves, others = call.make(dtype, 70)
        own = learning(leaves, lambda _: spec.differentiable)
        if without_data:
            own, others = on_meta(leaves, lambda _: spec.differentiable), on_meta(others, lambda _: False)
        outputs = call.outputs(impl if without_data else "reference", *own, *others)
        grads = torch.autograd.grad(total(outputs), own) if spec.differentiable else ()
        results.append((*outputs, *grads))
    for real, meta in zip(*results, strict=True):
        assert meta.is_meta
        assert (meta.shape, meta.dtype) == (real.shape, real.dtype)


def flops(call: Call, impl: str, needed: Callable[[int], bool]) -> int:
    """What torch counts for both passes with gradients to the tensors that need one."""
    leaves, others = call.make(torch.float32, 70)
    own, others = on_meta(leaves, needed), on_meta(others, lambda _: False)
    with FlopCounterMode(display=False) as counter:
        outputs = call.outputs(impl, *own, *others)
        if outputs[0].requires_grad:
            total(outputs).backward()
    return counter.get_total_flops()


def check_flops(spec: Spec, call: Call, impl: str) -> None:
    """Every implementation counts the matrix products of the reference, whatever it makes again or leaves out."""
    forward = flops(call, "reference", lambda _: False)
    assert flops(call, impl, lambda _: False) == forward
    for index in range(len(call.make(torch.float32, 70)[0])) if spec.differentiable else ():
        for needed in (lambda at, index=index: at == index, lambda at, index=index: at != index):
            backward = flops(call, "reference", needed) - forward
            assert flops(call, impl, needed) - forward == spec.backward_flops * backward, index


# Where the entries of a tensor lie: as columns, apart from each other, all rows at one place.
STRIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "columns": lambda x: x.mT.contiguous().mT if x.ndim > 1 else x,
    "apart": lambda x: torch.stack([x, x], -1)[..., 0],
    "rows of stride 0": lambda x: x[:1].expand_as(x) if x.ndim > 0 else x,
}


def check_strides(spec: Spec, call: Call, impl: str, strides: str) -> None:
    """Results and gradients do not depend on where the entries lie."""
    results = []
    for lies in (STRIDES[strides], lambda x: STRIDES[strides](x).contiguous()):
        leaves, others = call.make(torch.float32, 70)
        own = learning(leaves, lambda _: spec.differentiable)
        outputs = call.outputs(impl, *map(lies, [*own, *others]))
        grads = torch.autograd.grad(total(outputs), own) if spec.differentiable else ()
        results.append((*outputs, *grads))
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def check_float64(spec: Spec, call: Call) -> None:
    """impl="auto" takes the reference, an explicit choice raises with every backend's reason."""
    leaves, others = call.make(torch.float64, 20)
    floats = [x.dtype for x in call.outputs("auto", *leaves, *others) if x.is_floating_point()]
    assert not floats or floats[0] == torch.float64
    with pytest.raises(RuntimeError, match=r"(?s)impl='cpu' cannot run.*triton:.*cpu: .*float64.*reference: can run"):
        call.outputs("cpu", *leaves, *others)


def check_triton_is_refused(call: Call) -> None:
    leaves, others = call.make(torch.float32, 20)
    with pytest.raises(RuntimeError, match=r"(?s)impl='triton' cannot run.*triton: .+cpu: .+reference: can run"):
        call.outputs("triton", *leaves, *others)


def check_bad_input(spec: Spec, words: str, impl: str) -> None:
    error, arguments, options = spec.bad_inputs()[words]
    with pytest.raises(error, match=words):
        spec.public(*arguments, **{"impl": impl, **options})


def check_bad_input_under_compile(spec: Spec) -> None:
    """A wrong shape is refused in the same words while it is traced, and by the same error where graphs may break."""
    error, arguments, options = spec.bad_inputs()[spec.traced]
    tensors = {**dict(enumerate(arguments)), **options}
    names = [name for name, value in tensors.items() if isinstance(value, Tensor)]

    def call(*given: Tensor) -> Any:
        all_arguments = tensors | dict(zip(names, given, strict=True))
        positional = [all_arguments.pop(index) for index in range(len(arguments))]
        return spec.public(*positional, **all_arguments)

    for fullgraph, expected in ((True, Exception), (False, error)):
        torch.compiler.reset()
        with pytest.raises(expected, match=spec.traced):
            torch.compile(call, fullgraph=fullgraph, backend="eager")(*(tensors[name] for name in names))
