"""What a call of linear_cross_entropy asks for beside tensors."""

from typing import NamedTuple


class Options(NamedTuple):
    """In the order of the registered ops."""

    ignore_index: int
    label_smoothing: float
