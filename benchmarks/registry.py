"""Every op of the benchmarks, once, and what its folder holds.

The commands (bench, report, gpu_check, gpu_bounds) ask here for an op's modules. A module is imported when a command
asks for it: a CPU report needs no Triton, and a compile check needs no peer. An op's modules import the harness and
never a command.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from benchmarks.harness.bench_cases import BenchCase
from benchmarks.harness.gpu_forms import SERVED, Argument, Case, Problem
from benchmarks.harness.gpu_runs import Contest
from benchmarks.harness.tables import Comparison, Headline, Row, Table

# The public name of every op and the folder of its benchmarks.
OPS = {
    "info_nce": "info_nce",
    "distillation": "distillation",
    "siglip": "siglip",
    "divided_attention": "divided_attention",
    "linear_cross_entropy": "linear_cross_entropy",
    "triplet": "triplet",
    "retrieval_ranks": "retrieval",
    "retrieval_topk": "retrieval",
    "beam_search": "beam_search",
}
# The names that the commands take, each once, in the order of their tables.
FOLDERS = tuple(dict.fromkeys(OPS.values()))


@runtime_checkable
class Peers(Protocol):
    """peers.py: what users run today, as calls that can be timed by turns with ours."""

    PACKAGES: tuple[str, ...]  # whose versions stand beside the numbers


@runtime_checkable
class Report(Protocol):
    """report.py: time and memory on a CPU against the peers, and the cases of pytest-benchmark."""

    CELLS: Sequence[tuple[Any, ...]]  # the arguments of `measure`, one tuple per cell of the table
    QUICK: Sequence[tuple[Any, ...]]  # a few small ones
    measure: Callable[..., list[Row]]  # (*cell, seconds, skip): one row per call, ours and the peers' but those to skip
    COMPARISON: Comparison  # which rows are of one cell, and who ran
    HEADLINES: Sequence[Headline]  # the op's rows in the README's table and picture

    def bench_cases(self) -> list[BenchCase]:
        """What bench times; inputs and models are made when a case runs."""

    def finish(self, results: list[Row]) -> None:
        """Add to the rows what is known once all are measured: shares of the limit."""

    def tables(self, results: list[Row]) -> dict[str, Table]:
        """The tables by their names, for the screen and for the pages."""

    def draw(self, results: list[Row], machine: dict[str, Any], path: Path) -> None:
        """The figure, from rows that were just measured or that were read from a file with their machine."""


@runtime_checkable
class GpuCheck(Protocol):
    """gpu_check.py: parity on the cases of the tests (tests/<op>/cases.py) and larger ones; speed against the peers."""

    NOTE: str  # what the columns of the table of speeds mean
    CASES: Sequence[Any]
    SIZES: Sequence[Any]  # NamedTuples, the sizes of the contests
    QUICK: Sequence[Any]  # one or a few of them

    def check(self, case: Any, dtype: torch.dtype, device: torch.device) -> Sequence[Tensor]:
        """Hold the results of one case to its oracle, by an AssertionError, and return them."""

    def contest(self, size: Any, dtype: torch.dtype, device: torch.device) -> Contest:
        """Our call and its peers at one size."""


@runtime_checkable
class GpuBounds(Protocol):
    """gpu_bounds.py: the forms in which the op's Triton kernels are compiled."""

    GROWING: set[str]  # constants that only ever add to a kernel: the compile check takes the heaviest form

    def cases(self, gpus: Iterable[str] = ...) -> list[Case]:
        """Every form that a launcher can ask for on these GPUs."""

    def kernel(self, name: str) -> Any:
        """The Triton function of that name."""

    def argument(self, case: Case, name: str) -> Argument:
        """What the compiler is told of an argument."""

    def problems(self, case: Case) -> list[Problem]:
        """The work of one kernel in calls that users make."""

    def is_main(self, case: Case) -> bool:
        """Whether the table shows this form without --all."""


PARTS: Mapping[str, type] = {"peers": Peers, "report": Report, "gpu_check": GpuCheck, "gpu_bounds": GpuBounds}


def part(folder: str, name: str) -> Any:
    """One module of an op's folder."""
    return importlib.import_module(f"benchmarks.{folder}.{name}")


def peers(folder: str) -> Peers:
    return cast(Peers, part(folder, "peers"))


def report(folder: str) -> Report:
    return cast(Report, part(folder, "report"))


def gpu_check(folder: str) -> GpuCheck:
    return cast(GpuCheck, part(folder, "gpu_check"))


def gpu_bounds(folder: str) -> GpuBounds:
    return cast(GpuBounds, part(folder, "gpu_bounds"))


def forms(folder: str, targets: Iterable[str]) -> list[Case]:
    """Every form of an op that a launcher can ask for on these targets of the compiler."""
    every = gpu_bounds(folder).cases
    return [dataclasses.replace(case, gpu=target) for target in targets for case in every([SERVED.get(target, target)])]
