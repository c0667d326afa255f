"""Compile a form of a Triton kernel for a GPU that need not be here; read what it takes and what is wrong with it."""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import triton
from triton.compiler import ASTSource

from benchmarks import registry
from benchmarks.harness.gpu_forms import TARGETS, Case, Compiled, Gpu
from benchmarks.issue_model import gcn, predict, sass
from benchmarks.issue_model.pipes import CHIPS, Chip
from benchmarks.issue_model.predict import Tile

T = TypeVar("T")


def compile_case(case: Case) -> Compiled:
    """Compile one form with the toolchain in Triton's wheel and read the result."""
    gpu = TARGETS[case.gpu]
    read = _read_nvidia if gpu.target.backend == "cuda" else _read_amd
    return read(_compiled(case), gpu, case.num_warps, _matrix(case))


def assembly(case: Case) -> Any:
    """What the compiler made of one form: ptx, cubin, amdgcn."""
    return _compiled(case).asm


def _compiled(case: Case) -> Any:
    op = registry.gpu_bounds(case.op)
    kernel = op.kernel(case.kernel)
    constants = {name: value for name, value in case.constants if name in kernel.arg_names}
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        argument = op.argument(case, name)
        signature[name] = argument.type
        if argument.divisible:
            attributes[(index,)] = [["tt.divisibility", 16]]
    gpu = TARGETS[case.gpu]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **dict(case.options)}
    return triton.compile(source, target=gpu.target, options=options)


def _matrix(case: Case) -> str:
    gpu = TARGETS[case.gpu]
    return gpu.matrix if dict(case.constants).get("BLOCK_M", 64) >= 64 else gpu.small_matrix


