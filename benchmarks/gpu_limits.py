"""How long each main form may take by prediction: one limit a form, in milliseconds, which only goes down.

gpu_limits.json has today's prediction of each form's first problem and little room. The compile check holds every form
to it, so that a slower epilogue fails a test without a GPU; `python -m benchmarks.gpu_bounds --dtype bf16 --targets
sm_90 --ratchet` lowers the limits that are beaten and adds those of new forms.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import triton

from benchmarks import registry
from benchmarks.gpu_compile import predict_case
from benchmarks.harness.gpu_forms import Case
from benchmarks.issue_model.pipes import CHIPS
from benchmarks.registry import FOLDERS

FILE = Path(__file__).with_name("gpu_limits.json")
GPU = "sm_90"
_ROOM = 1.03  # for the order of instructions, which small changes of a kernel shake
_TRITON = "3.8."  # another compiler has limits of its own, which nobody took


def taken() -> bool:
    """Whether the limits are those of the Triton that is installed."""
    return triton.__version__.startswith(_TRITON)


def key(case: Case) -> str:
    return f"{case.op} {case.name}"


def applies(case: Case) -> bool:
    """Whether the form is one that has a limit: bf16 with a product, one that the tables show."""
    return case.gpu == GPU and case.dtype == "bf16" and case.has_dot and registry.gpu_bounds(case.op).is_main(case)


def all_forms() -> list[Case]:
    return [case for op in FOLDERS for case in registry.gpu_bounds(op).cases([GPU]) if applies(case)]


def read() -> dict[str, float]:
    limits: dict[str, float] = json.loads(FILE.read_text())
    return limits


def excess(case: Case) -> str:
    """By how much a form is over its limit; empty if it is not, or has none under this Triton."""
    limit = read().get(key(case))
    if limit is None or not applies(case) or not taken():
        return ""
    problem = registry.gpu_bounds(case.op).problems(case)[0]
    (tile,) = predict_case(case, [problem.steps])
    found = problem.predicted(tile, CHIPS[case.gpu]) * 1e3
    return f"{found:.4g} ms by prediction for {problem.name}, the limit is {limit}" if found > limit else ""


def lowered(predicted: Mapping[str, float]) -> dict[str, float]:
    """The limits with those of these forms, predicted milliseconds by their keys, lowered or added, and without forms
    that are no more."""
    limits = read() if FILE.exists() else {}
    for name, milliseconds in predicted.items():
        limits[name] = min(limits.get(name, float("inf")), float(f"{milliseconds * _ROOM:.3g}"))
    known = {key(case) for case in all_forms()}
    return {name: limit for name, limit in sorted(limits.items()) if name in known}
