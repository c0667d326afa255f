"""python -m mmkernels.info [--json]: for every op and implementation, whether it can run here and, if not, why."""

import argparse
import json

import torch

from mmkernels import _backends


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
    if as_json:
        print(json.dumps({"torch": torch.__version__, "cpu": capability, "cpu_kernels": variant, "ops": ops}, indent=2))
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} CPU threads, {capability}; CPU kernels: {variant}")
    for op, implementations in ops.items():
        print(op)
        for name, answer in implementations.items():
            print(f"  {name:<10} {answer}")


if __name__ == "__main__":
    main()
