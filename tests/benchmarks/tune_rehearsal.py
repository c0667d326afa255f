"""gpu_check --tune of retrieval, whole, on a GPU that is not there: run by test_gpu_tune in a process whose CUDA driver
does nothing.

    python -m tests.benchmarks.tune_rehearsal FOLDER

Tiles are compiled and launched as for an H100. No kernel does anything, so the clock and the oracle are replaced: a
pass lasts as long as the warps and stages of its last launch say.
"""

import argparse
import functools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from triton.compiler.compiler import CompiledKernel

from benchmarks import gpu_kernels, gpu_tune
from benchmarks.harness import gpu_runs
from benchmarks.retrieval import gpu_check as check
from benchmarks.stub_cuda.driver import pretend
from mmkernels._tiles import configs, overrides
from mmkernels._tiles.triton import Chip
from mmkernels.retrieval import triton_kernels

GPU = "NVIDIA H0 (stub)"
# What a pass takes by the warps and the stages of the launch.
SECONDS = {(8, 4): 1.0, (4, 4): 0.5, (8, 3): 1.0, (4, 3): 0.99}
WRONG = "BLOCK_N=64"


def main(folder: Path) -> None:
    pretend()
    for module in (gpu_tune, configs, triton_kernels):
        module.family_of = lambda device: "sm_90"
    launched: list[tuple[str, int, int]] = []

    def note(kernel, *_):
        launched.append((kernel.name, kernel.metadata.num_warps, kernel.metadata.num_stages))

    def seconds_of(step):
        launched.clear()
        step()
        warps, stages = next(launch for name, *launch in reversed(launched) if "positives" not in name)
        wide = rows_now().get("BLOCK_N", 128)
        return SECONDS[warps, stages] * (0.4 if wide == 64 else 1.0)

    def rows_now():
        return overrides._replaced.get(("retrieval", "pairs", "half"), {}) if overrides._replaced else {}

    def holds(case, dtype, device):
        if rows_now().get("BLOCK_N") == 64:
            raise AssertionError(WRONG)
        return [torch.zeros(1)]

    CompiledKernel.launch_metadata = note
    properties = SimpleNamespace(name=GPU, multi_processor_count=132, total_memory=8e10)
    torch.cuda.get_device_properties = lambda device: properties
    overrides.gpu_name = lambda device: GPU
    gpu_runs.gemm_rate = lambda *shape: 1e9
    gpu_tune.seconds_of = seconds_of
    gpu_tune.in_processes = lambda function, cases, workers: [function(case) for case in cases]
    few = {"num_warps": (4, 8)}
    gpu_tune.SLOTS = tuple(
        slot._replace(changes={"BLOCK_N": (64, 128), **few} if slot.kernel == "pairs" else few)
        for slot in gpu_tune.SLOTS
        if slot.op == "retrieval"
    )
    check.QUICK = [check.Size(32, 64, 16, 0), check.Size(32, 64, 16, 4)]
    check.CASES, check.check = check.CASES[:1], holds
    chosen = argparse.Namespace(ops=["retrieval"], quick=True, processes=0, out=folder / "out", tiles=None)
    device = torch.device("cpu")
    gpu_tune.main(chosen, device, 0.0)  # the time is over before it begins
    assert not overrides.cache_of(GPU).exists()
    gpu_tune.main(chosen, device, float("inf"))
    rows = (folder / "out" / "tiles.jsonl").read_text()
    gpu_tune.main(chosen, device, float("inf"))
    assert (folder / "out" / "tiles.jsonl").read_text() == rows
    # The file is in use: at the next launch, without a word to anybody.
    overrides.forget()
    tile, _ = configs.choose_tile("retrieval", torch.zeros(1, dtype=torch.bfloat16))
    print(json.dumps({"pass": kernels_of_a_pass(device)}))
    print(json.dumps({"pairs": tile._asdict(), "file": json.loads(overrides.cache_of(GPU).read_text())[GPU]}))


def kernels_of_a_pass(device: torch.device) -> list[dict]:
    """Ranks of 4,096 queries, in which the profiler saw ours and torch's kernels."""
    names = ("ranks_kernel", "positives_kernel", "at::native::reduce_kernel")
    gpu_runs.kernel_times = lambda step: [{"kernel": name, "launches": 1, "us": 9.0} for name in names]
    size = check.Size(4096, 4096, 512, 0)
    gpu_kernels.chip_of = lambda device: Chip(66, 50 << 20)  # half of an H100's multiprocessors
    gpu_kernels.family_of = lambda device: "sm_90"
    queries = torch.zeros(size.N, size.D, dtype=torch.bfloat16)
    step = functools.partial(triton_kernels.retrieval_ranks, queries, queries, None)
    return gpu_kernels.times("retrieval", size, torch.bfloat16, device, step)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
