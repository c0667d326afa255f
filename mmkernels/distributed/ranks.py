"""The ranks of a loss: who they are, what they must agree upon, and how tensors go from one to another."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import GroupName, _resolve_process_group

from mmkernels._autograd import wants_backward
from mmkernels._library import register_everywhere

_MOST_NUMBERS = 15  # that ranks exchange before a loss
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BACKENDS = ("cpu", "triton", "reference")


class Pending(NamedTuple):
    """Tensors on their way. What is sent must stay as it is until `wait` has returned."""

    works: list[Any]
    sent: tuple[Tensor, ...]
    arriving: tuple[Tensor, ...]
    watch: Callable[[], contextlib.AbstractContextManager[None]]

    def wait(self) -> tuple[Tensor, ...]:
        with self.watch():
            for work in self.works:
                work.wait()
        return self.arriving


class Circle:
    """The ranks of one process group, in a circle."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.size, self.rank = group, group.size(), group.rank()
        self.world = dist.get_process_group_ranks(group)

    @contextlib.contextmanager
    def watch(self, what: str, peers: Sequence[int]) -> Iterator[None]:
        """Say which ranks were waited for where one of them is lost."""
        try:
            yield
        except RuntimeError as error:
            names = " or ".join(str(self.world[peer]) for peer in sorted(set(peers) - {self.rank}))
            raise RuntimeError(
                f"mmkernels: rank {self.world[self.rank]} lost rank {names} while it {what}: {error}; see why that "
                "rank ended or hangs, and start all ranks again from the last checkpoint"
            ) from error

    def shift(self, tensors: tuple[Tensor, ...], shapes: Sequence[Sequence[int]], what: str, tag: int) -> Pending:
        """Begin to send tensors to the next rank and to receive others, of these shapes, from the one before.

        What is under way at the same time needs tags of its own: tag, tag + 1, ...
        """
        following, before = (self.rank + 1) % self.size, (self.rank - 1) % self.size
        sent = tuple(x.contiguous() for x in tensors)
        arriving = tuple(x.new_empty(shape) for x, shape in zip(tensors, shapes, strict=True))
        watch = functools.partial(self.watch, what, (following, before))
        operations = [
            dist.P2POp(operation, x, self.world[peer], self.group, tag + index)
            for operation, peer, tensors in ((dist.isend, following, sent), (dist.irecv, before, arriving))
            for index, x in enumerate(tensors)
            if x.numel()
        ]
        with watch():
            works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(works, sent, arriving, watch)

    def gather(self, x: Tensor, rows: Sequence[int], what: str) -> Tensor:
        """The rows of all ranks, of which this one has `x`."""
        if self.size == 1:
            return x
        # Not every backend gathers tensors of different lengths.
        most = max(rows)
        padded = x.new_zeros(most, *x.shape[1:])
        padded[: len(x)] = x
        gathered = [torch.empty_like(padded) for _ in rows]
        with self.watch(what, range(self.size)):
            dist.all_gather(gathered, padded, self.group)
        return torch.cat([part[:count] for part, count in zip(gathered, rows, strict=True)])

    def home(self, x: Tensor, rows: Sequence[int], what: str) -> list[Tensor]:
        """Send each rank its part of the rows of `x`; what all ranks have for the rows of this one, in their order."""
        if self.size == 1:
            return [x]
        own = rows[self.rank]
        arriving = x.new_empty(self.size * own, *x.shape[1:])
        with self.watch(what, range(self.size)):
            dist.all_to_all_single(arriving, x.contiguous(), [own] * self.size, list(rows), self.group)
        return list(arriving.split(own)) if own else [arriving] * self.size


