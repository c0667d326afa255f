"""Compile every Triton kernel for GPUs that need not be here; tabulate what they take and how fast they could be.

    python -m benchmarks.gpu_bounds [--targets sm_90 gfx942] [--rows 32768] [--features 512] [--all] [--json FILE]

Registers, spills, shared memory and instructions come from the compiled code. The time is a bound: FLOPs and bytes
over the limits of the datasheet. Nothing here is measured.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from mmkernels.contrastive import triton_kernels
from mmkernels.contrastive.triton_kernels import info_nce
from mmkernels.contrastive.triton_kernels.configs import CONFIGS, Config, Tile


@dataclasses.dataclass(frozen=True)
class Gpu:
    """One target of the compiler and the datasheet of its best-known chip."""

    chip: str
    target: GPUTarget
    shared_limit: int  # bytes a block may take
    shared_unit: int  # bytes of a multiprocessor
    max_warps: int  # of a multiprocessor
    peak: dict[str, float]  # FLOP/s by precision
    bandwidth: float  # bytes/s
    matrix: str  # instructions of the matrix units, as a regular expression


# NVIDIA A100 (80 GB SXM), H100 (SXM), B200 and AMD MI300X datasheets, without sparsity. A tf32x3 product takes three.
GPUS: dict[str, Gpu] = {
    "sm_80": Gpu(
        "A100", GPUTarget("cuda", 80, 32), 163 << 10, 164 << 10, 64,
        {"half": 312e12, "tf32x3": 156e12 / 3, "ieee": 19.5e12}, 2.04e12, r"\bHMMA\.",
    ),
    "sm_90": Gpu(
        "H100", GPUTarget("cuda", 90, 32), 227 << 10, 228 << 10, 64,
        {"half": 989e12, "tf32x3": 494e12 / 3, "ieee": 67e12}, 3.35e12, r"\bHGMMA\.",
    ),
    "sm_100": Gpu(
        "B200", GPUTarget("cuda", 100, 32), 227 << 10, 228 << 10, 64,
        {"half": 2250e12, "tf32x3": 1125e12 / 3, "ieee": 75e12}, 8.0e12, r"\bUTC\w*MMA\b",
    ),
    "gfx942": Gpu(
        "MI300X", GPUTarget("hip", "gfx942", 64), 64 << 10, 64 << 10, 32,
        {"half": 1307e12, "ieee": 163.4e12}, 5.3e12, r"\bv_mfma_",
    ),
}  # fmt: skip

# Arguments that are strides or sizes of padded rows: multiples of 16, which the launcher sees to.
_MULTIPLES_OF_16 = {"D", "stride_q", "stride_k", "stride_x", "stride_y", "stride_strip"}
_FEATURES = {"queries", "keys", "x", "y", "strip", "grad"}
_INTEGERS = {"N", "M", "num_x", "num_y", "num_features", "tiles_per_group", "tiles_per_split", "num_groups"} | {
    "num_splits", "first", "first_x", "length", "strip_rows", "steps_per_split", "first_share",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One compiled form of a kernel: everything that the compiler is told."""

    kernel: str
    gpu: str
    precision: str  # half, tf32x3, ieee
    dtype: str  # bf16, fp16, fp32
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int

    @property
    def has_dot(self) -> bool:
        return "PRECISION" in dict(self.constants)

    @property
    def name(self) -> str:
        flags = [key.lower() for key, value in self.constants if value is True]
        return "-".join([self.kernel.removesuffix("_kernel"), self.dtype, self.precision, self.gpu, *flags])


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiled code takes."""

    registers: int
    spilled: int  # bytes of local memory (stack, spills) of a thread
    shared: int  # bytes of a block
    tensor_memory: int  # columns, sm_100
    matrix_instructions: int
    tf32_instructions: int
    blocks: int  # resident on a multiprocessor
    occupancy: float


def cases(gpus: Iterable[str] = GPUS) -> list[Case]:
    """Every form that a launcher can ask for on these GPUs."""
    return [
        case for gpu in gpus for precision, config in CONFIGS[gpu].items() for case in _cases(gpu, precision, config)
    ]


def _cases(gpu: str, precision: str, config: Config) -> Iterable[Case]:
    both = (False, True)
    for dtype in ("bf16", "fp16") if precision == "half" else ("fp32",):
        make = functools.partial(_case, gpu, precision, dtype)
        for symmetric in both:
            yield make("forward_kernel", config.forward, SYMMETRIC=symmetric)
            for smoothed in both:
                block = {"STEP": triton_kernels.MERGE_STEP, "BLOCK": triton_kernels.MERGE_BLOCK}
                yield make("finish_forward_kernel", None, SYMMETRIC=symmetric, SMOOTHED=smoothed, **block)
        for symmetric, of_keys, smoothed in itertools.product(both, both, both):
            flags = {"SYMMETRIC": symmetric, "OF_KEYS": of_keys, "SMOOTHED": smoothed}
            yield make("grad_logits_kernel", config.grad_logits, **flags)
        yield make("product_kernel", config.product)
        for store, share in ((True, True), (True, False), (False, True)):
            block = {"BLOCK_M": triton_kernels.MERGE_ROWS, "BLOCK_N": triton_kernels.MERGE_FEATURES}
            yield make("merge_product_kernel", None, STORE=store, SHARE=share, **block)
    if precision == "ieee":  # it sees float32 and targets alone
        block = {"STEP": triton_kernels.MERGE_STEP, "BLOCK": triton_kernels.MERGE_BLOCK}
        yield _case(gpu, precision, "fp32", "column_weights_kernel", None, **block)


def _case(gpu: str, precision: str, dtype: str, kernel: str, tile: Tile | None, **constants: Any) -> Case:
    warps, stages = 4, 3  # Triton's defaults
    if tile is not None:
        constants |= {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k}
        constants["PRECISION"] = "ieee" if precision == "half" else precision
        warps, stages = tile.num_warps, tile.num_stages
    return Case(kernel, gpu, precision, dtype, tuple(constants.items()), warps, stages)


def compile_case(case: Case, kernel: Any = None) -> Compiled:
    """Compile one form with the toolchain in Triton's wheel and read the result."""
    kernel = getattr(info_nce, case.kernel) if kernel is None else kernel
    constants = dict(case.constants)
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in _INTEGERS or name in _MULTIPLES_OF_16:
            signature[name] = "i32"
        elif name == "label_smoothing":
            signature[name] = "fp32"
        else:
            signature[name] = "*" + (case.dtype if name in _FEATURES else "i64" if name == "targets" else "fp32")
        if signature[name].startswith("*") or name in _MULTIPLES_OF_16:
            attributes[(index,)] = [["tt.divisibility", 16]]
    gpu = GPUS[case.gpu]
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, **triton_kernels.NO_FUSION}
    compiled = triton.compile(source, target=gpu.target, options=options)
    read = _read_nvidia if gpu.target.backend == "cuda" else _read_amd
    return read(compiled, gpu, case.num_warps)


