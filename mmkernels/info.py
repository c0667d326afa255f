"""python -m mmkernels.info [--json]: for every op and implementation, whether it can run here and, if not, why;
and which tiles the Triton kernels take."""

import argparse
import json
import os

import torch

from mmkernels import _backends
from mmkernels._tiles import overrides

# CPU kernels, and what this machine may have beyond them if the compiler that built the library was too old.
_NARROWER = {"portable": ("avx2", "avx512"), "avx2": ("avx512",)}


def collect() -> dict[str, dict[str, str]]:
    """{op: {implementation: "yes" or the reason why not}}."""
    return {
        op: {name: _backends.unavailable(name, op) or "yes" for name in names}
        for op, names in _backends.IMPLEMENTATIONS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mmkernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args().json
    ops = collect()
    capability = torch.backends.cpu.get_cpu_capability()
    variant = None if _backends.unavailable("cpu") else torch.ops.mmkernels.cpu_variant()
    tiles = overrides.described(torch.device("cuda") if torch.cuda.is_available() else None)
    if as_json:
        print(
            json.dumps(
                {"torch": torch.__version__, "cpu": capability, "cpu_kernels": variant, "tiles": tiles, "ops": ops},
                indent=2,
            )
        )
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, {capability}; CPU kernels: {variant}")
    if capability.lower() in _NARROWER.get(variant or "", ()) and "MMKERNELS_CPU" not in os.environ:
        print(f"the compiler that built the CPU kernels did not know {capability}; reinstall with a newer one")
    print(f"tiles of Triton's kernels: {tiles}")
    for op, implementations in ops.items():
        print(op)
        for name, answer in implementations.items():
            print(f"  {name:<10} {answer}")


if __name__ == "__main__":
    main()