class Ranks:
    """The ranks of a loss by two circles: blocks pass round the outer one, and the inner one joins its blocks."""

    def __init__(self, outer: Circle, inner: Circle | None) -> None:
        self.outer, self.inner = outer, inner
        self.inner_size = 1 if inner is None else inner.size
        self.inner_rank = 0 if inner is None else inner.rank
        self.size = outer.size * self.inner_size
        self.rank = outer.rank * self.inner_size + self.inner_rank

    def gather(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """The rows of all ranks, in their order; `rows` counts those of each."""
        width, what = self.inner_size, "gathered what all ranks have"
        of_circles = [rows[first : first + width] for first in range(0, len(rows), width)]
        if self.inner is not None:
            x = self.inner.gather(x, of_circles[self.outer.rank], what)
        return self.outer.gather(x, [sum(counts) for counts in of_circles], what)

    def gather_equal(self, x: Tensor) -> Tensor:
        """Tensors of one shape, [ranks, ...]."""
        return self.gather(x[None], [1] * self.size)

    def total(self, x: Tensor) -> Tensor:
        """The sum over all ranks, in float64 and in their order: the same bits everywhere."""
        return self.gather_equal(x.double()).sum(0)

    def agree(
        self, device: torch.device, numbers: Sequence[float], error: Exception | None = None
    ) -> list[list[float]]:
        """The numbers of every rank. If one has an error instead, the same error is raised on all."""
        on = torch.device("cpu") if self._takes_cpu() else device
        padded = [error is not None, *numbers, *(0,) * (_MOST_NUMBERS - len(numbers))]
        found = self.gather_equal(torch.tensor(padded, dtype=torch.float64, device=on)).tolist()
        if any(failed for failed, *_ in found):
            self._raise_everywhere(error)
        return [row[1 : 1 + len(numbers)] for row in found]

    def _takes_cpu(self) -> bool:
        circles = [circle for circle in (self.outer, self.inner) if circle is not None]
        return all(torch.device("cpu") in circle.group._device_types for circle in circles)

    def _raise_everywhere(self, error: Exception | None) -> None:
        errors: list[Any] = [error]
        for circle in (self.inner, self.outer):
            if circle is not None:
                gathered: list[Any] = [None] * circle.size
                with circle.watch("exchanged errors", range(circle.size)):
                    dist.all_gather_object(gathered, errors, circle.group)
                errors = [one for part in gathered for one in part]
        rank, first = next((rank, one) for rank, one in enumerate(errors) if isinstance(one, Exception))
        raise first if rank == self.rank else type(first)(f"rank {rank}: {first}")


class Group(NamedTuple):
    """The ranks as a public call hands them to its ops, which take no process groups."""

    outer: str
    inner: str  # empty: there is no inner circle
    size: int
    rank: int

    @property
    def ranks(self) -> Ranks:
        return ranks_by_name(self.outer, self.inner)


@torch.compiler.assume_constant_result
def group_of(process_group: dist.ProcessGroup | DeviceMesh) -> Group:
    """The ranks of a group, or of a mesh of one dimension or of two, (outer, inner)."""
    if isinstance(process_group, DeviceMesh):
        if process_group.ndim > 2:
            raise ValueError(
                f"process_group: expected a mesh of 1 or 2 dimensions, (outer, inner), got {process_group.ndim}"
            )
        groups = process_group.get_all_groups()
    elif isinstance(process_group, dist.ProcessGroup):
        groups = [process_group]
    else:
        raise TypeError(
            f"process_group: expected a ProcessGroup or a DeviceMesh, got {type(process_group).__name__}; the group "
            "of all ranks is torch.distributed.group.WORLD"
        )
    outer, inner = groups[0].group_name, groups[1].group_name if len(groups) == 2 else ""
    ranks = ranks_by_name(outer, inner)
    return Group(outer, inner, ranks.size, ranks.rank)


def ranks_by_name(outer: str, inner: str) -> Ranks:
    """The ranks whose names these are: an op takes no groups."""
    inner_circle = Circle(_resolve_process_group(GroupName(inner))) if inner else None
    return Ranks(Circle(_resolve_process_group(GroupName(outer))), inner_circle)


class RaisedByAll:
    """An error in this block, on one rank, is raised on all: the others would wait for it forever."""

    def __init__(self, group: Group | None) -> None:
        self.group = group

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, _: Any) -> None:
        if self.group is not None and isinstance(error, (TypeError, ValueError, RuntimeError)):
            self.group.ranks.agree(torch.get_default_device(), (), error)


def _rows_of_ranks(
    queries: Tensor, keys: Tensor, backend: str, names: list[str], values: list[float], outer: str, inner: str
) -> Tensor:
    facts: list[tuple[str, float, Callable[[float], Any]]] = [
        ("D", queries.shape[1], int),
        ("the dtype of the features", _DTYPES.index(queries.dtype), lambda shown: _DTYPES[int(shown)]),
        ("the implementation", _BACKENDS.index(backend), lambda shown: _BACKENDS[int(shown)]),
        *((name, value, lambda shown: shown) for name, value in zip(names, values, strict=True)),
    ]
    numbers = (len(queries), len(keys), *(value for _, value, _ in facts))
    found = ranks_by_name(outer, inner).agree(queries.device, numbers)
    for (name, _, shown), *of_ranks in zip(facts, *(row[2:] for row in found), strict=True):
        for rank, value in enumerate(of_ranks):
            if value != of_ranks[0]:
                raise ValueError(
                    f"process_group: expected {name} to be the same on all ranks, got {shown(of_ranks[0])} on rank 0 "
                    f"and {shown(value)} on rank {rank}"
                )
    return torch.tensor([row[:2] for row in found], dtype=torch.int64).T.contiguous()


_rows_op = register_everywhere(
    "rows_of_ranks",
    "(Tensor queries, Tensor keys, str backend, str[] names, float[] values, str outer, str inner) -> Tensor",
    _rows_of_ranks,
    lambda *arguments: torch.empty(2, ranks_by_name(*arguments[-2:]).size, dtype=torch.int64),
)


def rows_of_ranks(queries: Tensor, keys: Tensor, group: Group, backend: str, options: Mapping[str, float]) -> Tensor:
    """[2, ranks] on the CPU, the rows of queries and of keys, if the rest is the same on all ranks; if not, the same
    error is raised on all."""
    wanted = {
        f"whether {name} need a gradient": wants_backward(x) for name, x in (("queries", queries), ("keys", keys))
    }
    options = {**options, **wanted}
    return _rows_op(
        queries, keys, backend, list(options), [float(value) for value in options.values()], group.outer, group.inner
    )


def _alike(x: Tensor, what: str, outer: str, inner: str) -> Tensor:
    of_ranks = ranks_by_name(outer, inner).gather_equal(x)
    same = (of_ranks == of_ranks[0]) | (of_ranks.isnan() & of_ranks[0].isnan())
    message = f"process_group: expected {what} to be the same on all ranks"
    if x.is_cuda:
        torch._assert_async(same.all(), f"mmkernels: {message}")
    elif not same.all():
        raise ValueError(f"{message}, got {', '.join(f'{value:g}' for value in of_ranks.tolist())}")
    return x.clone()


# The number, if it is the same on all ranks; the same error on all if not.
alike_op = register_everywhere(
    "alike_over_ranks",
    "(Tensor x, str what, str outer, str inner) -> Tensor",
    _alike,
    lambda x, *_: torch.empty_like(x),
)