def _read_nvidia(compiled: Any, gpu: Gpu, num_warps: int) -> Compiled:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", cubin.name)
        code = _tool("nvdisasm", "-c", cubin.name)
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
        len(re.findall(gpu.matrix, code)), len(re.findall(r"\btf32\b", compiled.asm["ptx"])),
        blocks, blocks * num_warps / gpu.max_warps,
    )  # fmt: skip


def _read_amd(compiled: Any, gpu: Gpu, num_warps: int) -> Compiled:
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
        registers, spilled, shared, 0, len(re.findall(gpu.matrix, code)), len(re.findall(r"v_mfma\S*xf32", code)),
        blocks, blocks * num_warps / gpu.max_warps,
    )  # fmt: skip


def _only(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise RuntimeError(
            f"the compiler's report has no {pattern!r}; this reader does not know triton {triton.__version__}"
        )
    return match.group(1)


def _tool(name: str, *arguments: str) -> str:
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def faults(case: Case, compiled: Compiled | str) -> list[str]:
    """What is wrong with the compiled form; nothing, if it may ship."""
    if isinstance(compiled, str):
        return [compiled]
    gpu = GPUS[case.gpu]
    found = []
    if compiled.spilled:
        found.append(f"{compiled.spilled} bytes of local memory a thread: it spills")
    limit = 99 << 10 if case.gpu == "sm_80" else gpu.shared_limit  # chips 8.6, 8.9 and 12.0 run this one, too
    if compiled.shared > limit:
        found.append(f"{compiled.shared} bytes of shared memory, the limit is {limit}")
    if compiled.blocks < 1:
        found.append("no block fits on a multiprocessor")
    # NVIDIA's matrix units have no IEEE float32.
    has_units = case.has_dot and not (case.precision == "ieee" and gpu.target.backend == "cuda")
    if has_units and not compiled.matrix_instructions:
        found.append(f"no instruction of the matrix units ({gpu.matrix})")
    if compiled.tf32_instructions and case.precision != "tf32x3":
        found.append(f"{compiled.tf32_instructions} TF32 instructions that nobody asked for")
    return found


def _attempt(case: Case) -> Compiled | str:
    try:
        return compile_case(case)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[-1] if str(error).strip() else ''}"


