"""What torch's FlopCounterMode counts for the ops: the matrix products of the eager lines that a call replaces.

So a model's count does not depend on the implementation: what a kernel recomputes, skips or does in the other pass is
not counted. divided_attention replaces a fused attention, whose recomputed scores torch counts: so does its formula.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

# At its first import the counter warns where Triton is missing, and those who count no FLOPs need no such warning. Only
# that import is silenced: the logger is left as its owner set it.
_log = logging.getLogger("torch.utils.flop_counter")
_was_disabled, _log.disabled = _log.disabled, True
from torch.utils.flop_counter import register_flop_formula

_log.disabled = _was_disabled


def register_flops(op: Any, formula: Callable[..., int]) -> None:
    """`formula` takes the op's arguments in their order, a shape for each tensor."""
    register_flop_formula(op)(lambda *arguments, out_shape=None: formula(*arguments))


def product(left: Sequence[int], right: Sequence[int]) -> int:
    """FLOPs of left right^T, [N, D] and [M, D]: a multiplication and an addition for each of the N M D terms."""
    return 2 * left[0] * right[0] * left[1]


def gradients(left: Sequence[int], right: Sequence[int], of_left: bool, of_right: bool, of_scale: bool = False) -> int:
    """FLOPs of the gradients of scale left right^T: one product for `left` and the scale together, one for `right`."""
    return product(left, right) * ((of_left or of_scale) + of_right)
