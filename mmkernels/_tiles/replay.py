"""Passes that only allocate and launch: recorded at the first call of a kind, and replayed as a list of launches.

What a pass allocates and launches follows from the shapes, strides and dtypes of its tensors and from its options.
To find that out takes Python longer than the kernels of a small problem take a GPU. The next call of the same kind
finds out nothing: it takes one workspace for all that the pass allocates for itself, and launches.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import driver

from mmkernels._tiles.launch import HAS_FORMS, Launch, noted_launches
from mmkernels._tiles.triton import round_up

_MOST_KINDS = 4096  # that are kept
_ALIGNMENT = 256  # of what lies in a workspace, in bytes
_ALLOCATIONS = {f"aten::{name}" for name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")}

Results = TypeVar("Results", bound=tuple[Tensor, ...])


def replayed(run: Callable[..., Results], *arguments: Any) -> Results:
    """run(*arguments): tensors, options that can be hashed, and tuples of both; a tensor is the first of all.

    A pass runs as it is, each time, if it runs a kernel of torch, launches one that has no form (see Launcher), gives a
    kernel a part of an argument, or returns an argument.
    """
    flat = _flat(arguments)
    device, addresses, bits = flat[0].device, [], 0
    kind: list[Any] = [run, device]
    for argument in flat:
        if isinstance(argument, Tensor):
            kind += (argument.dtype, argument.shape, argument.stride())
            addresses.append(argument.data_ptr())
            bits |= addresses[-1]
        else:
            kind.append(argument)
    if not HAS_FORMS or bits & 15:
        return run(*arguments)
    kind += map(addresses.index, addresses)  # which tensors are the same
    key = tuple(kind)
    if key in _recordings:
        recording = _recordings[key]
        return run(*arguments) if recording is None else cast(Results, recording.replay(addresses, device))
    with noted_launches() as launches, _Watch() as watch:
        results = run(*arguments)
    if len(_recordings) >= _MOST_KINDS:
        _recordings.clear()
    storages = {argument.untyped_storage().data_ptr() for argument in flat if isinstance(argument, Tensor)}
    _recordings[key] = None if watch.runs_kernels else _recording(launches, results, addresses, storages)
    return results


def _flat(arguments: tuple[Any, ...]) -> list[Any]:
    flat: list[Any] = []
    for argument in arguments:
        if isinstance(argument, tuple):
            flat += _flat(argument)
        else:
            flat.append(argument)
    return flat


class _Recording(NamedTuple):
    """What a pass launches, allocates for itself and returns."""

    launches: Sequence[tuple[Any, tuple[int, ...], Callable[[list[Any]], tuple[Any, ...]]]]  # form, grid, taker
    pointers: list[tuple[int, int]]  # numbers among the arguments, the results and the workspace of the pass, and bytes
    constants: list[Any]
    results: list[tuple[torch.Size, torch.dtype]]
    workspace: int  # bytes

    def replay(self, addresses: list[int], device: torch.device) -> tuple[Tensor, ...]:
        results = tuple([torch.empty(shape, dtype=dtype, device=device) for shape, dtype in self.results])
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        bases = [*addresses, *[result.data_ptr() for result in results], workspace.data_ptr()]
        values = [bases[base] + offset for base, offset in self.pointers] + self.constants
        stream = driver.active.get_current_stream(device.index)
        for form, grid, taken in self.launches:
            form[grid](*taken(values), stream=stream)
        return results


_recordings: dict[tuple[Any, ...], _Recording | None] = {}


class _Watch(TorchDispatchMode):
    """Notes whether torch runs a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.runs_kernels = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.runs_kernels |= not (function.is_view or function._schema.name in _ALLOCATIONS)
        return function(*args, **(kwargs or {}))


def _recording(
    launches: list[Launch | None], results: tuple[Tensor, ...], addresses: list[int], storages: set[int]
) -> _Recording | None:
    """The launches with their tensors traced to the arguments, the results and a workspace; None if that cannot be.
    All tensors are still alive, so that no two lie at one address."""
    begins: dict[int, tuple[int, int]] = {}  # where a tensor of the pass's own begins: its base and offset
    for index, result in enumerate(results):
        begin = result.untyped_storage().data_ptr()
        if result.numel() == 0:
            continue
        if begin in storages or begin != result.data_ptr() or not result.is_contiguous():
            return None
        begins[begin] = len(addresses) + index, 0
    workspace = 0
    pointers: dict[tuple[int, int], int] = {}
    constants: list[Any] = []
    traced: list[tuple[Any, tuple[int, ...], list[int]]] = []  # the last: places among pointers, or ~ among constants
    for launch in launches:
        if launch is None:
            return None
        places = []
        for argument in launch.arguments:
            if not isinstance(argument, Tensor):
                places.append(~len(constants))
                constants.append(argument)
                continue
            address, storage = argument.data_ptr(), argument.untyped_storage()
            begin = storage.data_ptr()
            if address in addresses:
                pointer = addresses.index(address), 0
            elif begin in storages:
                return None
            else:
                if begin not in begins:
                    begins[begin] = len(addresses) + len(results), workspace
                    workspace += round_up(storage.nbytes(), _ALIGNMENT)
                pointer = begins[begin][0], begins[begin][1] + address - begin
            places.append(pointers.setdefault(pointer, len(pointers)))
        traced.append((launch.form, launch.grid, places))
    takers = [
        (form, grid, operator.itemgetter(*(len(pointers) + ~place if place < 0 else place for place in places)))
        for form, grid, places in traced
    ]
    return _Recording(takers, list(pointers), constants, [(one.shape, one.dtype) for one in results], workspace)
