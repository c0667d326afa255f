"""Check the GPU kernels on the GPU of this machine: parity, speed and memory against what users run today.

    python -m benchmarks.gpu_check [OP ...] [--out runs/gpu_check] [--quick]

Parity runs the cases of the tests (tests/<op>/cases.py), so this command needs the repository, not the wheel alone.
Speed is measured only if parity holds, against eager PyTorch, torch.compile of it, and what else users run; a peer that
is not installed has no row. Writes report.md and report.json. Without a GPU it says so and ends well.
"""

import argparse
import json
import platform
from pathlib import Path

import torch

from benchmarks import registry
from benchmarks.harness import gpu_runs
from benchmarks.harness.tables import Row, Table
from benchmarks.registry import FOLDERS


def table(rows: list[Row]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return Table(columns, [[gpu_runs.written(row.get(column, "-")) for column in columns] for row in rows]).markdown()


def report(machine: dict[str, str], results: dict[str, dict[str, list[Row]]]) -> str:
    parts = ["# Check of the GPU kernels\n", "".join(f"- {key}: {value}\n" for key, value in machine.items())]
    for op, result in results.items():
        parts += [f"## {op}: parity\n", table(result["parity"]), f"## {op}: speed and memory\n"]
        if result["speed"]:
            parts += [table(result["speed"]), f"{registry.gpu_check(op).NOTE}\n"]
        else:
            parts.append("Not measured: parity comes first.\n")
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    every = ", ".join(FOLDERS)
    parser.add_argument("ops", nargs="*", default=list(FOLDERS), metavar="op", help=f"of {every}; default all")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"))
    parser.add_argument("--quick", action="store_true", help="bf16 and a few sizes only")
    arguments = parser.parse_args()
    unknown = set(arguments.ops) - set(FOLDERS)
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}: expected {every}")
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
    results: dict[str, dict[str, list[Row]]] = {}
    failures = 0
    for op in arguments.ops:
        print(f"{op}, parity:")
        check = registry.gpu_check(op)
        parity = gpu_runs.check_parity(check.CASES, check.check, device)
        failed = [row for row in parity if row["verdict"] != "ok"]
        failures += len(failed)
        results[op] = {"parity": parity, "speed": []}
        if failed:
            print(f"{len(failed)} of {len(parity)} cases fail: speed is not measured")
        else:
            print(f"{op}, speed:")
            sizes, dtypes = (check.QUICK, gpu_runs.DTYPES[:1]) if arguments.quick else (check.SIZES, gpu_runs.DTYPES)
            results[op]["speed"] = gpu_runs.measure_all(sizes, check.contest, device, dtypes)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "report.md").write_text(report(machine, results))
    (arguments.out / "report.json").write_text(json.dumps({"machine": machine} | results, indent=1) + "\n")
    print(f"written: {arguments.out / 'report.md'}")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
