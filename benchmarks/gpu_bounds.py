"""Compile every Triton kernel for GPUs that need not be here; tabulate what they take and how fast they could be.

    python -m benchmarks.gpu_bounds [OP ...] [--targets sm_90 gfx942] [--all] [--json FILE]
    python -m benchmarks.gpu_bounds info_nce --targets sm_90 --kernel forward --where SYMMETRIC=True \\
        --set BLOCK_N=64,128 num_warps=4
    python -m benchmarks.gpu_bounds info_nce --targets sm_90 --dtype bf16 --kernel forward --sweep

Registers, spills, shared memory and instructions come from the compiled code. The bound is FLOPs and bytes over the
limits of the datasheet; the prediction is the time that a model of the scheduler gives the machine code
(benchmarks/issue_model). Nothing here is measured. Each op brings its forms in <op>/gpu_bounds.py.

A sweep compiles each chosen form in many tiles, prints them by predicted time and refuses those that spill.
"""

import argparse
import dataclasses
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import gpu_limits, gpu_sweep, registry
from benchmarks.gpu_compile import assembly, compile_case, faults, heaviest, in_processes, predict_case
from benchmarks.harness.gpu_forms import GPUS, TARGETS, Case, Compiled, Problem
from benchmarks.issue_model.pipes import CHIPS
from benchmarks.issue_model.predict import Tile
from benchmarks.registry import FOLDERS

__all__ = ["GPUS", "assembly", "compile_case", "faults", "heaviest", "main"]


class Form(NamedTuple):
    """A compiled form, the work that calls give it, and a tile of each of them where the GPU has a model."""

    case: Case
    compiled: Compiled
    problems: list[Problem]
    tiles: list[Tile]


def read_form(case: Case) -> Form:
    problems = registry.gpu_bounds(case.op).problems(case)
    return Form(case, compile_case(case), problems, predict_case(case, [problem.steps for problem in problems]))


