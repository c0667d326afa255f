"""What a call of each loss launches on an H100: how often, and that a CUDA graph can capture all of it.

No GPU and no driver is needed: launches are noted instead of made, and CPU tensors stand in for a GPU's.
"""

import collections
import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

import mmkernels
from mmkernels import _backends
from mmkernels._tiles import configs, launch, products
from mmkernels._tiles import triton as tiles
from mmkernels.retrieval import triton_kernels as retrieval_kernels

pytestmark = pytest.mark.skipif(_backends.triton_interprets(), reason="the interpreter launches nothing")


def launcher_of(op):
    """The function that a registered op of Triton kernels calls."""
    loss, rest = op.split("_triton_")
    return getattr(importlib.import_module(f"mmkernels.{loss}.triton_kernels"), f"{loss}_{rest}")


class Watched(TorchDispatchMode):
    """Counts torch's kernels; refuses what waits for a GPU, which a graph cannot capture."""

    WAITS = ("_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "is_nonzero", "equal")
    FREE = ("empty", "new_empty", "empty_strided", "empty_like", "new_empty_strided")

    def __init__(self):
        super().__init__()
        self.kernels, self.bytes = collections.Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        assert not name.startswith(self.WAITS), f"{name} waits for the device"
        if name.startswith("mmkernels::"):
            with self:  # what it launches is watched, too
                return launcher_of(name.removeprefix("mmkernels::"))(*args)
        result = function(*args, **(kwargs or {}))
        if name in self.FREE:
            self.bytes += result.untyped_storage().nbytes()
        elif not function.is_view:
            self.kernels[name] += 1
        return result


@pytest.fixture(autouse=True)
def launched(monkeypatch):
    """The names of the kernels that were launched; as on an H100."""
    names = collections.Counter()

    def note(self, *arguments, grid, warmup, **constants):
        assert all(size > 0 for size in grid)
        names[self.fn.__name__.removesuffix("_kernel")] += 1

    monkeypatch.setattr(JITFunction, "run", note)
    monkeypatch.setattr(_backends, "triton_interprets", lambda: True)
    for module in (configs, retrieval_kernels):
        monkeypatch.setattr(module, "family_of", lambda device: "sm_90")
    monkeypatch.setattr(products, "chip_of", lambda device: tiles.Chip(132, 50 << 20))
    # Garbage of kernels that did not run is no fault of theirs, and takes long to make.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    # A GPU's targets are checked by assertions on the device.
    monkeypatch.setattr(torch.Tensor, "is_cuda", True, raising=False)
    monkeypatch.setattr(torch, "_assert_async", lambda *_: None)
    return names


def features(rows, D=512):
    return torch.zeros(rows, D, dtype=torch.bfloat16).requires_grad_()


def info_nce(N, **options):
    scale = torch.tensor(20.0, requires_grad=True)
    return mmkernels.info_nce(features(N), features(N), scale, impl="triton", **options)


def siglip(N, **options):
    numbers = (torch.tensor(10.0, requires_grad=True), torch.tensor(-10.0, requires_grad=True))
    return mmkernels.siglip(features(N), features(N), *numbers, impl="triton", **options)


def triplet(N, **options):
    return mmkernels.triplet(features(N), features(N), impl="triton", **options)


def distillation(N, **options):
    scale = torch.tensor(20.0, requires_grad=True)
    teacher = (features(N).detach(), features(N).detach(), 20.0)
    return mmkernels.distillation(features(N), features(N), scale, *teacher, impl="triton", **options)


def linear_cross_entropy(N, **options):
    return mmkernels.linear_cross_entropy(features(N), features(50257), torch.zeros(N).long(), impl="triton", **options)


@pytest.mark.parametrize(
    ("loss", "N", "most"),
    [
        (info_nce, 256, 5),
        (info_nce, 2048, 7),
        (info_nce, 4096, 5),
        (info_nce, 8192, 19),
        (info_nce, 32768, 67),
        (siglip, 256, 3),
        (siglip, 2048, 6),
        (siglip, 32768, 80),
        (distillation, 2048, 8),
        (triplet, 2048, 9),  # one of them adds up the hinges in place of several of torch
        (linear_cross_entropy, 2048, 27),
    ],
)
def test_launches(loss, N, most, launched):
    loss(N).sum().backward()
    assert 0 < sum(launched.values()) <= most, dict(launched)


@pytest.mark.parametrize(
    ("loss", "options"),
    [
        (info_nce, {}),
        (info_nce, {"label_smoothing": 0.1, "reduction": "none"}),
        (info_nce, {"targets": torch.arange(300)}),
        (siglip, {}),
        (siglip, {"reduction": "none"}),
        (distillation, {}),
        (triplet, {"mining": "all"}),
        (triplet, {"mining": "all", "reduction": "none"}),
        (triplet, {"mining": "hardest"}),
        (linear_cross_entropy, {}),
    ],
)
def test_a_graph_can_capture_the_call(loss, options, launched):
    """Nothing waits for the device, and a second call launches the same."""
    with Watched():
        loss(300, **options).sum().backward()
    first = dict(launched)
    launched.clear()
    with Watched():
        loss(300, **options).sum().backward()
    assert launched == first


def test_memory_beside_inputs_and_gradients():
    """A strip of 128 MiB, 64 MiB of sums, 16 MiB of partial products; the rest is statistics of rows and columns."""
    losses = info_nce(32768, reduction="none")
    with Watched() as watched:
        losses.backward(torch.ones(32768))
    gradients = 2 * 32768 * 512 * 2
    scratch = watched.bytes - gradients
    assert (128 + 64 + 16) << 20 <= scratch <= 210 << 20


class Kernel:
    """Passes for a kernel of Triton: notes by which way it is launched."""

    arg_names = ("x", "n", "scale", "BLOCK")

    def __init__(self):
        self.by_triton, self.directly = [], []

    def __getitem__(self, grid):
        def run(*arguments, **constants):
            self.by_triton.append((grid, *arguments, constants))
            return Form(self)

        return run


class Form:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.directly.append((grid, *arguments))


def test_a_form_is_launched_again_only_where_triton_would_take_it():
    kernel = Kernel()
    launcher = launch.Launcher(kernel, {"BLOCK": 32, "num_warps": 4})
    launcher.has_forms = True
    x = torch.zeros(64)
    launcher((5,), x, 48, 2.5)
    assert kernel.by_triton == [((5,), x, 48, 2.5, {"BLOCK": 32, "num_warps": 4})]
    launcher((7,), x[4:], 64, 0.5)  # as divisible
    assert len(kernel.by_triton) == 1
    assert kernel.directly[0][0] == (7, 1, 1)
    assert kernel.directly[0][2:] == (64, 0.5, 32)
    for others in ((x, 47, 2.5), (x, 1, 2.5), (x.half(), 48, 2.5), (x[1:], 48, 2.5), (x, 1 << 31, 2.5)):
        before = len(kernel.by_triton)
        launcher((5,), *others)
        assert len(kernel.by_triton) == before + 1
    before = len(kernel.by_triton)
    launcher((5,), x[1:], 48, 2.5)  # no form is kept for an address that vectors of 16 bytes cannot load
    assert len(kernel.by_triton) == before + 1
