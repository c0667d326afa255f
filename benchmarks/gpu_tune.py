"""Measure which tiles are fastest on the GPU of this machine: what `python -m benchmarks.gpu_check --tune` does.

Each line of the tables (a slot: op, kernel, precision) is tried in the tiles of gpu_sweep. First they are compiled for
the GPU, in several processes: those that spill or take too much shared memory are refused, and the others stand in the
order of their predicted time where the chip has a model. Then whole passes of the op are timed, the table's tile and
another by turns; the fastest that passes the op's parity goes into a file that mmkernels takes from then on.

Every row is on disk as soon as it is there, and the same command goes on.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import gpu_sweep, registry
from benchmarks.gpu_compile import compile_case, faults, in_processes, predict_case
from benchmarks.harness import gpu_machine, gpu_runs
from benchmarks.harness.gpu_forms import SERVED, TARGETS, Case
from benchmarks.harness.gpu_workers import run_tasks
from benchmarks.harness.row_log import RowLog
from benchmarks.harness.tables import Row
from benchmarks.issue_model.pipes import CHIPS
from mmkernels._tiles import overrides
from mmkernels._tiles.triton import family_of
from mmkernels.divided_attention.triton_kernels.configs import MOST_KEYS

# The model is right to a quarter: a tile that it takes for so much slower than the best is not timed.
HOPELESS = 1.6
GAIN = 0.98  # a tile replaces the table's if its passes take at most so much of their time
REPEATS = 11
_AT_ONCE = 16  # compilations between two looks at the clock

_WALKS = dict(gpu_sweep.TILES) | {"num_stages": (2, 3, 4), "BLOCK_K": (32, 64)}
_STRIPS = {"BLOCK_M": (16, 32, 64), "BLOCK_N": (64, 128, 256), "num_warps": (4, 8)}
_WHOLE = {"BLOCK_M": (64, 128), "PIECE": (32, 64, 128), "num_warps": (4, 8)}
_STREAMS = {"BLOCK_M": (32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8), "num_stages": (1, 2, 3)}
_PACKED = {"num_warps": (2, 4, 8), "num_stages": (1, 2)}
_STEPS = {"BLOCK": (1024, 2048, 4096), "num_warps": (2, 4, 8)}


class Slot(NamedTuple):
    """A line of the tables, and how it is measured."""

    op: str  # whose passes are timed
    owner: str  # the op whose line it is
    kernel: str  # as the file of tiles has it
    forms: tuple[str, ...]  # the compiled kernels that take the tile
    changes: Mapping[str, Sequence[Any]] = _WALKS
    sizes: Callable[[Any], bool] = lambda size: True  # which of the op's quick sizes run it
    peer: str = "triton"  # whose passes, of the op's contest


def _attention(kernel: str, taken: Callable[[Any], bool], changes: Mapping[str, Sequence[Any]], *forms: str) -> Slot:
    forward = kernel.endswith("forward")

    def runs(size: Any) -> bool:
        return taken(size) and (size.passes == "forward") == forward

    return Slot(
        "divided_attention",
        "divided_attention",
        overrides.of_head(kernel, 64, False),
        forms or (kernel,),
        changes,
        runs,
    )


def _packed(size: Any) -> bool:
    return bool(size.axis == "time" and size.T <= 64)


def _whole(size: Any) -> bool:
    return bool(size.axis == "space" and size.N < MOST_KEYS)


def _streamed(size: Any) -> bool:
    return bool(size.axis == "space" and size.N > MOST_KEYS)


# What users run most. Tiles for groups, for label smoothing, other heads and masks stay the tables'.
SLOTS = (
    Slot("info_nce", "info_nce", "symmetric_forward", ("forward_kernel",)),
    Slot("info_nce", "info_nce", "grad_logits", ("grad_logits_kernel",)),
    Slot("info_nce", "info_nce", "product", ("product_kernel",)),
    Slot(
        "info_nce", "info_nce", "chunked", ("strip_statistics_kernel", "strip_grad_kernel"), _STRIPS,
        peer="mmkernels chunked",
    ),
    Slot("distillation", "distillation", "forward", ("distillation_forward_kernel",)),
    Slot("distillation", "distillation", "grad_logits", ("distillation_grad_kernel",)),
    Slot("siglip", "siglip", "pairs", ("pairs_kernel",)),
    _attention("packed_forward", _packed, _PACKED),
    _attention("packed_backward", _packed, _PACKED),
    _attention("forward", _streamed, _STREAMS),
    _attention("grad_queries", _streamed, _STREAMS),
    _attention("grad_keys", _streamed, _STREAMS),
    _attention("whole_forward", _whole, _WHOLE),
    _attention("whole_backward", _whole, _WHOLE, "whole_grad_queries", "whole_grad_keys"),
    Slot("linear_cross_entropy", "info_nce", "forward", ("forward_kernel",)),
    Slot("triplet", "triplet", "pairs", ("hinges_kernel", "worst_kernel")),
    Slot("retrieval", "retrieval", "pairs", ("ranks_kernel",), sizes=lambda size: size.k in (0, 1000)),
    Slot("retrieval", "retrieval", "topk", ("topk_kernel",), sizes=lambda size: 0 < size.k <= 16),
    Slot("beam_search", "beam_search", "step", ("scan",), _STEPS),
)  # fmt: skip
# The precisions of the tables, and the dtype in which each is measured.
DTYPES = {"half": "bfloat16", "ieee": "float32"}
_SHORT = {"bfloat16": "bf16", "float32": "fp32"}


class Task(NamedTuple):
    """One slot in one precision."""

    slot: int
    dtype: str

    @property
    def of(self) -> Slot:
        return SLOTS[self.slot]

    @property
    def precision(self) -> str:
        """As the file of tiles has it."""
        every = overrides.precisions_of(self.of.owner, self.of.kernel)
        return next((name for name, dtype in DTYPES.items() if dtype == self.dtype and name in every), every[0])

    @property
    def key(self) -> tuple[str, str, str]:
        return self.of.owner, self.of.kernel, self.precision

    @property
    def name(self) -> str:
        return " ".join(("tune", self.of.op, *self.key, self.dtype))


Fields = dict[str, Any]


def tasks(ops: Sequence[str], quick: bool) -> list[Task]:
    """What users run most comes first: all ops in bfloat16, then in float32."""
    dtypes = list(DTYPES.values())[: 1 if quick else None]
    found = [Task(i, dtype) for dtype in dtypes for i, slot in enumerate(SLOTS) if slot.op in ops]
    return [task for task in found if task.dtype == "bfloat16" or task.precision == "ieee"]


def target_of(device: torch.device) -> str:
    """The target of the compiler that stands for the GPU."""
    family = family_of(device)
    if device.type == "cpu" or torch.version.hip is not None:
        return family
    own = "sm_{}{}".format(*torch.cuda.get_device_capability(device))
    return own if own in TARGETS and SERVED.get(own) == family else family


def candidates(task: Task, family: str, target: str) -> dict[str, list[Case]]:
    """The forms in each tile that may be tried, by the tile as JSON; the table's own is first."""
    slot = task.of
    main = registry.gpu_bounds(slot.op)
    forms = [
        case
        for case in main.cases([family])
        if case.kernel in slot.forms and main.is_main(case)
        and (case.dtype == _SHORT[task.dtype] or case.kernel == "strip_statistics_kernel")  # it sees float32 alone
        and case.precision != "tf32x3" and not dict(case.constants).get("WIDE")
    ]  # fmt: skip
    found: dict[str, list[Case]] = {}
    for form in forms:
        for variant in (form, *gpu_sweep.variants(form, slot.changes)):
            # What a tile of the table holds back of the registers goes with it alone.
            options = form.options if variant == form else tuple(o for o in form.options if o[0] != "maxnreg")
            variant = dataclasses.replace(variant, options=options)
            found.setdefault(json.dumps(fields_of(variant)), []).append(dataclasses.replace(variant, gpu=target))
    own = {json.dumps(fields_of(form)) for form in forms}
    whole = {tile: list(dict.fromkeys(cases)) for tile, cases in found.items()}
    return dict(sorted(whole.items(), key=lambda item: item[0] not in own))


