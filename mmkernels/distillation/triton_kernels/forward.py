"""The kernels of distillation's forward pass: sums of both softmaxes over tiles of both logits, and the losses."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.engine import (
    add_products,
    all_have_read,
    bits_of_overlap,
    block_of_tiles,
    count_bits,
    first_bits,
    halves,
    lowest_bit,
    offsets_in_tile,
    partials_of_block,
    similarities,
    store_in_two,
)
from mmkernels._tiles.slots import LEAST, SPREAD, of_rows, of_slots, sum_of_slots, sum_over_slots, top_of_slots
from mmkernels._tiles.triton import LN2, LOG2E, LOWEST

SUMS = 5  # of a row or a column: m, z, n, y, a
COLUMN_SUMS = tl.constexpr(3)  # z, y, a, which a walk down a column of tiles holds in registers


@triton.jit
def _join(m, z, n, y, a, m_other, z_other, n_other, y_other, a_other):
    """The sums of a row from those of its two parts."""
    top = tl.maximum(m, m_other)
    teacher_top = tl.maximum(n, n_other)
    factor = tl.exp2(n - teacher_top)
    factor_other = tl.exp2(n_other - teacher_top)
    z = z * tl.exp2(m - top) + z_other * tl.exp2(m_other - top)
    y = y * factor
    y_other = y_other * factor_other
    a = (a * factor + (m - top) * y) + (a_other * factor_other + (m_other - top) * y_other)
    return top, z, teacher_top, y + y_other, a


@triton.jit
def _load_sums(at, plane, mask):
    m = tl.load(at, mask=mask, other=LOWEST)
    z = tl.load(at + plane, mask=mask, other=0.0)
    n = tl.load(at + 2 * plane, mask=mask, other=LOWEST)
    y = tl.load(at + 3 * plane, mask=mask, other=0.0)
    a = tl.load(at + 4 * plane, mask=mask, other=0.0)
    return m, z, n, y, a


@triton.jit
def _store_sums(at, plane, m, z, n, y, a, mask):
    tl.store(at, m, mask=mask)
    tl.store(at + plane, z, mask=mask)
    tl.store(at + 2 * plane, n, mask=mask)
    tl.store(at + 3 * plane, y, mask=mask)
    tl.store(at + 4 * plane, a, mask=mask)


@triton.jit
def _clear_sums(at, plane, mask):
    """The sums of nothing. Who loads a column next may be another thread than the one that stores it here."""
    all_have_read()
    lowest = tl.full(mask.shape, LOWEST, tl.float32)
    nothing = tl.zeros(mask.shape, tl.float32)
    _store_sums(at, plane, lowest, nothing, lowest, nothing, nothing, mask)
    tl.debug_barrier()


@triton.jit
def _add_to_columns(at, plane, ok, m, z, n, y, a):
    """Join the columns' sums to those in memory, which this program alone owns."""
    old_m, old_z, old_n, old_y, old_a = _load_sums(at, plane, ok)
    m, z, n, y, a = _join(old_m, old_z, old_n, old_y, old_a, m, z, n, y, a)
    all_have_read()
    _store_sums(at, plane, m, z, n, y, a, ok)
    tl.debug_barrier()


@triton.jit
def _sums_of(s, t, ok, AXIS: tl.constexpr):
    """The sums of the rows (AXIS 1) or columns (AXIS 0) of a tile, of its true maxima; what is not ok is -inf."""
    m = tl.maximum(tl.max(s, AXIS), LOWEST)
    n = tl.maximum(tl.max(t, AXIS), LOWEST)
    s -= tl.expand_dims(m, AXIS)
    mass = tl.exp2(t - tl.expand_dims(n, AXIS))
    return m, tl.sum(tl.exp2(s), AXIS), n, tl.sum(mass, AXIS), tl.sum(tl.where(ok, mass * s, 0.0), AXIS)