PAGE = Path(__file__).parents[1] / "docs/gpu_predictions.md"
HEADS = (
    "kernel", "tile", "warps", "stages", "registers", "spilled B", "shared KiB", "occupancy (blocks)", "matrix instr.",
    "problem", "GFLOP", "MB", "bound ms", "limit",
)  # fmt: skip
PREDICTED = (
    "kernel", "tile", "warps", "stages", "blocks", "problem", "instr. step", "rest", "an element",
    "MUFU/SHFL/BAR/LDG of rest", "rest issue", "matrix", "issue", "MUFU", "LSU", "ALU", "FMA", "cycles a tile",
    "TFLOP/s", "ms", "x bound",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = ", ".join(FOLDERS)
    parser.add_argument("ops", nargs="*", default=list(FOLDERS), metavar="op", help=f"of {every}; default all")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(GPUS))
    parser.add_argument("--all", action="store_true", help="every form, not only the plain ones in bf16 and fp32")
    parser.add_argument("--kernel", help="only kernels whose name begins so")
    parser.add_argument("--dtype", choices=("bf16", "fp16", "fp32"))
    parser.add_argument("--where", nargs="+", default=[], metavar="NAME=VALUE", help="only forms with these constants")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="NAME=VALUE[,VALUE]", help="other constants, num_warps, num_stages"
    )
    parser.add_argument("--sweep", action="store_true", help="many tiles of each form, by predicted time")
    parser.add_argument("--ratchet", action="store_true", help="lower the limits of gpu_limits.json to what is beaten")
    parser.add_argument("--page", action="store_true", help=f"put the predictions into {PAGE.name}")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    arguments = parser.parse_args()
    unknown = set(arguments.ops) - {*FOLDERS, "calibration"}
    if unknown:
        parser.error(f"unknown op {', '.join(sorted(unknown))}: expected {every}")

    cases = [case for op in arguments.ops for case in registry.forms(op, arguments.targets)]
    wanted = {name: listed[0] for name, listed in gpu_sweep.values(arguments.where).items()}
    changes = (dict(gpu_sweep.TILES) if arguments.sweep else {}) | gpu_sweep.values(arguments.set)
    chosen = [
        variant
        for case in cases
        if (arguments.all or wanted or registry.gpu_bounds(case.op).is_main(case))
        and case.kernel.startswith(arguments.kernel or "")
        and case.dtype == (arguments.dtype or case.dtype)
        and dict(case.constants).items() >= wanted.items()
        for variant in gpu_sweep.variants(case, changes)
    ]
    if not chosen:
        parser.error("no form is so")
    results = in_processes(read_form, chosen)
    forms = [result for result in results if isinstance(result, Form)]
    failed = [[case.name, result] for case, result in zip(chosen, results, strict=True) if isinstance(result, str)]
    if arguments.sweep:
        print(_ranking(forms), *(": ".join(line) for line in failed), sep="\n")
        return

    print("Times are bounds from datasheets, not measured:")
    for name in arguments.targets:
        gpu = TARGETS[name]
        peaks = ", ".join(f"{precision} {peak / 1e12:.0f} TFLOP/s" for precision, peak in gpu.peak.items())
        print(f"  {name}: {gpu.chip}, {gpu.bandwidth / 1e12:.2f} TB/s, {peaks}")
    print(table([list(HEADS), *(line for form in forms for line in _taken(form)), *failed]))
    predictions = [line for form in forms for line in _predicted(form)]
    if predictions:
        print(
            "\nPredictions from the machine code, not measured. step: a trip through the main loop; rest: of the tile. "
            "Instructions\nare a warp's, clocks those of a pipe of one scheduler for a block's tile:"
        )
        print(table([list(PREDICTED), *predictions]))
    if arguments.json:
        arguments.json.write_text(json.dumps([r for form in forms for r in _records(form)], indent=1) + "\n")
    if arguments.page:
        marked = r"(?s)(?<=<!-- predictions -->\n).*?(?=<!-- end of)"
        page, count = re.subn(marked, lambda _: _page(forms), PAGE.read_text())
        assert count == 1, f"{PAGE}: expected the marks of one table of predictions"
        PAGE.write_text(page)
    if arguments.ratchet:
        predicted = {
            gpu_limits.key(form.case): form.problems[0].predicted(form.tiles[0], CHIPS[form.case.gpu]) * 1e3
            for form in forms
            if gpu_limits.applies(form.case)
        }
        gpu_limits.FILE.write_text(json.dumps(gpu_limits.lowered(predicted), indent=1) + "\n")
    broken = [form.case.name for form in forms if faults(form.case, form.compiled)] + [name for name, _ in failed]
    if broken:
        raise SystemExit("faults in: " + ", ".join(broken))


def _ranking(forms: list[Form]) -> str:
    """The forms of a sweep by what their problems take; those that may not ship, and why."""

    def seconds(form: Form) -> float:
        chip = CHIPS[form.case.gpu]
        pairs = zip(form.problems, form.tiles, strict=True)
        return sum(problem.predicted(tile, chip) for problem, tile in pairs if tile.flops)

    found = {form.case: faults(form.case, form.compiled) for form in forms}
    fit = sorted((form for form in forms if form.tiles and not found[form.case]), key=seconds)
    lines = [
        "Predictions from the machine code, not measured:",
        table([list(PREDICTED), *(line for form in fit for line in _predicted(form))]),
    ]
    for case, reasons in found.items():
        if reasons:
            launch = f"{_tile_name(case)}, {case.num_warps} warps, {case.num_stages} stages"
            lines.append(f"refused: {case.name} {launch}: {'; '.join(reasons)}")
    return "\n".join(lines)


def _tile_name(case: Case) -> str:
    return "x".join(str(value) for key, value in case.constants if key.startswith(("BLOCK", "STEP")))


def _taken(form: Form) -> list[list[str]]:
    case, compiled, lines = form.case, form.compiled, []
    for problem in form.problems:
        seconds, limit = problem.bound(case)
        cells = (
            case.name, _tile_name(case), case.num_warps, case.num_stages, compiled.registers, compiled.spilled,
            compiled.shared >> 10, f"{compiled.occupancy:.0%} ({compiled.blocks})", compiled.matrix_instructions,
            problem.name, f"{problem.flops / 1e9:.1f}", f"{problem.bytes / 1e6:.1f}", f"{seconds * 1e3:.4f}", limit,
        )  # fmt: skip
        lines.append([str(cell) for cell in cells])
    return lines


