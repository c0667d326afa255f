"""The kernels of one pass of ours: measured microseconds, and the prediction and the bound of the same form.

The prediction is the issue model's, of the machine code that ran, where the GPU has a model; the bound is the
datasheet's of the best-known chip of its kind. Both are of a kernel that goes once over the whole problem: launches
over strips add up to it. A kernel that does not multiply has a bound alone.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from triton.compiler.compiler import CompiledKernel

from benchmarks import registry
from benchmarks.gpu_compile import predict_compiled
from benchmarks.harness import gpu_runs
from benchmarks.harness.gpu_forms import GPUS, TARGETS, Case, Problem
from benchmarks.harness.tables import Row
from benchmarks.issue_model.pipes import CHIPS, Chip
from mmkernels._tiles.triton import chip_of, family_of

_OF_TILE = ("BLOCK_M", "BLOCK_N", "BLOCK_K")
# What the sizes of a problem are called in the size of a contest.
_SIZES = {"rows": "N", "features": "D", "classes": "V"}
_SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Launched(NamedTuple):
    """A compiled form that a pass launched, the arguments of its last launch, and how many there were."""

    kernel: Any
    arguments: Mapping[str, Any]
    launches: int


def launched(step: Callable[[], Any]) -> list[Launched]:
    """The forms that a pass launches."""
    seen: dict[int, Launched] = {}

    def note(kernel: Any, grid: Any, stream: Any, *arguments: Any) -> None:
        count = seen[id(kernel)].launches + 1 if id(kernel) in seen else 1
        seen[id(kernel)] = Launched(kernel, dict(zip(kernel.src.fn.arg_names, arguments, strict=False)), count)

    plain = CompiledKernel.launch_metadata
    CompiledKernel.launch_metadata = note
    try:
        step()
    finally:
        CompiledKernel.launch_metadata = plain
    return list(seen.values())


def form_of(op: str, found: Launched, dtype: torch.dtype, family: str) -> Case | None:
    """The op's form that was launched, in the tile that it was launched in; info_nce's, whose products others take."""
    metadata = found.kernel.metadata
    for owner in dict.fromkeys((op, "info_nce")):
        forms = registry.gpu_bounds(owner)
        for case in forms.cases([family]):
            constants = dict(case.constants)
            fixed = {name: value for name, value in constants.items() if name not in _OF_TILE}
            if (
                forms.kernel(case.kernel).fn.__name__ == found.kernel.name
                and (not case.has_dot or case.dtype == _SHORT[dtype])
                and all(found.arguments.get(name) == value for name, value in fixed.items())
            ):
                actual = tuple((name, found.arguments[name]) for name in constants)
                launch = {"num_warps": metadata.num_warps, "num_stages": metadata.num_stages}
                return dataclasses.replace(case, constants=actual, **launch)
    return None


def problem_of(op: str, case: Case, size: Any) -> Problem | None:
    """What the kernel does for a contest of that size; None where gpu_bounds knows no such call."""
    owner = op if op == "linear_cross_entropy" else case.op
    problems = registry.gpu_bounds(owner).problems
    fields = size._asdict()
    if fields.get("M", fields.get("N")) != fields.get("N"):
        return None  # the problems of pairs are square
    named = inspect.signature(problems).parameters
    sizes = {name: fields[field] for name, field in _SIZES.items() if name in named and field in fields}
    found = problems(case, **sizes)
    if not sizes:  # the op knows calls of its own: one of them, or none
        parts = {f"{name}={fields[name]}" for name in "BTKV" if name in fields} | {fields.get("axis", "")} - {""}
        found = [problem for problem in found if parts <= set(problem.name.replace(",", "").split())]
    return found[0] if found else None


def model_of(device: torch.device) -> tuple[str, Chip | None]:
    """The target whose datasheet stands for the GPU, and its model with as many multiprocessors as this one has."""
    family = family_of(device)
    own = family
    if device.type == "cuda" and torch.version.hip is None:
        own = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    chip = CHIPS.get(own)
    if chip is not None:
        chip = dataclasses.replace(chip, multiprocessors=chip_of(device).multiprocessors)
    return (own if own in TARGETS else family), chip


def expected(op: str, size: Any, dtype: torch.dtype, device: torch.device, step: Callable[[], Any]) -> dict[str, Row]:
    """Predicted and least microseconds of each kernel of a pass, by its name: of its forms, each over the problem once.
    Forms that differ in what a strip is alone (SPLIT, SHARE) share the problem."""
    family = family_of(device)
    if family not in GPUS:
        return {}
    target, chip = model_of(device)
    shared: dict[tuple[Any, ...], list[tuple[int, float, float | None]]] = {}
    for found in launched(step):
        case = form_of(op, found, dtype, family)
        problem = None if case is None else problem_of(op, case, size)
        if case is None or problem is None:
            continue
        case = dataclasses.replace(case, gpu=target)
        predicted = None
        if chip is not None and case.has_dot:
            try:
                (tile,) = predict_compiled(found.kernel, case, [problem.steps], chip)
                predicted = problem.predicted(tile, chip) * 1e6
            except (KeyError, RuntimeError, ZeroDivisionError) as error:
                print(f"  no prediction of {case.name}: {error}", flush=True)
        problem_shared = (found.kernel.name, dict(case.constants).get("TRANSPOSED"))
        shared.setdefault(problem_shared, []).append((found.launches, problem.bound(case)[0] * 1e6, predicted))
    rows: dict[str, Row] = {}
    for (name, *_), forms in shared.items():
        total = sum(count for count, _, _ in forms)
        row = dict(rows.get(name, {}))
        row["bound us"] = row.get("bound us", 0.0) + sum(count * bound for count, bound, _ in forms) / total
        predictions = [(count, predicted) for count, _, predicted in forms if predicted is not None]
        if len(predictions) == len(forms):
            row["predicted us"] = row.get("predicted us", 0.0) + sum(c * p for c, p in predictions) / total
        rows[name] = row
    return rows


def times(op: str, size: Any, dtype: torch.dtype, device: torch.device, step: Callable[[], Any]) -> list[Row]:
    """`kernel_times` of a pass, with what was expected of each kernel of ours."""
    rows = gpu_runs.kernel_times(step)
    wanted = expected(op, size, dtype, device, step)
    return [{**row, **wanted.get(row["kernel"], {})} for row in rows]
