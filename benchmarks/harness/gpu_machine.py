"""What the GPU of this machine is, and what it can do at best."""

import platform
from typing import Any

import torch

from benchmarks.harness.gpu_runs import DTYPES, clock_and_power, seconds_of
from benchmarks.harness.row_log import checksum
from benchmarks.harness.tables import Row, name_of

SIDE = 8192  # of the square product
COPIED = 1 << 30  # bytes


def description(device: torch.device) -> dict[str, Any]:
    """Under what rows are measured: the GPU, the versions, and the sources of the kernels."""
    import triton

    properties = torch.cuda.get_device_properties(device)
    return {
        "GPU": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory GB": round(properties.total_memory / 1e9, 1),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "kernels": checksum(),
    }


def ceilings(device: torch.device, repeats: int = 30) -> list[Row]:
    """A row each: a copy of 1 GiB, and a product of 8192 x 8192 x 8192 in every dtype."""
    source = torch.zeros(COPIED, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), repeats)
    rows: list[Row] = [{"ceiling": "copy of 1 GiB", "GB/s": 2 * COPIED / seconds / 1e9} | clock_and_power()]
    for dtype in DTYPES:
        x, y = (torch.randn(SIDE, SIDE, device=device, dtype=dtype) for _ in range(2))
        seconds = seconds_of(lambda x=x, y=y: x @ y, repeats)  # type: ignore[misc]
        row: Row = {"ceiling": f"product of {SIDE}^3, {name_of(dtype)}", "TFLOP/s": 2.0 * SIDE**3 / seconds / 1e12}
        rows.append(row | clock_and_power())
    return rows