def _predicted(form: Form) -> list[list[str]]:
    case, lines = form.case, []
    chip = CHIPS.get(case.gpu)
    constants = dict(case.constants)
    lanes = TARGETS[case.gpu].target.warp_size * case.num_warps
    elements = constants.get("BLOCK_M", 0) * constants.get("BLOCK_N", 0) / lanes  # of a thread
    for problem, tile in zip(form.problems, form.tiles, strict=False):
        rest, named, clocks = tile.rest, tile.rest.named, tile.clocks
        if not tile.flops or not chip:
            continue  # without products a kernel's time is that of its bytes
        seconds = problem.predicted(tile, chip)
        bound, _ = problem.bound(case)
        cells = (
            case.name, _tile_name(case), case.num_warps, case.num_stages, form.compiled.blocks, problem.name,
            tile.step.instructions, rest.instructions, f"{rest.instructions / elements:.1f}" if elements else "",
            "/".join(str(named[name]) for name in ("MUFU", "SHFL", "BAR", "LDG")), round(tile.rest_clocks["issue"]),
            *(round(clocks.get(pipe, 0)) for pipe in ("matrix", "issue", "mufu", "lsu", "alu", "fma")),
            round(tile.cycles), round(problem.flops / seconds / 1e12), f"{seconds * 1e3:.3f}", f"{seconds / bound:.1f}",
        )  # fmt: skip
        lines.append([str(cell) for cell in cells])
    return lines


def _page(forms: list[Form]) -> str:
    """The predictions as a table in Markdown."""
    lines = [
        "| op | kernel | tile, warps | blocks | problem | step, rest | rest an element | MUFU / SHFL / BAR "
        "| rest issue | product | cycles | TFLOP/s | ms | bound |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for form in forms:
        case, chip = form.case, CHIPS[form.case.gpu]
        constants = dict(case.constants)
        elements = constants.get("BLOCK_M", 0) * constants.get("BLOCK_N", 0) / (32 * case.num_warps)
        for problem, tile in zip(form.problems, form.tiles, strict=True):
            if not tile.flops:
                continue
            an_element = f"{tile.rest.instructions / elements:.1f}" if elements else ""
            named, seconds = tile.rest.named, problem.predicted(tile, chip)
            cells = (
                case.op, case.name.replace(f"-{case.dtype}-{case.precision}-{case.gpu}", ""),
                f"{_tile_name(case)}, {case.num_warps}", form.compiled.blocks, problem.name,
                f"{tile.step.instructions}, {tile.rest.instructions}", an_element,
                f"{named['MUFU']} / {named['SHFL']} / {named['BAR']}", f"{tile.rest_clocks['issue']:,.0f}",
                f"{tile.clocks['matrix']:,.0f}", f"{tile.cycles:,.0f}", f"{problem.flops / seconds / 1e12:.0f}",
                f"{seconds * 1e3:.3g}", f"{problem.bound(case)[0] * 1e3:.3g}",
            )  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _records(form: Form) -> list[dict[str, Any]]:
    case, found = form.case, []
    chip = CHIPS.get(case.gpu)
    for index, problem in enumerate(form.problems):
        seconds, limit = problem.bound(case)
        record: dict[str, Any] = {"case": case.name, "tile": _tile_name(case), "bound_s": seconds, "limit": limit}
        record |= problem._asdict() | dataclasses.asdict(form.compiled) | {"faults": faults(case, form.compiled)}
        if form.tiles and chip and form.tiles[index].flops:
            tile = form.tiles[index]
            record |= {"cycles_a_tile": tile.cycles, "clocks": tile.clocks, "clocks_beside_steps": tile.rest_clocks}
            record |= {"predicted_s": problem.predicted(tile, chip)}
        found.append(record)
    return found


def table(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines if i < len(line) and len(line) > 2) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines
    )


if __name__ == "__main__":
    main()
