"""Every loss over tiles of similarities is built from this: the walk, the tile, softmax statistics, their gradient, and
the place of a tile in a strip.

Logits are in base 2 here: 2^x is one instruction. A loss adds its own epilogue to `similarities`.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.triton import LOG2E, LOWEST, dot

# If the log-sum-exps of a tile lie within 32 of each other, one exponential per entry serves the backward pass, for the
# same reason.
BACKWARD_SPREAD = tl.constexpr(32.0)
_BAND = tl.constexpr(8)


@triton.jit
def program_tile(program, num_rows, num_cols):
    """The place of a program in a grid [num_rows, num_cols], walked in bands of rows: neighbours share the L2 cache."""
    in_band = program % (_BAND * num_cols)
    first = program // (_BAND * num_cols) * _BAND
    height = tl.minimum(num_rows - first, _BAND)
    return first + in_band % height, in_band // height


@triton.jit
def block_of_tiles(
    program, num_rows, num_cols, tiles_per_group, tiles_per_split, num_groups, num_splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The group of rows and the split of columns that a program of a Walk owns, and where both begin and end."""
    group, split = program_tile(program, num_groups, num_splits)
    first_row = group * tiles_per_group * BLOCK_M
    first_col = split * tiles_per_split * BLOCK_N
    end_row = tl.minimum(first_row + tiles_per_group * BLOCK_M, num_rows)
    end_col = tl.minimum(first_col + tiles_per_split * BLOCK_N, num_cols)
    return group, split, first_row, end_row, first_col, end_col


@triton.jit
def partials_of_block(row_partials, col_partials, group, split, N, M, num_groups, num_splits):
    """Where a block's part of row_partials [.., num_splits, N] and col_partials [.., num_groups, M] begins, and how far
    apart the planes of each lie."""
    row_plane = tl.cast(num_splits, tl.int64) * N
    col_plane = tl.cast(num_groups, tl.int64) * M
    return row_partials + split.to(tl.int64) * N, row_plane, col_partials + group.to(tl.int64) * M, col_plane


@triton.jit
def all_have_read():
    """Between the loads of what a program keeps in memory for its columns and the stores of the new values: warps may
    hold copies of a column, and one of them stores for all."""
    tl.debug_barrier()


