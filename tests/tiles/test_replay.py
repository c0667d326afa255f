"""Passes that are recorded and replayed, with kernels that add up float32 numbers at the addresses they are given."""

import ctypes

import pytest
import torch

pytest.importorskip("triton")

from mmkernels import _backends
from mmkernels._tiles import launch, replay

pytestmark = pytest.mark.skipif(_backends.triton_interprets(), reason="the interpreter has no forms to launch again")


class Adding:
    """Passes for a kernel of Triton: out = x + y + number, of `length` numbers."""

    arg_names = ("x", "y", "out", "number", "LENGTH")

    def __getitem__(self, grid):
        def run(x, y, out, number, LENGTH):
            form = Form()
            form[grid](x, y, out, number, LENGTH)
            return form

        return run


class Form:
    def __getitem__(self, grid):
        def run(*arguments, stream=None):
            *tensors, number, length = arguments
            addresses = [t.data_ptr() if isinstance(t, torch.Tensor) else t for t in tensors]
            x, y, out = ((ctypes.c_float * length).from_address(address) for address in addresses)
            for index in range(length):
                out[index] = x[index] + y[index] + number

        return run


class Driver:
    """Passes for Triton's."""

    active = None

    def get_current_stream(self, device):
        return 0


@pytest.fixture(autouse=True)
def driver(monkeypatch):
    monkeypatch.setattr(replay, "_recordings", {})
    stub = Driver()
    stub.active = stub
    monkeypatch.setattr(replay, "driver", stub)


class Pass:
    """out = x + y + 2 number by way of a tensor of the pass's own; says how often it ran."""

    def __init__(self, number_of_ones=0, returned=None, view=False):
        self.runs, self.ones, self.returned, self.view = 0, number_of_ones, returned, view
        self.kernel = launch.Launcher(Adding(), {"LENGTH": 4})
        self.kernel.has_forms = True

    def __call__(self, x, y, number):
        self.runs += 1
        out, sums = x.new_empty(4), x.new_empty(2, 4)
        zero = x.new_zeros(4) if self.ones else y
        self.kernel((1,), x[4:] if self.view else x, y, sums[1], number)
        self.kernel((1,), sums[1], sums[1], out, number if not self.ones else number + zero[0].item())
        return (x if self.returned else out,)


def expected(x, y, number):
    return 2 * (x[:4] + y[:4] + number) + number


def test_a_pass_runs_once_for_arguments_of_a_kind():
    run = Pass()
    for seed in range(3):
        x, y = torch.arange(4.0) + seed, torch.full((4,), 5.0 * seed)
        assert torch.equal(replay.replayed(run, x, y, 1.0)[0], expected(x, y, 1.0))
    assert run.runs == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: (x, y, 2.0),  # an option
        lambda x, y: (x, x, 1.0),  # the same tensor twice
        lambda x, y: (x[:6], y, 1.0),  # a shape
        lambda x, y: (torch.cat([x, x])[::2], y, 1.0),  # a stride
        lambda x, y: (x, y.double(), 1.0),  # a dtype
    ],
)
def test_another_kind_is_recorded_again(other):
    run = Pass()
    x, y = torch.arange(8.0), torch.full((8,), 5.0)
    replay.replayed(run, x, y, 1.0)
    arguments = other(x, y)
    for _ in range(2):
        replay.replayed(run, *arguments)
    assert run.runs == 2
    if all(t.dtype == torch.float32 and t.is_contiguous() for t in arguments[:2]):
        assert torch.equal(replay.replayed(run, *arguments)[0], expected(*arguments))
        assert torch.equal(replay.replayed(run, x, y, 1.0)[0], expected(x, y, 1.0))


@pytest.mark.parametrize("how", [{"number_of_ones": 1}, {"returned": True}, {"view": True}])
def test_a_pass_that_does_more_than_launch_runs_each_time(how):
    run = Pass(**how)
    for start in (0.0, 3.0):
        x, y = torch.arange(8.0) + start, torch.full((8,), 5.0)
        out = replay.replayed(run, x, y, 1.0)[0]
        assert torch.equal(out, x if "returned" in how else expected(x[4:] if "view" in how else x, y, 1.0))
    assert run.runs == 2


def test_an_address_that_no_form_takes_is_not_replayed():
    run = Pass()
    x, y = torch.arange(9.0), torch.full((8,), 5.0)
    for of in (x[:8], x[1:], x[1:]):
        assert torch.equal(replay.replayed(run, of, y, 1.0)[0], expected(of, y, 1.0))
    assert run.runs == 3