def fields_of(case: Case) -> Fields:
    """The tile of a form as a file of tiles has it."""
    constants, options = dict(case.constants), dict(case.options)
    names = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK", "MAX_STEPS")
    found: Fields = {name: constants[name] for name in names if name in constants}
    if "PIECE" in constants:
        found["BLOCK_N"] = constants["PIECE"]
    found["num_warps"] = case.num_warps
    if case.has_dot:
        found |= {"num_stages": case.num_stages, "maxnreg": options.get("maxnreg")}
    return found


class Screened(NamedTuple):
    """What the compiler says of a form."""

    faults: list[str]
    shared: int
    seconds: float  # predicted; 0 without a model


def screen(case: Case) -> Screened:
    compiled = compile_case(case)
    found = faults(case, compiled)
    problems = registry.gpu_bounds(case.op).problems(case)
    if found or case.gpu not in CHIPS or not case.has_dot:
        return Screened(found, compiled.shared, 0.0)
    tiles = predict_case(case, [problem.steps for problem in problems])
    seconds = sum(problem.predicted(tile, CHIPS[case.gpu]) for problem, tile in zip(problems, tiles, strict=True))
    return Screened(found, compiled.shared, seconds)


def screen_all(log: RowLog, task: Task, device: torch.device, processes: int, deadline: float) -> bool:
    """Compile what the log does not have yet: a row for each tile. Whether the time sufficed."""
    known = {row["tile"] for row in log.rows() if row["task"] == task.name and "refused" in row}
    family = family_of(device)
    tried = candidates(task, family, target_of(device))
    todo = [tile for tile in tried if tile not in known]
    most = overrides.shared_memory_of(device, family)
    for first in range(0, len(todo), _AT_ONCE):
        if time.monotonic() > deadline:
            return False
        some = todo[first : first + _AT_ONCE]
        forms = [(tile, case) for tile in some for case in tried[tile]]
        results = in_processes(screen, [case for _, case in forms], max(1, processes))
        for tile in some:
            of_tile = [result for (name, _), result in zip(forms, results, strict=True) if name == tile]
            refused = [result for result in of_tile if isinstance(result, str)]
            refused += [fault for result in of_tile if not isinstance(result, str) for fault in result.faults]
            sound = [result for result in of_tile if not isinstance(result, str)]
            if most is not None and any(result.shared > most for result in sound):
                refused.append(f"more than {most} bytes of shared memory")
            predicted = sum(result.seconds for result in sound) * 1e3
            log.add({"task": task.name, "tile": tile, "refused": "; ".join(refused), "predicted ms": predicted})
    return True


