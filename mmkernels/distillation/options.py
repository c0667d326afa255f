"""The arguments of distillation beside the student's features and scale."""

from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """The order is that of the registered ops: first the tensors, then the plain number."""

    teacher_queries: Tensor  # [N, D']
    teacher_keys: Tensor  # [M, D']
    teacher_scale: Tensor  # []
    symmetric: bool