def compile_all(chosen: list[Case], workers: int | None = None) -> list[Compiled | str]:
    """Compile the cases in processes of their own; a text in place of a result says why there is none."""
    workers = min(workers or os.cpu_count() or 1, len(chosen))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(_attempt, chosen))


def work(case: Case, rows: int, features: int) -> tuple[float, float]:
    """FLOPs and least bytes of memory traffic of one kernel over a whole [rows, rows] problem, one side."""
    element = {"bf16": 2, "fp16": 2, "fp32": 4}[case.dtype]
    inputs = 2.0 * rows * features * element
    logits = float(rows) * rows
    if case.kernel == "forward_kernel":
        return 2 * logits * features, inputs
    if case.kernel == "grad_logits_kernel":
        return 2 * logits * features, inputs + logits * element
    if case.kernel == "product_kernel":
        return 2 * logits * features, logits * element + inputs
    if case.kernel == "merge_product_kernel":
        return 2.0 * rows * features, rows * features * (4 + 2 * element)
    if case.kernel == "column_weights_kernel":
        return 2 * logits, 16.0 * rows
    return 64.0 * rows, 2 * 32 * 8.0 * rows


def bound(case: Case, rows: int, features: int) -> tuple[float, str]:
    """Seconds that the datasheet allows at best, and which limit that is."""
    flops, traffic = work(case, rows, features)
    gpu = GPUS[case.gpu]
    compute = flops / gpu.peak[case.precision if case.has_dot else "ieee"]
    memory = traffic / gpu.bandwidth
    return max(compute, memory), "compute" if compute >= memory else "memory"


HEADS = (
    "kernel", "tile", "warps", "stages", "registers", "spilled B", "shared KiB", "occupancy (blocks)", "matrix instr.",
    "GFLOP", "MB", "bound ms", "limit",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--rows", type=int, default=32768, help="queries and keys of the bound")
    parser.add_argument("--features", type=int, default=512, help="D of the bound")
    parser.add_argument("--all", action="store_true", help="every form, not only the symmetric loss in bf16 and fp32")
    parser.add_argument("--json", type=Path, help="write the table there, too")
    arguments = parser.parse_args()

    chosen = [case for case in cases(arguments.targets) if arguments.all or _is_main(case)]
    results = compile_all(chosen)
    lines, records = [], []
    for case, result in zip(chosen, results, strict=True):
        if isinstance(result, str):
            lines.append([case.name, result])
            continue
        tile = "x".join(str(value) for key, value in case.constants if key.startswith(("BLOCK", "STEP")))
        flops, traffic = work(case, arguments.rows, arguments.features)
        seconds, limit = bound(case, arguments.rows, arguments.features)
        fitting = f"{result.occupancy:.0%} ({result.blocks})"
        cells = (
            case.name,
            tile,
            case.num_warps,
            case.num_stages,
            result.registers,
            result.spilled,
            result.shared >> 10,
            fitting,
            result.matrix_instructions,
            f"{flops / 1e9:.1f}",
            f"{traffic / 1e6:.1f}",
            f"{seconds * 1e3:.3f}",
            limit,
        )
        lines.append([str(cell) for cell in cells])
        record = {"case": case.name, "tile": tile, "flops": flops, "bytes": traffic, "bound_s": seconds, "limit": limit}
        records.append(record | dataclasses.asdict(result) | {"faults": faults(case, result)})

    print(f"[{arguments.rows}, {arguments.features}] queries and keys. Times are bounds from datasheets, not measured:")
    for name in arguments.targets:
        gpu = GPUS[name]
        peaks = ", ".join(f"{precision} {peak / 1e12:.0f} TFLOP/s" for precision, peak in gpu.peak.items())
        print(f"  {name}: {gpu.chip}, {gpu.bandwidth / 1e12:.2f} TB/s, {peaks}")
    print(table([list(HEADS), *lines]))
    if arguments.json:
        arguments.json.write_text(json.dumps(records, indent=1) + "\n")
    broken = [
        case.name
        for case, result in zip(chosen, results, strict=True)
        if isinstance(result, str) or faults(case, result)
    ]
    if broken:
        raise SystemExit("faults in: " + ", ".join(broken))


def table(lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in lines if i < len(line) and len(line) > 2) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in lines
    )


def _is_main(case: Case) -> bool:
    constants = dict(case.constants)
    return (
        case.dtype != "fp16"
        and not constants.get("SMOOTHED")
        and constants.get("SYMMETRIC", True)
        and constants.get("STORE", True)
        and constants.get("SHARE", True)
    )


if __name__ == "__main__":
    main()