def ordered(rows: Iterable[Row], task: Task, own: str) -> list[str]:
    """The tiles to be timed, the best predicted first."""
    sound = {
        row["tile"]: row["predicted ms"]
        for row in rows
        if row["task"] == task.name and row.get("refused") == "" and row["tile"] != own
    }
    best = min(sound.values(), default=0.0)
    return sorted((tile for tile, predicted in sound.items() if predicted <= HOPELESS * best), key=sound.__getitem__)


def winners(rows: Iterable[Row]) -> dict[tuple[str, str, str], Fields]:
    """The tiles that replace the tables', of the slots that are done."""
    return {tuple(row["key"]): json.loads(row["winner"]) for row in rows if row.get("winner")}


def sizes_of(task: Task) -> list[Any]:
    """The op's quick sizes that run the slot, or if none does, all its sizes that do."""
    check = registry.gpu_check(task.of.op)
    return list(filter(task.of.sizes, check.QUICK)) or list(filter(task.of.sizes, check.SIZES))


def passes(task: Task, device: torch.device) -> Iterator[Callable[[], Any]]:
    """Whole passes of ours at the op's quick sizes."""
    check = registry.gpu_check(task.of.op)
    for size in sizes_of(task):
        peers, leaves, _, backward = check.contest(size, getattr(torch, task.dtype), device)
        name = task.of.peer if task.of.peer in peers else next(iter(peers))
        yield gpu_runs.one_pass(peers[name], leaves, backward)


