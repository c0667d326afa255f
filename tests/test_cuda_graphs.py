"""Every op's Triton path can be captured in a CUDA graph: nothing in it waits for the GPU or copies from the host.

The ops run on fake CUDA tensors, which have shapes and devices and no values: what would read a value on the host
fails, and copies are seen. The launchers run whole, but for the launches, which are counted.
"""

import contextlib
import importlib
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mmkernels import _backends
from mmkernels._tiles import launch
from mmkernels._tiles import triton as tiles
from tests.contract import Call, Spec, learning, total
from tests.specs import CALLS

triton = pytest.importorskip("triton")

PACKAGES = (
    "beam_search", "distillation", "divided_attention", "info_nce", "linear_cross_entropy", "retrieval", "siglip",
    "triplet",
)  # fmt: skip


class Captured(TorchDispatchMode):
    """Runs the launchers in place of the ops' fake kernels, and refuses copies between the host and the GPU."""

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "mmkernels":
            name = func._schema.name.removeprefix("mmkernels::").replace("_triton", "")
            package = next(package for package in PACKAGES if name.startswith(package))
            with self:
                return getattr(importlib.import_module(f"mmkernels.{package}.triton_kernels"), name)(*args, **kwargs)
        result = func(*args, **kwargs)
        places = {leaf.device.type for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)}
        assert len(places) < 2, f"{func} copies between {' and '.join(sorted(places))}"
        return result


def backward(output: Tensor) -> bool:
    """The backward pass down to the op's Function, and whether there is one. torch's engine would ask the GPU for its
    streams, so each node is called by itself."""
    found = False
    gradients = [(output.grad_fn, torch.ones_like(output))]
    for node, gradient in gradients:
        if hasattr(node, "apply"):
            others = node._input_metadata[1:]
            found = True
            node.apply(gradient, *(torch.zeros(of.shape, dtype=of.dtype, device=of.device) for of in others))
        else:
            made = node(gradient)
            following = [edge for edge, _ in node.next_functions]
            gradients += zip(following[:1], made if isinstance(made, tuple) else [made], strict=False)
    return found


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """An H100 that takes launches and does nothing; the names of the kernels that were launched."""
    found: list[str] = []
    properties = types.SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132, L2_cache_size=50 << 20)
    monkeypatch.setattr(_backends, "unavailable", lambda impl, op=None: None)
    monkeypatch.setattr(_backends, "triton_interprets", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(FakeTensor, "data_ptr", lambda tensor: 0, raising=False)
    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", lambda kernel, *_, **__: found.append(kernel.__name__))
    yield found
    for cached in (tiles.family_of, tiles.chip_of, launch.launcher):
        cached.cache_clear()


# A search ends when all beams have: it asks the GPU so every few steps, and its steps do not.
ONE_GRAPH = [call for call in CALLS if call.values[0].one_graph]


@pytest.mark.parametrize(("spec", "call"), ONE_GRAPH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nothing_waits_for_the_gpu(spec: Spec, call: Call, dtype: torch.dtype, launches: list[str]) -> None:
    tensors = call.make(dtype, 70)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        leaves, others = tree_map_only(Tensor, lambda x: mode.from_tensor(x).to("cuda:0"), tensors)
        leaves = learning(leaves, lambda _: spec.differentiable)
        with Captured():
            outputs = call.outputs("triton", *leaves, *others)
            assert launches
            if spec.differentiable:
                assert backward(total(outputs))
