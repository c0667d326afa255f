"""Cases drawn from numbers, over every op and every instruction set that this machine has::

python -m tests.fuzz --cases 100000 --seed 0      # cases 0 to 99999, dealt to the instruction sets
MMKERNELS_CPU=avx2 python -m tests.fuzz --seed 4711      # one of them again
"""

import argparse
import os
import subprocess
import sys
import time
import warnings

import torch

from mmkernels import _backends
from tests.fuzz.ops import run_cases

VARIANTS = ("avx512bf16", "avx512", "avx2", "portable")


def run_here(seeds: range) -> int:
    """Run the cases under the instruction set of this process; the number of those that fail."""
    if (reason := _backends.unavailable("cpu")) is not None:
        raise SystemExit(reason)
    began, failed = time.process_time(), 0
    for wrong in run_cases(seeds):
        failed += 1
        print(f"MMKERNELS_CPU={torch.ops.mmkernels.cpu_variant()}\n{wrong}", flush=True)
    variant, seconds = torch.ops.mmkernels.cpu_variant(), time.process_time() - began
    print(f"{variant}: {len(seeds)} cases, {failed} wrong, {seconds:.0f} s of CPU time", flush=True)
    return failed


def variants_here() -> list[str]:
    """The instruction sets that this machine has: the library refuses the others."""
    code = (
        "import torch; from mmkernels import _backends; _backends.unavailable('cpu'); torch.ops.mmkernels.cpu_variant()"
    )
    environments = {variant: {**os.environ, "MMKERNELS_CPU": variant} for variant in VARIANTS}
    return [
        variant
        for variant, environment in environments.items()
        if subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False).returncode
        == 0
    ]


def main() -> int:
    """Run what the command line asks for; 1 if a case fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=1, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the number of the first")
    parser.add_argument("--every", type=int, default=1, help="the step from a number to the next")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    seeds = range(options.seed, options.seed + options.cases * options.every, options.every)
    if options.cases == 1 or "MMKERNELS_CPU" in os.environ:
        return run_here(seeds) > 0
    variants = variants_here()
    failed = 0
    for place, variant in enumerate(variants):  # one after the other: a machine has other things to do
        own = seeds[place :: len(variants)]
        command = ["--seed", str(own.start), "--cases", str(len(own)), "--every", str(own.step)]
        environment = {**os.environ, "MMKERNELS_CPU": variant, "OMP_WAIT_POLICY": "passive"}
        failed += subprocess.run(
            [sys.executable, "-m", "tests.fuzz", *command], env=environment, check=False
        ).returncode
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