def seconds_of(step: Callable[[], Any]) -> float:
    """The median of a pass; the first runs, which compile, do not count."""
    step()
    return gpu_runs.seconds_of(step, REPEATS)


def tune(log: RowLog, device: torch.device, task: Task) -> bool:
    """Time the tiles of one slot and check the winner; whether the GPU still answers this process."""
    rows = log.rows()
    before, slot = winners(rows), task.of
    own = next(iter(candidates(task, family_of(device), target_of(device))))
    of_task = [row for row in rows if row["task"] == task.name]
    known = {row["tile"] for row in of_task if "x" in row or "error" in row} | fatal(of_task)
    todo = [tile for tile in ordered(rows, task, own) if tile not in known]
    steps = list(passes(task, device)) if todo else []
    for tile in todo:
        log.add({"task": task.name, "tile": tile, "began": True})
        row: Row = {"task": task.name, "tile": tile}
        try:
            row["x"] = ratio(steps, before, before | {task.key: json.loads(tile)})
        except Exception as error:  # it may not launch: what the compiler took is known only then
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        log.add(row)
        show(row)
        if not gpu_runs.healthy(device):
            return False
    of_task = [row for row in log.rows() if row["task"] == task.name]
    wrong = {row["tile"] for row in of_task if row.get("verdict", "ok") != "ok"} | fatal(of_task)
    timed = {row["tile"]: row["x"] for row in of_task if row.get("x", 1.0) <= GAIN and row["tile"] not in wrong}
    for tile in sorted(timed, key=timed.__getitem__):
        log.add({"task": task.name, "tile": tile, "began": True})
        verdict = parity(task, before | {task.key: json.loads(tile)}, device)
        log.add({"task": task.name, "tile": tile, "verdict": verdict})
        print(f"  {tile}: {timed[tile]:.3f} of the table's time; parity: {verdict}", flush=True)
        if verdict == "ok":
            log.add({"task": task.name, "ended": True, "key": list(task.key), "winner": tile, "x": timed[tile]})
            return True
        if not gpu_runs.healthy(device):
            return False
    print(f"  {slot.owner} {slot.kernel}: the table's tile stays", flush=True)
    log.add({"task": task.name, "ended": True, "key": list(task.key), "winner": None})
    return True


def fatal(of_task: Iterable[Row]) -> set[str]:
    """The tiles whose process died, of the rows of a task: those that were begun last before it did."""
    found: set[str] = set()
    begun = ""
    for row in of_task:
        if "died" in row:
            found |= {begun} - {""}
            begun = ""
        elif "tile" in row:
            begun = row["tile"] if "began" in row else ""
    return found


def ratio(
    steps: Sequence[Callable[[], Any]], before: Mapping[tuple[str, str, str], Fields],
    after: Mapping[tuple[str, str, str], Fields],
) -> float:  # fmt: skip
    """How long passes take with the rows `after`, as a multiple of what they take with `before`: the geometric mean
    over the sizes. Both are timed by turns, for the clock of a GPU moves."""
    found = []
    for step in steps:
        with overrides.replacing(before):
            plain = seconds_of(step)
        with overrides.replacing(after):
            found.append(math.log(seconds_of(step) / plain))
    return math.exp(sum(found) / len(found))


def parity(task: Task, rows: Mapping[tuple[str, str, str], Fields], device: torch.device) -> str:
    """The op's cases with these tiles: ok, or the first that fails."""
    check = registry.gpu_check(task.of.op)
    with overrides.replacing(rows):
        for case in check.CASES:
            row = gpu_runs.parity(case, check.check, getattr(torch, task.dtype), device)
            if row["verdict"] != "ok":
                return f"{row['verdict']} ({row['case']})"
    return "ok"


