"""The checks of the targets' values, which every implementation in Python makes alike."""

import torch
from torch import Tensor


def check_targets(targets: Tensor, count: int, of: str, ignore_index: int | None = None) -> None:
    """Raise ValueError if a target is not one of the `count` rows, and not ignored. Waits for the device."""
    if torch.compiler.is_compiling():
        return  # a value cannot be looked at while tracing; the indexing itself fails then
    if ignore_index is not None:
        targets = targets[targets != ignore_index]
    if targets.numel() == 0:
        return
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or high >= count:
        raise ValueError(f"{expected_targets(count, of, ignore_index)}, got {low if low < 0 else high}")


def require_targets(op: str, targets: Tensor, count: int, of: str, ignore_index: int | None = None) -> None:
    """Raise if a target is out of range: at once on a CPU, on a GPU when the device gets there."""
    if not targets.is_cuda:
        check_targets(targets, count, of, ignore_index)
        return
    legal = (targets >= 0) & (targets < count)
    if ignore_index is not None:
        legal |= targets == ignore_index
    torch._assert_async(legal.all(), f"mmkernels.{op}: {expected_targets(count, of, ignore_index)}")


def expected_targets(count: int, of: str, ignore_index: int | None = None) -> str:
    """What targets must be, for a message."""
    ignored = "" if ignore_index is None else f", or ignore_index={ignore_index}"
    return f"targets: expected indices of the {count} {of}, 0 to {count - 1}{ignored}"
