"""Check the GPU kernels on the GPU of this machine: parity, speed and memory against what users run today.

    python -m benchmarks.gpu_check [OP ...] [--out runs/gpu_check] [--quick]

Compares with eager PyTorch, torch.compile of it, and what else users run and have installed. Writes report.md and
report.json. Speed is reported only if parity holds. Without a GPU it says so and ends well.
"""

import argparse
import contextlib
import importlib
import json
import platform
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmkernels.testing import assert_within_budget

OPS = (
    "info_nce",
    "distillation",
    "siglip",
    "divided_attention",
    "linear_cross_entropy",
    "triplet",
    "retrieval",
    "beam_search",
)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def measure(
    forward: Callable[[], Tensor], leaves: Sequence[Tensor], *, repeats: int = 20, backward: bool = True
) -> dict[str, float]:
    """Milliseconds of a pass (median), and the most memory beyond inputs and gradients."""
    gradient: list[Tensor] = []

    def step() -> None:
        with torch.set_grad_enabled(backward):
            result = forward()
        if backward:
            if not gradient:
                gradient.append(torch.ones_like(result))
            torch.autograd.grad(result, leaves, gradient[0])

    for _ in range(3):
        step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    gradients = sum(x.numel() * x.element_size() for x in leaves) if backward else 0
    memory = torch.cuda.max_memory_allocated() - before - gradients
    flush = torch.empty(64 << 20, dtype=torch.int32, device=leaves[0].device)
    times = []
    for _ in range(repeats):
        flush.zero_()  # the L2 cache begins without the inputs
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return {"ms": statistics.median(times), "spread ms": max(times) - min(times), "memory MB": memory / 1e6}


@contextlib.contextmanager
def judged(row: dict[str, Any], results: list[dict[str, Any]]) -> Iterator[None]:
    """Adds a case to the results with a verdict on what is checked inside, and prints it: a failure is a line of the
    report, not the end of it."""
    try:
        yield
        row["verdict"] = "ok"
    except (AssertionError, RuntimeError) as error:
        row["verdict"] = f"FAILED: {str(error).splitlines()[0]}"
    results.append(row)
    print(f"  {row['case']:<50} {row['dtype']:<9} {row['verdict']}", flush=True)


def compare(
    row: dict[str, Any],
    names: Sequence[str],
    actual: Sequence[Tensor],
    again: Sequence[Tensor],
    rough: Sequence[Tensor],
    exact: Sequence[Tensor],
    terms: Sequence[float],
    *,
    dtype: torch.dtype | None = None,
    of: str = "",
) -> None:
    """Hold results to the error budget and to the bits of a second run; their relative errors go into the row."""
    for name, a, e, b, c, term in zip(names, actual, again, rough, exact, terms, strict=True):
        row[name] = float((a.double() - c).abs().max() / c.abs().max().clamp_min(1e-30))
        if not torch.equal(a, e):
            raise AssertionError(f"{name}: two runs differ")
        assert_within_budget(a, b, c, dtype=dtype, terms=term, name=name + of)


def checks(op: str) -> Any:
    """The module of an op's checks: check_parity(device), measure_all(device, quick), and a NOTE on its table."""
    return importlib.import_module(f"benchmarks.{op}.gpu_check")


def table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = (row.get(column, "-") for column in columns)
        lines.append("| " + " | ".join(f"{x:.3g}" if isinstance(x, float) else str(x) for x in cells) + " |")
    return lines


def report(machine: dict[str, str], results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    lines = ["# Check of the GPU kernels", "", *(f"- {key}: {value}" for key, value in machine.items()), ""]
    for op, result in results.items():
        lines += [f"## {op}: parity", "", *table(result["parity"]), "", f"## {op}: speed and memory", ""]
        if result["speed"]:
            lines += [*table(result["speed"]), "", checks(op).NOTE, ""]
        else:
            lines += ["Not measured: parity comes first.", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", default=list(OPS), metavar="op", help=f"of {', '.join(OPS)}; default all")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--quick", action="store_true", help="bf16 and two sizes only")
    arguments = parser.parse_args()
    unknown = set(arguments.ops) - set(OPS)
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}: expected {', '.join(OPS)}")
    if not torch.cuda.is_available():
        print("There is no GPU that torch can see here, so there is nothing to check. Run this where there is one.")
        print("The kernels' parity in the interpreter and their compile check: pytest tests -k 'triton or compile'")
        return
    device = torch.device("cuda", torch.cuda.current_device())
    import triton

    machine = {
        "GPU": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results: dict[str, dict[str, list[dict[str, Any]]]] = {}
    failures = 0
    for op in arguments.ops:
        print(f"{op}, parity:")
        parity = checks(op).check_parity(device)
        failed = [row for row in parity if row["verdict"] != "ok"]
        failures += len(failed)
        results[op] = {"parity": parity, "speed": []}
        if failed:
            print(f"{len(failed)} of {len(parity)} cases fail: speed is not measured")
        else:
            print(f"{op}, speed:")
            results[op]["speed"] = checks(op).measure_all(device, arguments.quick)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report.md").write_text(report(machine, results))
    (arguments.out / "report.json").write_text(json.dumps({"machine": machine} | results, indent=1) + "\n")
    print(f"written: {arguments.out / 'report.md'}")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
