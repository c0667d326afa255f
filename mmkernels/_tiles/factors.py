"""One exponential an entry for both softmaxes of a tile in the backward pass, where log-sum-exps lie near each other:

    u_i 2^(s - lse_i) + w_j 2^(s - lse_j) = 2^(s - c) (u_i 2^(c - lse_i) + w_j 2^(c - lse_j))

The factors of rows and columns are made once, relative to a c of their own block, and their blocks' bounds beside them.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.engine import BACKWARD_SPREAD


@triton.jit
def store_factors(lse, weights, factors, bounds, length, index, block, num_blocks):
    """The factors of a block of rows or columns `index`, and its lowest and highest log-sum-exp."""
    ok = index < length
    m, rest = tl.load(lse + index, mask=ok, other=0.0), tl.load(lse + length + index, mask=ok, other=0.0)
    lowest = tl.min(tl.where(ok, m, float("inf")), 0)
    highest = tl.max(tl.where(ok, m, float("-inf")), 0)
    factor = tl.load(weights + index, mask=ok, other=0.0) * tl.exp2((_middle(lowest, highest) - m) - rest)
    tl.store(factors + index, factor, mask=ok)
    tl.store(bounds + block, lowest)
    tl.store(bounds + num_blocks + block, highest)


@triton.jit
def _middle(lowest, highest):
    """A whole number, so that subtracting it rounds little."""
    return tl.floor((lowest + highest) * 0.5)


@triton.jit
def common_exponent(
    row_bounds, col_bounds, first_row, first_col, N, M, SYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether a tile may take one exponential for both softmaxes; c of its columns (of its rows, unless SYMMETRIC), and
    that minus c of its rows."""
    row_blocks = tl.cdiv(N, BLOCK_M)
    row_block = tl.minimum(first_row // BLOCK_M, row_blocks - 1)
    lowest = tl.load(row_bounds + row_block)
    highest = tl.load(row_bounds + row_blocks + row_block)
    c = _middle(lowest, highest)
    shift = 0.0
    if SYMMETRIC:
        col_blocks = tl.cdiv(M, BLOCK_N)
        col_block = tl.minimum(first_col // BLOCK_N, col_blocks - 1)
        low = tl.load(col_bounds + col_block)
        high = tl.load(col_bounds + col_blocks + col_block)
        shift = _middle(low, high) - c
        c += shift
        lowest = tl.minimum(lowest, low)
        highest = tl.maximum(highest, high)
    return highest - lowest < BACKWARD_SPREAD, c, shift
