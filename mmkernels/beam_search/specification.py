"""What every implementation agrees on: the arithmetic, operation by operation, and what a step takes and gives.

Every backend gives the same bits. The results must therefore not depend on the order of a sum, nor on whose exp and log
run. Each operation in reference.py is rounded to float32 (float64 where it says so) by itself, nothing is contracted,
and the sum of a softmax is exact, so that it has no order. csrc/beam_search and triton_kernels.py follow it line by
line with the constants below.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LOG2E = 1.44269504088896341
LN2 = 0.6931471805599453
SQRT_HALF = 0.7071067811865476
# 2^f = 1 + f P(f) for |f| <= 1/2, to 1.1e-7; highest power first.
EXP2 = (0.00132647273, 0.00967151299, 0.0555073358, 0.240222424, 0.693147004)
# log((1 + z) / (1 - z)) = 2 z P(z^2), to 1e-13 for |z| <= 0.172.
LOG = tuple(1 / n for n in (15, 13, 11, 9, 7, 5, 3, 1))
# Below this a power of 2 is zero in the sum of any row of less than 2^31 entries.
LOWEST = -100.0
# Adding it rounds to a whole number, which then lies, 127 above itself, in the low bits.
WHOLE = 1.5 * 2.0**23 + 127
# A softmax's terms are added in float32 where they are COLUMNS apart in a block of ROWS x COLUMNS, and then exactly.
ROWS, COLUMNS = 8, 16


def quantum_bits(vocabulary: int) -> int:
    """The parts of a softmax's sum are multiples of 2^-n: so many that the sum of all fits in float64's 53 bits."""
    return 52 - (vocabulary - 1).bit_length()


class BeamCandidates(NamedTuple):
    """The best candidates of each item, best first; `valid` is False past the last there is."""

    scores: Tensor  # [B, C], float32; -inf where not valid
    beams: Tensor  # [B, C], int64; 0 where not valid
    tokens: Tensor  # [B, C], int64; 0 where not valid
    valid: Tensor  # [B, C], bool
    poisoned: Tensor  # [B], bool: NaN or +inf among the item's logits or scores; it has no candidate then


class Progress(NamedTuple):
    """What the search knows of N items of k beams: their best k hypotheses, best first, and how far they are.

    A hypothesis is where it ends: candidate `tokens`, after beam `beams`, in step `times`.
    """

    scores: Tensor  # [N, k]: sum of log-probabilities / length penalty; -inf where not valid
    log_probs: Tensor  # [N, k]
    times: Tensor  # [N, k], int64
    beams: Tensor  # [N, k], int64
    tokens: Tensor  # [N, k], int64
    valid: Tensor  # [N, k], bool
    counts: Tensor  # [N], int64: hypotheses found, also those that are no longer among the best k
    fault: Tensor  # [N], int64: 0, POISONED or DEAD
    done: Tensor  # [N], bool
    missed: Tensor  # [N]: the most that a hypothesis could have scored that stopping cut off; -inf: nothing
    top_ended: Tensor  # [N], bool: the best candidate of some step ended

    @staticmethod
    def none(items: int, beams: int, like: Tensor) -> "Progress":
        """Nothing found yet; floats of the dtype and device of `like`."""
        no_score, zeros = like.new_full((items, beams), -torch.inf), like.new_zeros(items, beams, dtype=torch.int64)
        no, zero = zeros.bool(), zeros.new_zeros(items)
        hypotheses = [no_score, no_score, zeros, zeros, zeros, no]
        items_only = [zero, zero, zero.bool(), no_score.new_full((items,), -torch.inf), zero.bool()]
        return Progress(*(part.clone() for part in hypotheses + items_only))


POISONED, DEAD = 1, 2
BOUND, COUNT, COUNT_OR_TOP = 0, 1, 2


class Rule(NamedTuple):
    """The rules of one step, plain numbers."""

    step: int  # 0 is the first
    max_length: int
    stop: int  # BOUND: k hypotheses that no beam beats at bound_length; COUNT: `target` of them; COUNT_OR_TOP: or
    # num_return of them once the best candidate ended
    bound_length: int
    target: int
    num_return: int
    cuts: bool  # a beam at max_length becomes a hypothesis
    first_come: bool  # at most `target` hypotheses are taken, the first


class Beams(NamedTuple):
    """The beams of the next step; 0 and -inf where not valid."""

    scores: Tensor  # [N, k]
    parents: Tensor  # [N, k], int64
    tokens: Tensor  # [N, k], int64
    valid: Tensor  # [N, k], bool
