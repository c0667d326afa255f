"""The check of the targets' values, which every implementation in Python makes alike."""

import torch
from torch import Tensor


def check_targets(targets: Tensor, num_keys: int) -> None:
    """Raise ValueError if a target is no row of the keys. Waits for the device."""
    if torch.compiler.is_compiling():
        return  # a value cannot be looked at while tracing; the indexing itself fails then
    low, high = (int(bound) for bound in targets.aminmax())
    if low < 0 or high >= num_keys:
        raise ValueError(f"{expected_targets(num_keys)}, got {low if low < 0 else high}")


def expected_targets(num_keys: int) -> str:
    """What targets must be, for a message."""
    return f"targets: expected indices of the {num_keys} keys, 0 to {num_keys - 1}"