def show(row: Row) -> None:
    print(f"  {row['tile']}: " + (f"{row['x']:.3f}" if "x" in row else row["error"]), flush=True)


def file_of(rows: Sequence[Row], gpu: str, path: Path) -> str:
    """The file of tiles: what these rows say, and beside it what the file has that they do not know."""
    known: overrides.Rows = {}
    if path.is_file():
        with contextlib.suppress(ValueError):  # a file that nobody can read is written anew
            known = overrides.read(overrides.File(path, "tuned")).get(gpu, {})
    done = {tuple(row["key"]) for row in rows if "ended" in row}
    of_keys = {key: dict(fields) for key, fields in known.items() if key not in done} | winners(rows)
    nested: dict[str, Any] = {}
    for (op, kernel, precision), fields in of_keys.items():
        nested.setdefault(op, {}).setdefault(kernel, {})[precision] = fields
    text = json.dumps({overrides.ABOUT: overrides.measured_under(), gpu: nested}, indent=1)
    overrides.parse(text)
    return text + "\n"


def write(text: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".new")
    aside.write_text(text)
    aside.replace(path)  # whole, or not there


def tune_all(log: RowLog, chosen: argparse.Namespace, device: torch.device, gpu: str, deadline: float) -> int:
    """Tune every slot that the log does not have, until the deadline; how many are left."""
    path = chosen.tiles or overrides.cache_of(gpu)
    ended = {row["task"] for row in log.rows() if "ended" in row}
    todo = [task for task in tasks(chosen.ops, chosen.quick) if task.name not in ended]
    # A family may have no such line: its kernels stream what others hold whole.
    todo = [task for task in todo if candidates(task, family_of(device), target_of(device))]
    print(f"tiles: {len(todo)} lines of the tables to do; they go into {path}", flush=True)
    left = len(todo)
    for task in todo:
        print(task.name, flush=True)
        if not screen_all(log, task, device, chosen.processes, deadline):
            return left
        if not _until_it_ends(log, task, device, min(1, chosen.processes), deadline):
            return left
        write(file_of(log.rows(), gpu, path), path)
        left -= 1
    return left


def _until_it_ends(log: RowLog, task: Task, device: torch.device, processes: int, deadline: float) -> bool:
    """Tune a slot in processes, a new one where a tile was the last one's end. Whether the time sufficed."""
    while True:
        over = list(run_tasks(functools.partial(tune, log, device), [task], processes, deadline))
        if not over:
            return False
        before = [row for row in log.rows() if row["task"] == task.name]
        if any("ended" in row for row in before):
            return True
        after = [*before, {"task": task.name, "died": over[0].died or "it could no longer use the GPU"}]
        log.add(after[-1])
        wrong = any("error" in row or row.get("verdict", "ok") != "ok" for row in before[-1:])
        if not wrong and fatal(after) == fatal(before):  # no tile did it: the op itself does not run here
            print(f"  {after[-1]['died']}", flush=True)
            log.add({"task": task.name, "ended": True, "key": list(task.key), "winner": None})
            return True


def main(chosen: argparse.Namespace, device: torch.device, deadline: float) -> None:
    """The command, where there is a GPU."""
    under = gpu_machine.description(device)
    log = RowLog(chosen.out / "tiles.jsonl")
    if (aside := log.begin(under)) is not None:
        print(f"{log.path} was measured under something else: it is {aside} now")
    left = tune_all(log, chosen, device, overrides.gpu_name(device), deadline)
    for row in log.rows():
        if "ended" in row:
            kept = f"{row['winner']}, {row['x']:.2f} of the time" if row["winner"] else "as in the table"
            print(f"{' '.join(row['key'])}: {kept}")
    if left:
        print(f"The time is over, {left} lines are left: run the same command again to go on.")
