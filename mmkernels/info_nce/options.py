"""The arguments of info_nce beside features and scale."""

from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """The order is that of the registered ops: first the tensors, then the plain numbers."""

    targets: Tensor | None = None  # [N], int64; None: key i for query i
    query_groups: Tensor | None = None  # [N], int64
    key_groups: Tensor | None = None  # [M], int64
    symmetric: bool = True
    label_smoothing: float = 0.0
