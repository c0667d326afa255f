"""The arguments of linear_cross_entropy beside tensors."""

from typing import NamedTuple


class Options(NamedTuple):
    """The order is that of the registered ops."""

    ignore_index: int
    label_smoothing: float
