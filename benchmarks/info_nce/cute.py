"""The CuTe kernel of info_nce without a GPU: it is compiled for an H100, its instructions are counted and timed.

    python -m benchmarks.info_nce.cute [--features 512]

The clocks are a prediction of benchmarks/issue_model, with what ring.py says of TMA. The package nvidia-cutlass-dsl
must be installed. Nobody has run the kernel.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from benchmarks.issue_model import ring, sass
from benchmarks.issue_model.flow import Flow
from benchmarks.issue_model.pipes import CHIPS
from benchmarks.issue_model.predict import Work, _straight

_BUILD = """
import sys, torch
from mmkernels.info_nce import cute_kernels
cute_kernels.compiled(int(sys.argv[1]), getattr(torch, sys.argv[2]))
"""
GROUPS = 2  # of consumers


class Built(NamedTuple):
    ptx: str
    cubin: bytes


def build(slices: int, dtype: str = "bfloat16") -> Built:
    """Compile for sm_90a in a process of its own, which is told so and what to keep before it imports the DSL."""
    with tempfile.TemporaryDirectory() as folder:
        told = {"CUTE_DSL_ARCH": "sm_90a", "CUTE_DSL_KEEP": "ptx,cubin", "CUTE_DSL_DUMP_DIR": folder}
        subprocess.run([sys.executable, "-c", _BUILD, str(slices), dtype], env=os.environ | told, check=True)
        (ptx,), (cubin,) = (list(Path(folder).glob(f"*.{kind}")) for kind in ("ptx", "cubin"))
        return Built(ptx.read_text(), cubin.read_bytes())


class Prediction(NamedTuple):
    main: Work  # of the instructions that make the product of a tile and wait for its slices
    cycles: float  # a tile of 128 x 128
    product: float  # of them the tensor cores' own
    tflops: float


def predict(cubin: bytes, slices: int, places: int, latency: float = 900.0) -> Prediction:
    chip = CHIPS["sm_90"]
    flow = Flow(sass.read(cubin))
    (loop,) = flow.innermost_with_matrix()
    path = _straight(flow, flow.path(loop))
    tiles = sum(i.name == "HGMMA" for i in path) // (4 * slices)
    steps = ring.steps_of(path, chip)
    # A block fetches half of a slice of 128 keys and 64 bf16 features; the other block of its cluster fetches the rest.
    of_slices = ring.Ring(places, 128 * 64 * 2 / 2 / chip.l2_bytes, latency)
    cycles = ring.cycles(steps, chip, of_slices, GROUPS) / tiles
    product = GROUPS * sum(step.clocks for step in steps if step.pipe == "matrix") / tiles
    flops = product * chip.matrix
    clock = chip.clock_at(product / cycles)
    work = Work.of(path, chip)
    of_tile = Work(
        work.instructions // tiles,
        {name: clocks / tiles for name, clocks in work.clocks.items()},
        type(work.named)({name: round(number / tiles) for name, number in work.named.items()}),
    )
    return Prediction(of_tile, cycles, product, flops / cycles * clock * chip.multiprocessors / 1e12)


def places(slices: int) -> int:
    """Of the ring, as the kernel chooses them."""
    return min((227 * 1024 - 1024 - 8192 - 128 * 64 * 2 * slices) // (128 * 64 * 2), 8)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.info_nce.cute", description=__doc__)
    parser.add_argument("--features", type=int, default=512)
    slices = -(-parser.parse_args().features // 64)
    built = build(slices)
    for latency in (600.0, 900.0, 1200.0):
        found = predict(built.cubin, slices, places(slices), latency)
        if latency == 600.0:
            print(
                f"a warp issues {found.main.instructions} instructions a tile: {dict(found.main.named.most_common())}"
            )
            print(f"clocks of a scheduler's pipes a warp: { {k: round(v) for k, v in found.main.clocks.items()} }")
        print(
            f"slices come {latency:.0f} clocks after they are asked for: {found.cycles:.0f} cycles a tile, "
            f"{found.product:.0f} of them the product's: {found.tflops:.0f} TFLOP/s"
        )


if __name__ == "__main__":
    main()