@triton.jit
def _exact_part(
    s, t, m, z, n, y, a, rows, positives, col_out, col_plane, col_start, N, M,
    SYMMETRIC: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The rows' sums with the columns from col_start on, and in memory those of the columns with the rows. Every m and
    n is the true maximum: a loss near zero at an entry that outweighs all others is then as small as they are."""
    cols = col_start + tl.arange(0, WIDTH)
    row_ok = rows < N
    col_ok = cols < M
    ok = row_ok[:, None] & col_ok[None, :]
    positive = tl.sum(tl.where(rows[:, None] == cols[None, :], s, 0.0), 1)
    tl.store(positives + rows, positive, mask=(rows >= col_start) & (rows < col_start + WIDTH) & row_ok)
    s = tl.where(ok, s, float("-inf"))
    t = tl.where(ok, t, float("-inf"))
    row_m, row_z, row_n, row_y, row_a = _sums_of(s, t, ok, 1)
    if SYMMETRIC:
        col_m, col_z, col_n, col_y, col_a = _sums_of(s, t, ok, 0)
        _add_to_columns(col_out + cols, col_plane, col_ok, col_m, col_z, col_n, col_y, col_a)
    return _join(m, z, n, y, a, row_m, row_z, row_n, row_y, row_a)


@triton.jit
def _plain_half(
    s, t, scale2, teacher_scale2, row_m, row_n, z, y, a, shift, shrink, teacher_shrink,
    SYMMETRIC: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """z, y and a of the rows of half a tile of products, and those of the columns with it, slot by slot: relative to
    row_m and row_n, to which `shift` and the factors move what the columns had."""
    s = tl.fma(s, tl.zeros_like(s) + scale2, tl.zeros_like(s) - row_m[:, None])
    mass = tl.exp2(tl.fma(t, tl.zeros_like(t) + teacher_scale2, tl.zeros_like(t) - row_n[:, None]))
    e = tl.exp2(s)
    s *= mass
    if SYMMETRIC:
        nothing = tl.zeros_like(z)
        z = tl.fma(z, nothing + tl.expand_dims(shrink, -1), sum_of_slots(e, HIGH))
        a = tl.fma(y, nothing + tl.expand_dims(shift, -1), a)
        a = tl.fma(a, nothing + tl.expand_dims(teacher_shrink, -1), sum_of_slots(s, HIGH))
        y = tl.fma(y, nothing + tl.expand_dims(teacher_shrink, -1), sum_of_slots(mass, HIGH))
    return tl.sum(e, 1), tl.sum(mass, 1), tl.sum(s, 1), z, y, a


@triton.jit
def _flush_half(
    m, n, z, y, a, top, teacher_top, parts, col_out, col_plane,
    BLOCK_M: tl.constexpr, WIDTH: tl.constexpr, HIGH: tl.constexpr,
):  # fmt: skip
    """Join what the slots have of half the columns, the first at col_out, to the sums in memory. Returns 1 if a sum is
    too small for that."""
    PART: tl.constexpr = BLOCK_M // 16 * WIDTH
    shift = tl.expand_dims(m - top, -1)
    z *= tl.exp2(shift)
    y *= tl.exp2(tl.expand_dims(n - teacher_top, -1))
    a = a * tl.exp2(tl.expand_dims(n - teacher_top, -1)) + shift * y
    z = sum_over_slots(z, parts, BLOCK_M, WIDTH, HIGH)
    y = sum_over_slots(y, parts + PART, BLOCK_M, WIDTH, HIGH)
    a = sum_over_slots(a, parts + 2 * PART, BLOCK_M, WIDTH, HIGH)
    lowest = tl.zeros_like(z)
    _add_to_columns(col_out + tl.arange(0, WIDTH), col_plane, z == z, lowest + top, z, lowest + teacher_top, y, a)
    return tl.max((~(tl.minimum(z, y) > LEAST)).to(tl.int32), 0)


@triton.jit(do_not_specialize=["N", "M", "tiles_per_group", "tiles_per_split", "num_groups", "num_splits"])
def distillation_forward_kernel(
    queries, keys, scale, teacher_queries, teacher_keys, teacher_scale, positives, row_partials, col_partials, parts,
    N, M, D, TEACHER_D, stride_q, stride_k, stride_tq, stride_tk,
    tiles_per_group, tiles_per_split, num_groups, num_splits,
    SYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    SLOT_HIGH: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Sums of a group of rows against a split of the columns, column by column of tiles: row_partials
    [5, num_splits, N] and col_partials [5, num_groups, M]; positives [N] takes s[i, i] from the same tile as the sums.
    The sums grow in the partials: this program alone owns its part of them.

    A plain tile, inside the logits and off the diagonal, takes one exponential an entry for each softmax, relative to
    the largest logits m and n so far of the row's slot; the columns' sums stay in registers until the column of tiles
    ends. All other tiles take true maxima of rows and of columns. See mmkernels._tiles.slots.
    """
    group, split, first_row, end_row, first_col, end_col = block_of_tiles(
        tl.program_id(0), N, M, tiles_per_group, tiles_per_split, num_groups, num_splits, BLOCK_M, BLOCK_N
    )
    scale2 = tl.load(scale) * LOG2E
    teacher_scale2 = tl.load(teacher_scale) * LOG2E
    row_out, row_plane, col_out, col_plane = partials_of_block(
        row_partials, col_partials, group, split, N, M, num_groups, num_splits
    )
    parts += tl.program_id(0) * (COLUMN_SUMS * (BLOCK_M // 16) * BLOCK_N)
    height = tl.cdiv(end_row - first_row, BLOCK_M)
    longest = tl.maximum(D, TEACHER_D)
    HALF: tl.constexpr = BLOCK_N // 2
    PART: tl.constexpr = BLOCK_N // 4 if BLOCK_N > 32 else HALF
    for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
        cols = col_start + tl.arange(0, BLOCK_N)
        if SYMMETRIC:
            _clear_sums(col_out + cols, col_plane, cols < M)
        tl.debug_barrier()  # threads read what others of this program wrote to row_partials
        plain = first_bits((end_row - first_row) // BLOCK_M)
        plain &= ~bits_of_overlap(col_start, BLOCK_N, first_row, BLOCK_M)
        if (col_start + BLOCK_N > M) | ~(scale2 >= 0) | ~(teacher_scale2 >= 0):
            plain = 0
        left_out = tl.zeros((BLOCK_M,), tl.int32)  # bit i: the row of tile i
        m = of_slots(tl.full((BLOCK_M,), LOWEST, tl.float32), SLOT_HIGH)
        n = m
        z_left = sum_of_slots(tl.zeros((BLOCK_M, HALF), tl.float32), SLOT_HIGH)
        z_right = z_left
        y_left = z_left
        y_right = z_left
        a_left = z_left
        a_right = z_left
        # FLAT: one loop over tiles and features. The first copies of a tile are on their way during the epilogue of the
        # last.
        next_ones = plain
        ones = plain
        x_offsets = offsets_in_tile(stride_q, BLOCK_M, BLOCK_K)
        y_offsets = offsets_in_tile(stride_k, BLOCK_N, BLOCK_K)
        teacher_x_offsets = offsets_in_tile(stride_tq, BLOCK_M, BLOCK_K)
        teacher_y_offsets = offsets_in_tile(stride_tk, BLOCK_N, BLOCK_K)
        row = first_row
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        teacher_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        start = longest
        for _ in tl.range(0, count_bits(plain) * (tl.cdiv(longest, BLOCK_K) if FLAT else 1), disable_licm=True):
            if FLAT:
                start = tl.where(start + BLOCK_K < longest, start + BLOCK_K, 0)
                if start == 0:
                    row = first_row + lowest_bit(next_ones) * BLOCK_M
                    next_ones &= next_ones - 1
                acc = add_products(
                    acc, queries, keys, row, col_start, stride_q, stride_k, x_offsets, y_offsets, start, D,
                    BLOCK_K, PRECISION,
                )  # fmt: skip
                teacher_acc = add_products(
                    teacher_acc, teacher_queries, teacher_keys, row, col_start, stride_tq, stride_tk,
                    teacher_x_offsets, teacher_y_offsets, start, TEACHER_D, BLOCK_K, PRECISION,
                )  # fmt: skip
            else:
                rows = first_row + lowest_bit(ones) * BLOCK_M + tl.arange(0, BLOCK_M)
                acc = similarities(
                    queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                )  # fmt: skip
                teacher_acc = similarities(
                    teacher_queries, teacher_keys, rows, cols, N, M, TEACHER_D, stride_tq, stride_tk,
                    BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                )  # fmt: skip
            if start + BLOCK_K >= longest:
                index = lowest_bit(ones)
                ones &= ones - 1
                rows = first_row + index * BLOCK_M + tl.arange(0, BLOCK_M)
                peak = scale2 * tl.max(acc, 1)
                teacher_peak = teacher_scale2 * tl.max(teacher_acc, 1)
                if SYMMETRIC:
                    new_m = tl.maximum(m, of_slots(peak, SLOT_HIGH))
                    new_n = tl.maximum(n, of_slots(teacher_peak, SLOT_HIGH))
                    row_m = of_rows(new_m, SLOT_HIGH)
                    row_n = of_rows(new_n, SLOT_HIGH)
                else:
                    new_m = m
                    new_n = n
                    row_m = tl.maximum(peak, LOWEST)
                    row_n = tl.maximum(teacher_peak, LOWEST)
                shift = m - new_m
                shrink = tl.exp2(shift)
                teacher_shrink = tl.exp2(n - new_n)
                m = new_m
                n = new_n
                # The halves of a tile go one after the other, so that they need not share the registers.
                left, right = halves(acc)
                teacher_left, teacher_right = halves(teacher_acc)
                row_z, row_y, row_a, z_left, y_left, a_left = _plain_half(
                    left, teacher_left, scale2, teacher_scale2, row_m, row_n, z_left, y_left, a_left,
                    shift, shrink, teacher_shrink, SYMMETRIC, SLOT_HIGH,
                )  # fmt: skip
                more_z, more_y, more_a, z_right, y_right, a_right = _plain_half(
                    right, teacher_right, scale2, teacher_scale2, row_m, row_n, z_right, y_right, a_right,
                    shift, shrink, teacher_shrink, SYMMETRIC, SLOT_HIGH,
                )  # fmt: skip
                lags = ~((row_m - peak < SPREAD) & (row_n - teacher_peak < SPREAD))  # NaN and infinity, too
                left_out |= lags.to(tl.int32) << index
                old = tl.where(col_start > first_col, rows < N, False)
                old_m, old_z, old_n, old_y, old_a = _load_sums(row_out + rows, row_plane, old)
                row_m, row_z, row_n, row_y, row_a = _join(
                    old_m, old_z, old_n, old_y, old_a,
                    tl.where(lags, LOWEST, row_m), tl.where(lags, 0.0, row_z + more_z),
                    tl.where(lags, LOWEST, row_n), tl.where(lags, 0.0, row_y + more_y),
                    tl.where(lags, 0.0, row_a + more_a),
                )  # fmt: skip
                _store_sums(row_out + rows, row_plane, row_m, row_z, row_n, row_y, row_a, rows < N)
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
                teacher_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        lost = tl.max((left_out != 0).to(tl.int32), 0)
        if SYMMETRIC:
            top = top_of_slots(m, SLOT_HIGH)
            teacher_top = top_of_slots(n, SLOT_HIGH)
            if plain != 0:
                PARTS: tl.constexpr = COLUMN_SUMS * (BLOCK_M // 16) * HALF
                lost |= _flush_half(
                    m, n, z_left, y_left, a_left, top, teacher_top, parts, col_out + col_start, col_plane,
                    BLOCK_M, HALF, SLOT_HIGH,
                )  # fmt: skip
                lost |= _flush_half(
                    m, n, z_right, y_right, a_right, top, teacher_top, parts + PARTS, col_out + col_start + HALF,
                    col_plane, BLOCK_M, HALF, SLOT_HIGH,
                )  # fmt: skip
        # All others, with true maxima; and all of the column, if rows were left out or columns' sums are lost.
        others = first_bits(height) & ~plain
        if lost > 0:
            others = first_bits(height)
            if SYMMETRIC:
                _clear_sums(col_out + cols, col_plane, cols < M)
        if others != 0:
            tl.debug_barrier()  # as above
            for index in tl.range(0, height, disable_licm=True):
                if (others >> index) & 1 > 0:
                    rows = first_row + index * BLOCK_M + tl.arange(0, BLOCK_M)
                    written = tl.where((plain >> index) & 1 == 0, True, (left_out >> index) & 1 > 0) & (rows < N)
                    old = tl.where(col_start > first_col, written, False)
                    old_m, old_z, old_n, old_y, old_a = _load_sums(row_out + rows, row_plane, old)
                    row_m, row_z, row_n, row_y, row_a = _load_sums(row_out + rows, row_plane, rows < 0)
                    # Such tiles are few: parts of their own, though more work, leave the registers to the others.
                    for part in tl.range(col_start, col_start + BLOCK_N, PART, disable_licm=True):
                        part_cols = part + tl.arange(0, PART)
                        s = similarities(
                            queries, keys, rows, part_cols, N, M, D, stride_q, stride_k,
                            BLOCK_M, PART, BLOCK_K, PRECISION,
                        )  # fmt: skip
                        t = similarities(
                            teacher_queries, teacher_keys, rows, part_cols, N, M, TEACHER_D, stride_tq, stride_tk,
                            BLOCK_M, PART, BLOCK_K, PRECISION,
                        )  # fmt: skip
                        row_m, row_z, row_n, row_y, row_a = _exact_part(
                            scale2 * s, teacher_scale2 * t, row_m, row_z, row_n, row_y, row_a, rows, positives,
                            col_out, col_plane, part, N, M, SYMMETRIC, PART,
                        )  # fmt: skip
                    # Every thread has read the old ones: the steps of the product wait for all.
                    row_m, row_z, row_n, row_y, row_a = _join(
                        old_m, old_z, old_n, old_y, old_a, row_m, row_z, row_n, row_y, row_a
                    )  # fmt: skip
                    _store_sums(row_out + rows, row_plane, row_m, row_z, row_n, row_y, row_a, written)


@triton.jit
def _finish(partials, plane, length, count, index, ok, lse, teacher_lse, BLOCK: tl.constexpr):
    """Merge the parts of the rows or columns `index`: the log-sum-exps to memory; m, log2 z and a / y in float64."""
    m, z, n, y, a = _load_sums(partials + index, plane, ok)
    for part in range(1, count):
        at = partials + tl.cast(part, tl.int64) * length + index
        m_part, z_part, n_part, y_part, a_part = _load_sums(at, plane, ok)
        m, z, n, y, a = _join(m, z, n, y, a, m_part, z_part, n_part, y_part, a_part)
    log_z = tl.log2(z.to(tl.float64))
    store_in_two(lse, length, index, m.to(tl.float64) + log_z, ok)
    store_in_two(teacher_lse, length, index, n.to(tl.float64) + tl.log2(y.to(tl.float64)), ok)
    return m.to(tl.float64), log_z, a.to(tl.float64) / y.to(tl.float64)


@triton.jit(do_not_specialize=["N", "M", "num_groups", "num_splits"])
def finish_distillation_kernel(
    row_partials, col_partials, positives, distilled, matched, row_lse, col_lse, teacher_row_lse, teacher_col_lse,
    N, M, num_groups, num_splits, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """distilled_i = log z_i - a_i / y_i, matched_i = (m_i - s_ii) + log z_i; with SYMMETRIC (N = M) the mean with those
    of column i. Stores the log-sum-exps [2, N], [2, M] of both softmaxes in base 2, rounded value and rounding error.

    It computes in float64, as the work is small: a loss near zero at large logits keeps its digits.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = rows < N
    row_plane = tl.cast(num_splits, tl.int64) * N
    positive = tl.load(positives + rows, mask=ok & (rows < M), other=float("nan"))
    m, log_z, mean = _finish(row_partials, row_plane, N, num_splits, rows, ok, row_lse, teacher_row_lse, BLOCK)
    of_teacher = log_z - mean
    of_match = (m - positive) + log_z
    if SYMMETRIC:
        col_plane = tl.cast(num_groups, tl.int64) * M
        m, log_z, mean = _finish(col_partials, col_plane, M, num_groups, rows, ok, col_lse, teacher_col_lse, BLOCK)
        of_teacher = 0.5 * (of_teacher + (log_z - mean))
        of_match = 0.5 * (of_match + ((m - positive) + log_z))
    tl.store(distilled + rows, (of_teacher * LN2).to(tl.float32), mask=ok)
    tl.store(matched + rows, (of_match * LN2).to(tl.float32), mask=ok)