def _read_nvidia(compiled: Any, gpu: Gpu, num_warps: int, matrix: str) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = sass.tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = sass.tool("nvdisasm", "-c", cubin.name)
    registers = int(_only(r"REG:(\d+)", usage))
    spilled = sum(int(value) for value in re.findall(r"(?:STACK|LOCAL):(\d+)", usage))
    # Stores to local memory that the summary does not count.
    spilled += 4 * len(re.findall(r"\bSTL\b", code))
    shared = compiled.metadata.shared
    # A multiprocessor has 64 Ki registers, given out 256 a warp at a time; a block reserves 1 KiB of shared memory.
    warps = 65536 // (-(-registers * 32 // 256) * 256)
    blocks = min(warps // num_warps, gpu.max_warps // num_warps, gpu.shared_unit // (shared + 1024))
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0) or 0
    if tensor_memory:
        blocks = min(blocks, 512 // tensor_memory)
    return Compiled(
        registers, spilled, shared, tensor_memory,
        len(re.findall(matrix, code)), len(re.findall(r"\btf32\b", compiled.asm["ptx"])),
        blocks, blocks * num_warps / gpu.max_warps,
    )  # fmt: skip


def _read_amd(compiled: Any, gpu: Gpu, num_warps: int, matrix: str) -> Compiled:
    code = compiled.asm["amdgcn"]
    registers = int(_only(r"\.vgpr_count:\s+(\d+)", code))  # accumulators included
    spilled = int(_only(r"\.private_segment_fixed_size:\s+(\d+)", code)) + 4 * int(
        _only(r"\.vgpr_spill_count:\s+(\d+)", code)
    )
    shared = compiled.metadata.shared
    # Each of the four units of a multiprocessor has 512 registers a lane, given out 8 at a time, and room for 8 waves.
    waves = min(8, 512 // max(8, -(-registers // 8) * 8)) * 4
    blocks = min(waves // num_warps, gpu.shared_unit // max(shared, 1))
    return Compiled(
        registers, spilled, shared, 0, len(re.findall(matrix, code)), len(re.findall(r"v_mfma\S*xf32", code)),
        blocks, blocks * num_warps / gpu.max_warps,
    )  # fmt: skip


def _only(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(
            f"the compiler's report has no {pattern!r}; this reader does not know triton {triton.__version__}"
        )
    return match.group(1)


# IEEE float32 on NVIDIA has no matrix units: ptxas keeps up to 22 values of a thread in local memory so that one more
# block fits on the multiprocessor, in forms that change with its version. A tile that is too large spills hundreds.
_IEEE_SPILL = 4 * 24  # bytes of a thread


def faults(case: Case, compiled: Compiled | str) -> list[str]:
    """What is wrong with the compiled form; nothing, if it may ship."""
    if isinstance(compiled, str):
        return [compiled]
    gpu = TARGETS[case.gpu]
    found = []
    # NVIDIA's matrix units have no IEEE float32.
    has_units = case.has_dot and not (case.precision == "ieee" and gpu.target.backend == "cuda")
    tolerated = _IEEE_SPILL if case.has_dot and not has_units else 0
    if compiled.spilled > tolerated and not case.may_spill:
        found.append(f"{compiled.spilled} bytes of local memory a thread: it spills")
    limit = 99 << 10 if case.gpu == "sm_80" else gpu.shared_limit  # chips 8.6, 8.9 and 12.0 run this one, too
    if compiled.shared > limit:
        found.append(f"{compiled.shared} bytes of shared memory, the limit is {limit}")
    if compiled.blocks < 1:
        found.append("no block fits on a multiprocessor")
    if has_units and not compiled.matrix_instructions:
        found.append(f"no instruction of the matrix units ({_matrix(case)})")
    if compiled.tf32_instructions and case.precision != "tf32x3":
        found.append(f"{compiled.tf32_instructions} TF32 instructions that nobody asked for")
    return found


def heaviest(chosen: list[Case]) -> list[Case]:
    """The forms that no other outdoes. A form outdoes another if they differ only in the constants that add to a kernel
    (GROWING) and its own are all as large: it then takes more registers and memory."""
    rivals: dict[Case, list[dict[str, Any]]] = {}

    def split(case: Case) -> tuple[Case, dict[str, Any]]:
        growing = registry.gpu_bounds(case.op).GROWING
        fixed = tuple((name, value) for name, value in case.constants if name not in growing)
        return dataclasses.replace(case, constants=fixed), {n: v for n, v in case.constants if n in growing}

    for case in chosen:
        fixed, sizes = split(case)
        rivals.setdefault(fixed, []).append(sizes)

    def is_outdone(case: Case) -> bool:
        fixed, sizes = split(case)
        return any(other != sizes and all(other[n] >= sizes[n] for n in sizes) for other in rivals[fixed])

    return [case for case in chosen if not is_outdone(case)]


def predict_case(case: Case, steps: Sequence[int]) -> list[Tile]:
    """One tile of the form for each number of trips through its main loop. An empty list: not modelled on this GPU."""
    return predict_compiled(_compiled(case), case, steps, CHIPS[case.gpu]) if case.gpu in CHIPS else []


def predict_compiled(compiled: Any, case: Case, steps: Sequence[int], chip: Chip) -> list[Tile]:
    """The same of what Triton compiled."""
    gpu = TARGETS[case.gpu]
    if gpu.target.backend == "cuda":
        taken = _read_nvidia(compiled, gpu, case.num_warps, _matrix(case))
        code = sass.read(compiled.asm["cubin"])
    else:
        taken = _read_amd(compiled, gpu, case.num_warps, _matrix(case))
        code = gcn.parse(compiled.asm["amdgcn"])
    blocks = max(1, taken.blocks)
    constants = dict(case.constants)
    elements = constants.get("BLOCK_M", 0) * constants.get("BLOCK_N", 0) // (gpu.target.warp_size * case.num_warps)
    shape = predict.Shape(case.num_warps, blocks, 1, elements, _shapeless_flops(case))
    return [predict.tile_of(code, chip, shape._replace(steps=number)) for number in steps]


def _shapeless_flops(case: Case) -> float:
    """A warp's share of one product of sm_100: the whole tile, 32 bytes deep."""
    constants = dict(case.constants)
    depth = 8 if case.dtype == "fp32" else 16
    return 2.0 * constants.get("BLOCK_M", 0) * constants.get("BLOCK_N", 0) * depth / case.num_warps


def in_processes(function: Callable[[Case], T], chosen: Sequence[Case], workers: int | None = None) -> list[T | str]:
    """The function of each case, in processes of their own; a text in place of a result says why there is none."""
    workers = min(workers or os.cpu_count() or 1, len(chosen))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return [_outcome(pending) for pending in [pool.submit(function, case).result for case in chosen]]


def _outcome(pending: Callable[[], T]) -> T | str:
    try:
        return pending()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"