@triton.jit
def similarities(
    x, y, rows, cols, num_x, num_y, D, stride_x, stride_y,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """<x_row, y_col> in float32, [BM, BN]. Rows and columns past the end repeat the last: the caller masks them."""
    k = tl.arange(0, BLOCK_K)
    x_rows = tl.minimum(rows, num_x - 1).to(tl.int64) * stride_x
    y_rows = tl.minimum(cols, num_y - 1).to(tl.int64) * stride_y
    x_ptrs = x + x_rows[:, None] + k[None, :]  # [BM, BK]
    y_ptrs = y + y_rows[None, :] + k[:, None]  # [BK, BN]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, D, BLOCK_K):
        inside = k < D - start
        x_tile = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
        y_tile = tl.load(y_ptrs, mask=inside[:, None], other=0.0)
        acc = dot(x_tile, y_tile, acc, PRECISION)
        x_ptrs += BLOCK_K
        y_ptrs += BLOCK_K
    return acc


@triton.jit
def offsets_in_tile(stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """Where the first features of the rows of a tile lie from its first row on, [BLOCK, BK]."""
    return (tl.arange(0, BLOCK) * stride)[:, None] + tl.arange(0, BLOCK_K)[None, :]


@triton.jit
def add_products(
    acc, x, y, x_row, y_row, stride_x, stride_y, x_offsets, y_offsets, start, D,
    BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc and the products of the features from `start` on, for the rows from x_row and y_row on, which exist. See
    offsets_in_tile.

    For a loop over tiles and features in one: the first copies of a tile are then on their way during the epilogue of
    the last. Nothing but numbers may change from tile to tile there, and no barrier may stand in it.
    """
    inside = tl.arange(0, BLOCK_K) < D - start
    x_tile = tl.load(x + tl.cast(x_row, tl.int64) * stride_x + start + x_offsets, mask=inside[None, :], other=0.0)
    y_tile = tl.load(y + tl.cast(y_row, tl.int64) * stride_y + start + y_offsets, mask=inside[None, :], other=0.0)
    return dot(x_tile, tl.trans(y_tile), acc, PRECISION)


@triton.jit
def with_bias(s, bias, cols, num_y, BIAS: tl.constexpr):
    """The logits in base 2 plus the bias of their columns, if any. Columns past the end take the last column's bias."""
    if BIAS:
        # A mask instead of the clamped index would spill: some tiles have no registers left for it.
        s += (tl.load(bias + tl.minimum(cols, num_y - 1)) * LOG2E)[None, :]
    return s


@triton.jit
def exp2_of_scores(products, scale2, shift, ROUNDED: tl.constexpr):
    """2^(scale2 products - shift), in one instruction for the difference.

    ROUNDED, for features in float32: the score is a number first, as it is where a tile is made the exact way. Its
    rounding, 3e-5 of a score of 1,000, must be the same in the forward and the backward pass, or it is all error.
    """
    if ROUNDED:
        return tl.exp2(scale2 * products - shift)
    zeros = tl.zeros_like(products)
    return tl.exp2(tl.fma(products, zeros + scale2, zeros - shift))


@triton.jit
def first_bits(number):
    """The bits 0, ..., number - 1 of an int32, number <= 32."""
    return tl.where(number < 32, (1 << (number & 31)) - 1, -1)


@triton.jit
def bits_of_overlap(start, length, first, size):
    """Bit i, i < 32: the numbers from start on, `length` of them, meet the `size` ones from first + i size on."""
    low = tl.maximum(start - first, 0) // size
    high = tl.maximum(start + length - 1 - first + size, 0) // size
    return first_bits(tl.minimum(high, 32)) & ~first_bits(tl.minimum(low, 32))


@triton.jit
def count_bits(bits):
    """How many bits of an int32 are set."""
    return tl.sum((bits >> tl.arange(0, 32)) & 1, 0)


@triton.jit
def lowest_bit(bits):
    """The number of the lowest bit of an int32 that is set: the exponent of that bit as a float32."""
    return (((bits & -bits).to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127


@triton.jit
def entries(tile, index):
    """The entry `index` of each row of a tile, [BM]; 0 where there is none."""
    cols = tl.arange(0, tile.shape[1])
    return tl.sum(tl.where(cols[None, :] == index[:, None], tile, 0.0), 1)


@triton.jit
def halves(tile):
    """The left and the right half of the columns of a tile."""
    M: tl.constexpr = tile.shape[0]
    N: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def in_eights(x):
    """The sums of every eighth column, [BM, 8], which a thread has in its registers: a row's sum is left for later."""
    M: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    return tl.sum(tl.reshape(x, (M, WIDTH // 8, 8)), 1)


@triton.jit
def merge(m, z, m_other, z_other):
    """The statistics (maximum m, sum z of 2^(s - m)) of a row from those of its two parts."""
    top = tl.maximum(m, m_other)
    return top, z * tl.exp2(m - top) + z_other * tl.exp2(m_other - top)


@triton.jit
def clear_columns(col_out, col_plane, cols, ok, SUMS: tl.constexpr):
    """Statistics of no row for the columns, in memory; SUMS: and the third plane."""
    # Who loads a column next may be another thread than the one that stores it here.
    all_have_read()
    tl.store(col_out + cols, tl.full(cols.shape, LOWEST, tl.float32), mask=ok)
    tl.store(col_out + col_plane + cols, tl.zeros(cols.shape, tl.float32), mask=ok)
    if SUMS:
        tl.store(col_out + 2 * col_plane + cols, tl.zeros(cols.shape, tl.float32), mask=ok)
    tl.debug_barrier()


@triton.jit
def join_columns(col_out, col_plane, cols, ok, m, z):
    """Join the columns' (m, z) to those in memory, which this program alone owns."""
    # Both statistics lie in one tile, which the compiler spreads over the threads: each alone would be held by all.
    at = col_out + cols[:, None] + tl.arange(0, 2)[None, :] * col_plane  # [BN, 2]
    old_m, old_z = tl.split(tl.load(at, mask=ok[:, None], other=0.0))
    m, z = merge(old_m, old_z, m, z)
    all_have_read()
    tl.store(at, tl.join(m, z), mask=ok[:, None])
    tl.debug_barrier()


@triton.jit
def softmax_grad(s, lse, rest, weight):
    """u_i 2^(s - lse_i), [BM, BN]. lse + rest is the log-sum-exp: lse alone, rounded at 100, would leave probabilities
    4e-6 off."""
    return weight[:, None] * tl.exp2((s - lse[:, None]) - rest[:, None])


@triton.jit
def softmax_grad_both(
    s, row_lse, row_rest, col_lse, col_rest, row_weight, col_weight, row_ok, col_ok, exact,
):  # fmt: skip
    """u_i 2^(s - lse_i) + w_j 2^(s - lse_j), [BM, BN]; `exact` > 0 keeps the exponentials apart, so that u_i and w_j
    can be subtracted without a loss."""
    highest = tl.maximum(
        tl.max(tl.where(row_ok, row_lse, float("-inf")), 0), tl.max(tl.where(col_ok, col_lse, float("-inf")), 0)
    )
    lowest = tl.minimum(
        tl.min(tl.where(row_ok, row_lse, float("inf")), 0), tl.min(tl.where(col_ok, col_lse, float("inf")), 0)
    )
    if (highest - lowest < BACKWARD_SPREAD) & (exact == 0):
        # 2^(s - c) (u_i 2^(c - lse_i) + w_j 2^(c - lse_j)): one exponential serves both softmaxes. c is an integer, so
        # that subtracting it rounds little.
        c = tl.floor((highest + lowest) * 0.5)
        row_factor = row_weight * tl.exp2((c - row_lse) - row_rest)
        col_factor = col_weight * tl.exp2((c - col_lse) - col_rest)
        p = tl.exp2(s - c) * (row_factor[:, None] + col_factor[None, :])
    else:
        p = row_weight[:, None] * tl.exp2((s - row_lse[:, None]) - row_rest[:, None])
        p += col_weight[None, :] * tl.exp2((s - col_lse[None, :]) - col_rest[None, :])
    return p


@triton.jit
def softmax_grads(
    s, rows, cols, row_lse, col_lse, row_weight, col_weight, N, M, row_ok, col_ok, exact, COLUMNS: tl.constexpr,
):  # fmt: skip
    """softmax_grad_both with COLUMNS, else softmax_grad, of the log-sum-exps in memory: row_lse [2, N], col_lse [2, M]
    as store_in_two leaves them."""
    lse, rest = load_in_two(row_lse, N, rows, row_ok)
    if COLUMNS:
        other_lse, other_rest = load_in_two(col_lse, M, cols, col_ok)
        p = softmax_grad_both(
            s, lse, rest, other_lse, other_rest, row_weight, col_weight, row_ok, col_ok, exact
        )  # fmt: skip
    else:
        p = softmax_grad(s, lse, rest, row_weight)
    return p


@triton.jit
def load_in_two(lse, plane, index, ok):
    return tl.load(lse + index, mask=ok, other=0.0), tl.load(lse + plane + index, mask=ok, other=0.0)


@triton.jit
def store_in_two(out, plane, index, value, ok):
    """Stores the value rounded to float32 and, `plane` entries further, the rounding error."""
    rounded = value.to(tl.float32)
    tl.store(out + index, rounded, mask=ok)
    tl.store(out + plane + index, (value - rounded.to(tl.float64)).to(tl.float32), mask=ok)


@triton.jit
def strip_place(program, height, width, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where the tile that a program fills begins in a strip [height, width], whose sides are whole tiles."""
    row_tile, col_tile = program_tile(program, height // BLOCK_M, width // BLOCK_N)
    return row_tile * BLOCK_M, col_tile * BLOCK_N


@triton.jit
def strip_tile(
    first_row, first_col, row_in_strip, col_in_strip, N, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A tile's rows and columns in the strip that begins at (first_row, first_col) of dS, those in dS, and which of the
    latter exist."""
    in_rows = row_in_strip + tl.arange(0, BLOCK_M)
    in_cols = col_in_strip + tl.arange(0, BLOCK_N)
    rows = first_row + in_rows
    cols = first_col + in_cols
    return in_rows, in_cols, rows, cols, rows < N, cols < M


@triton.jit
def store_in_strip(strip, grad, in_rows, in_cols, inside, width):
    """dS of a tile at its rows and columns of the strip, rounded once; 0 where dS has none, for the products read the
    strip whole."""
    out = strip + in_rows.to(tl.int64)[:, None] * width + in_cols[None, :]
    tl.store(out, tl.where(inside, grad, 0.0).to(strip.dtype.element_ty))
