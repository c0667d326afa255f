"""The kernels of cross-entropies over tiles of logits: InfoNCE, and linear cross-entropy as its rows with a bias."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.engine import (
    add_products,
    all_have_read,
    block_of_tiles,
    clear_columns,
    count_bits,
    entries,
    exp2_of_scores,
    first_bits,
    halves,
    join_columns,
    load_in_two,
    lowest_bit,
    merge,
    offsets_in_tile,
    partials_of_block,
    similarities,
    softmax_grads,
    store_in_strip,
    store_in_two,
    strip_place,
    strip_tile,
    with_bias,
)
from mmkernels._tiles.factors import common_exponent, store_factors
from mmkernels._tiles.slots import LEAST, SPREAD, of_rows, of_slots, sum_of_slots, sum_over_slots, top_of_slots
from mmkernels._tiles.triton import LN2, LOG2E, LOWEST


@triton.jit
def exact_part(
    s, bias, m, z, p, rows, targets, key_groups, positives, col_out, col_plane, col_start, N, M, num_grouped,
    COLUMNS: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Join the columns from col_start on to the rows' (m, z), and the rows to the columns' (m, z) in memory.

    Every m is the true maximum: the loss m - s + log2 z of an entry s that outweighs all others is then as small as
    they are, and not the rounding of 2^(s - m). GROUPS joins the sums p of the positives' logits, too; `targets` then
    are the rows' groups.
    """
    cols = col_start + tl.arange(0, WIDTH)
    row_ok = rows < N
    col_ok = cols < M
    s = with_bias(s, bias, cols, M, BIAS)
    s = tl.where(row_ok[:, None] & col_ok[None, :], s, float("-inf"))
    target = tl.load(targets + rows, mask=row_ok, other=-1).to(tl.int32)
    if GROUPS:
        same = _same_group(target, key_groups, cols, num_grouped)
        of_group = tl.where(same, s, 0.0)
        p += tl.sum(of_group, 1)
        if COLUMNS:
            # One plane of a pair is used, for the reason given in join_columns.
            col_p = tl.sum(of_group, 0)
            at_p = col_out + 2 * col_plane + cols[:, None] + tl.arange(0, 2)[None, :]  # [BN, 2]
            one = col_ok[:, None] & (tl.arange(0, 2)[None, :] == 0)
            old_p = tl.load(at_p, mask=one, other=0.0)
            all_have_read()
            tl.store(at_p, tl.join(col_p, col_p) + old_p, mask=one)
    else:
        here = (target >= col_start) & (target < col_start + WIDTH)
        positive = tl.sum(tl.where(cols[None, :] == target[:, None], s, 0.0), 1)
        tl.store(positives + rows, positive, mask=here)
    row_m = tl.maximum(tl.max(s, 1), LOWEST)
    m, z = merge(m, z, row_m, tl.sum(tl.exp2(s - row_m[:, None]), 1))
    if COLUMNS:
        col_m = tl.maximum(tl.max(s, 0), LOWEST)
        col_z = tl.sum(tl.exp2(s - col_m[None, :]), 0)
        join_columns(col_out, col_plane, cols, col_ok, col_m, col_z)
    return m, z, p


@triton.jit
def _exact_tile(
    s, bias, m, z, p, rows, targets, key_groups, positives, col_out, col_plane, col_start, N, M, num_grouped,
    COLUMNS: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """exact_part for parts of the tile, one after the other, so that they need not share the registers: halves, and
    quarters with GROUPS, whose sums take more."""
    HALF: tl.constexpr = BLOCK_N // 2
    left, right = halves(s)
    for half in tl.static_range(2):
        part = left if half == 0 else right
        start = col_start + half * HALF
        if GROUPS:
            first, second = halves(part)
            m, z, p = exact_part(
                first, bias, m, z, p, rows, targets, key_groups, positives, col_out, col_plane, start,
                N, M, num_grouped, COLUMNS, BIAS, GROUPS, HALF // 2,
            )  # fmt: skip
            m, z, p = exact_part(
                second, bias, m, z, p, rows, targets, key_groups, positives, col_out, col_plane, start + HALF // 2,
                N, M, num_grouped, COLUMNS, BIAS, GROUPS, HALF // 2,
            )  # fmt: skip
        else:
            m, z, p = exact_part(
                part, bias, m, z, p, rows, targets, key_groups, positives, col_out, col_plane, start,
                N, M, num_grouped, COLUMNS, BIAS, GROUPS, HALF,
            )  # fmt: skip
    return m, z, p


@triton.jit
def _tiles_with_positives(
    targets, first_row, height, col_start, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Bit i: tile i below first_row has a row whose target is one of the columns from col_start on."""
    bits = tl.zeros((BLOCK_M,), tl.int32)
    for index in range(height):
        rows = first_row + index * BLOCK_M + tl.arange(0, BLOCK_M)
        target = tl.load(targets + rows, mask=rows < N, other=-1).to(tl.int32)
        bits |= ((target >= col_start) & (target < col_start + BLOCK_N)).to(tl.int32) << index
    return tl.reduce(bits, 0, _either)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def _flush(
    sums, m, left_out, parts, col_out, col_plane, cols,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SLOT_HIGH: tl.constexpr,
):  # fmt: skip
    """Join the columns' sums of 2^(s - m), one for each slot, to those in memory. Returns 1 if one of them is too small
    for that, or if a row was left out."""
    lost = tl.max((left_out != 0).to(tl.int32), 0)
    top = top_of_slots(m, SLOT_HIGH)
    if top > LOWEST:
        z = sum_over_slots(sums * tl.expand_dims(tl.exp2(m - top), -1), parts, BLOCK_M, BLOCK_N, SLOT_HIGH)
        old_m = tl.load(col_out + cols)
        new_m, new_z = merge(old_m, tl.load(col_out + col_plane + cols), tl.zeros_like(z) + top, z)
        all_have_read()
        tl.store(col_out + cols, new_m)
        tl.store(col_out + col_plane + cols, new_z)
        lost |= tl.max((~(z > LEAST)).to(tl.int32), 0)  # NaN: 1
    return lost


@triton.jit
def _same_group(row_group, key_groups, cols, num_grouped):
    """Which entries of a tile are of one group, [BM, BN]; keys from num_grouped on are of none."""
    col_group = tl.load(key_groups + cols, mask=cols < num_grouped, other=-2)
    return row_group[:, None] == col_group[None, :]


@triton.jit(
    do_not_specialize=["N", "M", "num_grouped", "tiles_per_group", "tiles_per_split", "num_groups", "num_splits"]
)
def forward_kernel(
    queries, keys, scale, bias, targets, key_groups, positives, row_partials, col_partials, parts,
    N, M, num_grouped, D, stride_q, stride_k, tiles_per_group, tiles_per_split, num_groups, num_splits,
    SYMMETRIC: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    SLOT_HIGH: tl.constexpr, FLAT: tl.constexpr,
):  # fmt: skip
    """Statistics of a group of rows against a split of the columns, column by column of tiles.

    row_partials [2, num_splits, N] and col_partials [2, num_groups, M] take (m, z), z = sum of 2^(s - m); positives [N]
    takes s[i, targets[i]], from the same tile as the statistics; a target of -1 is none. The statistics grow in the
    partials: this program alone owns its part of them.

    A plain tile, inside the logits and without a positive, takes one exponential an entry for its row and its column,
    relative to the largest logit m so far of its slot: rows of all tiles of the column that lie in one thread. These
    are rows i and i + 8 of the 16 of a warp, in SLOT_HIGH parts of the tile; SLOT_HIGH = 0: row i alone. The columns'
    sums stay in registers until _flush, rescaled as m grows. All other tiles take true maxima of rows and of columns.
    For rows alone, all tiles take true maxima.

    With GROUPS the positives of a row are the columns of its group, `targets` [N] against key_groups [num_grouped], and
    both partials have a third plane in place of positives: the sum of the positives' logits.
    """
    group, split, first_row, end_row, first_col, end_col = block_of_tiles(
        tl.program_id(0), N, M, tiles_per_group, tiles_per_split, num_groups, num_splits, BLOCK_M, BLOCK_N
    )
    scale2 = tl.load(scale) * LOG2E
    row_out, row_plane, col_out, col_plane = partials_of_block(
        row_partials, col_partials, group, split, N, M, num_groups, num_splits
    )
    parts += tl.program_id(0) * (BLOCK_M // 16 * BLOCK_N)
    height = tl.cdiv(end_row - first_row, BLOCK_M)
    RUNNING: tl.constexpr = SYMMETRIC and not GROUPS  # the columns' sums, in registers
    for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
        cols = col_start + tl.arange(0, BLOCK_N)
        if SYMMETRIC:
            clear_columns(col_out, col_plane, cols, cols < M, GROUPS)
        tl.debug_barrier()  # threads read what others of this program wrote to row_partials
        plain = 0  # bit i: tile i below first_row
        again = 0
        left_out = tl.zeros((BLOCK_M,), tl.int32)  # bit i: the row of tile i
        if not GROUPS:
            positives_in = _tiles_with_positives(targets, first_row, height, col_start, N, BLOCK_M, BLOCK_N)
            if col_start + BLOCK_N <= M:
                plain = first_bits((end_row - first_row) // BLOCK_M)
            if SYMMETRIC:
                plain = tl.where(scale2 >= 0, plain & ~positives_in, 0)
            m = of_slots(tl.full((BLOCK_M,), LOWEST, tl.float32), SLOT_HIGH)
            sums = sum_of_slots(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), SLOT_HIGH)
            # FLAT: one loop over tiles and features. The first copies of a tile are on their way during the epilogue of
            # the last.
            next_ones = plain
            ones = plain
            x_offsets = offsets_in_tile(stride_q, BLOCK_M, BLOCK_K)
            y_offsets = offsets_in_tile(stride_k, BLOCK_N, BLOCK_K)
            row = first_row
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            start = D
            for _ in tl.range(0, count_bits(plain) * (tl.cdiv(D, BLOCK_K) if FLAT else 1), disable_licm=True):
                if FLAT:
                    start = tl.where(start + BLOCK_K < D, start + BLOCK_K, 0)
                    if start == 0:
                        row = first_row + lowest_bit(next_ones) * BLOCK_M
                        next_ones &= next_ones - 1
                    acc = add_products(
                        acc, queries, keys, row, col_start, stride_q, stride_k, x_offsets, y_offsets, start, D,
                        BLOCK_K, PRECISION,
                    )  # fmt: skip
                else:
                    rows = first_row + lowest_bit(ones) * BLOCK_M + tl.arange(0, BLOCK_M)
                    acc = similarities(
                        queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                    )  # fmt: skip
                if start + BLOCK_K >= D:
                    index = lowest_bit(ones)
                    ones &= ones - 1
                    rows = first_row + index * BLOCK_M + tl.arange(0, BLOCK_M)
                    old = tl.where(col_start > first_col, rows < N, False)
                    old_m = tl.load(row_out + rows, mask=old, other=LOWEST)
                    old_z = tl.load(row_out + row_plane + rows, mask=old, other=0.0)
                    if SYMMETRIC:
                        peak = scale2 * tl.max(acc, 1)
                        new_m = tl.maximum(m, of_slots(peak, SLOT_HIGH))
                        row_m = of_rows(new_m, SLOT_HIGH)
                        e = exp2_of_scores(acc, scale2, row_m[:, None], queries.dtype.element_ty == tl.float32)
                        row_z = tl.sum(e, 1)
                        shrink = tl.exp2(m - new_m)
                        added = sum_of_slots(e, SLOT_HIGH)
                        sums = tl.fma(sums, tl.zeros_like(sums) + tl.expand_dims(shrink, -1), added)
                        m = new_m
                        lags = ~(row_m - peak < SPREAD)  # NaN and infinity, too
                        left_out |= lags.to(tl.int32) << index
                        row_m = tl.where(lags, LOWEST, row_m)
                        row_z = tl.where(lags, 0.0, row_z)
                    else:
                        s = with_bias(scale2 * acc, bias, cols, M, BIAS)
                        row_m = tl.maximum(tl.max(s, 1), LOWEST)
                        row_z = tl.sum(tl.exp2(s - row_m[:, None]), 1)
                        if (positives_in >> index) & 1 > 0:
                            in_tile = tl.load(targets + rows).to(tl.int32) - col_start
                            here = (in_tile >= 0) & (in_tile < BLOCK_N)
                            tl.store(positives + rows, entries(s, in_tile), mask=here)
                    row_m, row_z = merge(old_m, old_z, row_m, row_z)
                    tl.store(row_out + rows, row_m)
                    tl.store(row_out + row_plane + rows, row_z)
                    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            if SYMMETRIC:
                again = _flush(sums, m, left_out, parts, col_out, col_plane, cols, BLOCK_M, BLOCK_N, SLOT_HIGH)
        # All others, with true maxima; and all of the column, if rows were left out or columns' sums are lost.
        others = first_bits(height) & ~plain
        if again > 0:
            others = first_bits(height)
            clear_columns(col_out, col_plane, cols, cols < M, GROUPS)
        if others != 0:
            tl.debug_barrier()  # as above
            for index in tl.range(0, height, disable_licm=True):
                if (others >> index) & 1 > 0:
                    rows = first_row + index * BLOCK_M + tl.arange(0, BLOCK_M)
                    written = rows < N
                    if RUNNING:
                        written = tl.where(((plain >> index) & 1 == 0) | ((left_out >> index) & 1 > 0), written, False)
                    old = tl.where(col_start > first_col, written, False)
                    old_m = tl.load(row_out + rows, mask=old, other=LOWEST)
                    old_z = tl.load(row_out + row_plane + rows, mask=old, other=0.0)
                    row_m = tl.full((BLOCK_M,), LOWEST, tl.float32)
                    row_z = tl.zeros((BLOCK_M,), tl.float32)
                    p = tl.zeros((BLOCK_M,), tl.float32)
                    if GROUPS or not FLAT:
                        tile = similarities(
                            queries, keys, rows, cols, N, M, D, stride_q, stride_k,
                            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                        )  # fmt: skip
                        row_m, row_z, p = _exact_tile(
                            scale2 * tile, bias, row_m, row_z, p, rows, targets, key_groups, positives, col_out,
                            col_plane, col_start, N, M, num_grouped, SYMMETRIC, BIAS, GROUPS, BLOCK_N,
                        )  # fmt: skip
                    else:
                        # Such tiles are few: parts of their own, though more work, leave the registers to the others.
                        PART: tl.constexpr = BLOCK_N // 4 if BLOCK_N > 32 else BLOCK_N // 2
                        for part in tl.range(col_start, col_start + BLOCK_N, PART, disable_licm=True):
                            tile = similarities(
                                queries, keys, rows, part + tl.arange(0, PART), N, M, D, stride_q, stride_k,
                                BLOCK_M, PART, BLOCK_K, PRECISION,
                            )  # fmt: skip
                            row_m, row_z, p = exact_part(
                                scale2 * tile, bias, row_m, row_z, p, rows, targets, key_groups, positives, col_out,
                                col_plane, part, N, M, num_grouped, SYMMETRIC, BIAS, GROUPS, PART,
                            )  # fmt: skip
                    # Every thread has read the old ones: the steps of the product wait for all.
                    row_m, row_z = merge(old_m, old_z, row_m, row_z)
                    tl.store(row_out + rows, row_m, mask=written)
                    tl.store(row_out + row_plane + rows, row_z, mask=written)
                    if GROUPS:
                        p += tl.load(row_out + 2 * row_plane + rows, mask=old, other=0.0)
                        tl.store(row_out + 2 * row_plane + rows, p, mask=written)


@triton.jit
def _merge_partials(partials, plane, length, count, index, ok, BLOCK: tl.constexpr):
    """m and log2 z of the entries `index` over `count` partial statistics, in float64."""
    m = tl.full((BLOCK,), LOWEST, tl.float32)
    z = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        at = partials + tl.cast(part, tl.int64) * length + index
        m, z = merge(m, z, tl.load(at, mask=ok, other=LOWEST), tl.load(at + plane, mask=ok, other=0.0))
    return m.to(tl.float64), tl.log2(z.to(tl.float64))


@triton.jit
def _mean_positive(sums, length, count, index, ok, positives, BLOCK: tl.constexpr):
    """The mean logit of the positives of the entries `index`, of sums in `count` parts, in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for part in range(count):
        total += tl.load(sums + tl.cast(part, tl.int64) * length + index, mask=ok, other=0.0).to(tl.float64)
    return total / tl.load(positives + index, mask=ok, other=1).to(tl.float64)


@triton.jit
def _product_with(vector, x, rows, ok, stride_x, D, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """<x_row, vector>, [BLOCK]."""
    k = tl.arange(0, STEP)
    x_rows = x + rows.to(tl.int64)[:, None] * stride_x
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, D, STEP):
        inside = start + k < D
        x_tile = tl.load(x_rows + (start + k)[None, :], mask=ok[:, None] & inside[None, :], other=0.0)
        total += tl.sum(x_tile.to(tl.float32) * tl.load(vector + start + k, mask=inside, other=0.0)[None, :], 1)
    return total


@triton.jit(do_not_specialize=["N", "M", "num_groups", "num_splits", "label_smoothing"])
def finish_forward_kernel(
    row_partials, col_partials, positives, targets, of_query, of_key, losses, row_lse, col_lse,
    queries, keys, query_sum, key_sum, bias_sum, scale,
    N, M, D, stride_q, stride_k, num_groups, num_splits, label_smoothing,
    SYMMETRIC: tl.constexpr, SMOOTHED: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr,
    STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses_i = a ((m_i - p_i) + log z_i + eps (p_i - mean_j s_ij)), likewise for column t_i; and the log-sum-exps.

    row_lse [2, N] and col_lse [2, M], in base 2, are a rounded value and its rounding error.
    It computes in float64, as the work is small: a loss near zero at large logits keeps its digits.
    With GROUPS p is the mean over the positives, of_query [N] and of_key [M] in number.
    mean_j s_ij = (scale <q_i, sum of the keys> + sum of the bias) / M needs no tile of logits.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(N, BLOCK)
    row_plane = tl.cast(num_splits, tl.int64) * N
    col_plane = tl.cast(num_groups, tl.int64) * M
    if program < row_blocks:
        rows = program * BLOCK + tl.arange(0, BLOCK)
        ok = rows < N
        m, log_z = _merge_partials(row_partials, row_plane, N, num_splits, rows, ok, BLOCK)
        store_in_two(row_lse, N, rows, m + log_z, ok)
        if GROUPS:
            positive = _mean_positive(row_partials + 2 * row_plane, N, num_splits, rows, ok, of_query, BLOCK)
        else:
            positive = tl.load(positives + rows, mask=ok, other=0.0)
        loss = (m - positive) + log_z
        scale2 = tl.load(scale) * LOG2E
        if SMOOTHED:
            total = scale2 * _product_with(key_sum, queries, rows, ok, stride_q, D, BLOCK, STEP)
            if BIAS:
                total += tl.load(bias_sum) * LOG2E
            mean = total / M
            loss += label_smoothing * (positive - mean)
        if SYMMETRIC:
            target = tl.load(targets + rows, mask=ok, other=0)
            legal = ok & (target >= 0) & (target < M)
            m, log_z = _merge_partials(col_partials, col_plane, M, num_groups, target, legal, BLOCK)
            if GROUPS:
                positive = _mean_positive(col_partials + 2 * col_plane, M, num_groups, target, legal, of_key, BLOCK)
            loss += (m - positive) + log_z
            if SMOOTHED:
                mean = scale2 * _product_with(query_sum, keys, target, legal, stride_k, D, BLOCK, STEP) / N
                loss += label_smoothing * (positive - mean)
            loss *= 0.5
        tl.store(losses + rows, (loss * LN2).to(tl.float32), mask=ok)
    elif SYMMETRIC:
        cols = (program - row_blocks) * BLOCK + tl.arange(0, BLOCK)
        ok = cols < M
        m, log_z = _merge_partials(col_partials, col_plane, M, num_groups, cols, ok, BLOCK)
        store_in_two(col_lse, M, cols, m + log_z, ok)


@triton.jit(do_not_specialize=["N", "M"])
def column_weights_kernel(targets, row_weights, col_weights, N, M, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """w_j = sum of row_weights[i] over the queries i whose target is j, in the order of i."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, N, STEP):
        rows = start + tl.arange(0, STEP)
        target = tl.load(targets + rows, mask=rows < N, other=-1).to(tl.int32)
        value = tl.load(row_weights + rows, mask=rows < N, other=0.0)
        weight += tl.sum(tl.where(target[:, None] == cols[None, :], value[:, None], 0.0), 0)
    tl.store(col_weights + cols, weight, mask=cols < M)


@triton.jit(do_not_specialize=["N", "M"])
def softmax_factors_kernel(
    targets, row_lse, col_lse, row_weights, col_weights, row_factors, col_factors, row_bounds, col_bounds,
    positives_in, N, M, SYMMETRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """u_i 2^(c - lse_i) for the rows, w_j 2^(c - lse_j) for the columns, c = _middle of their block of rows or columns.

    row_bounds [2, blocks of rows] and col_bounds [2, blocks of columns] take the lowest and highest log-sum-exp of each
    block; positives_in [blocks of rows, blocks of columns / 32] a bit for each tile in which a row has its target.
    """
    program = tl.program_id(0)
    row_blocks = tl.cdiv(N, BLOCK_M)
    col_blocks = tl.cdiv(M, BLOCK_N)
    if program < row_blocks:
        rows = program * BLOCK_M + tl.arange(0, BLOCK_M)
        store_factors(row_lse, row_weights, row_factors, row_bounds, N, rows, program, row_blocks)
        target = tl.load(targets + rows, mask=rows < N, other=-1).to(tl.int32)
        block = tl.where(target < 0, -1, target // BLOCK_N)
        words = tl.cdiv(col_blocks, 32)
        for word in range(words):
            bits = tl.where(block >> 5 == word, 1 << (block & 31), 0)
            tl.store(positives_in + program * words + word, tl.reduce(bits, 0, _either))
    elif SYMMETRIC:
        col_block = program - row_blocks
        cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
        store_factors(col_lse, col_weights, col_factors, col_bounds, M, cols, col_block, col_blocks)


@triton.jit
def store_grad(
    s, bias, targets, key_groups, row_lse, col_lse, row_weights, col_weights, row_shares, col_shares, strip,
    first_row, first_col, row_in_strip, col_in_strip, width, N, M, num_grouped, label_smoothing,
    SYMMETRIC: tl.constexpr, SMOOTHED: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dS of a tile of logits into the strip that begins at first_row, first_col of the logits."""
    in_rows, in_cols, rows, cols, row_ok, col_ok = strip_tile(
        first_row, first_col, row_in_strip, col_in_strip, N, M, BLOCK_M, BLOCK_N
    )
    s = with_bias(s, bias, cols, M, BIAS)

    weight = tl.load(row_weights + rows, mask=row_ok, other=0.0)
    other_weight = tl.load(col_weights + cols, mask=col_ok, other=0.0) if SYMMETRIC else weight
    target = tl.load(targets + rows, mask=row_ok, other=-1).to(tl.int32)
    if GROUPS:
        matches: tl.constexpr = 1  # anywhere
    else:
        here = (target >= first_col + col_in_strip) & (target < first_col + col_in_strip + BLOCK_N)
        matches = tl.max(here.to(tl.int32), 0)
    grad = softmax_grads(
        s, rows, cols, row_lse, col_lse, weight, other_weight, N, M, row_ok, col_ok, matches, SYMMETRIC
    )  # fmt: skip
    if SMOOTHED:
        grad -= (weight * (label_smoothing / M))[:, None]
        if SYMMETRIC:
            grad -= (other_weight * (label_smoothing / N))[None, :]
    if matches > 0:
        if GROUPS:
            share = tl.load(row_shares + rows, mask=row_ok, other=0.0)[:, None]
            if SYMMETRIC:
                share += tl.load(col_shares + cols, mask=col_ok, other=0.0)[None, :]
            grad -= tl.where(_same_group(target, key_groups, cols, num_grouped), share, 0.0)
        else:
            directions: tl.constexpr = 2.0 if SYMMETRIC else 1.0
            of_target = weight * ((1.0 - label_smoothing) * directions)
            grad -= tl.where(cols[None, :] == target[:, None], of_target[:, None], 0.0)

    inside = row_ok[:, None] & col_ok[None, :]
    store_in_strip(strip, grad, in_rows, in_cols, inside, width)


@triton.jit(do_not_specialize=["first_row", "first_col", "N", "M", "num_grouped", "label_smoothing"])
def grad_logits_kernel(
    queries, keys, scale, bias, targets, key_groups, row_lse, col_lse, row_weights, col_weights,
    row_shares, col_shares, row_factors, col_factors, row_bounds, col_bounds, positives_in, strip,
    first_row, first_col, height, width, N, M, num_grouped, D, stride_q, stride_k, label_smoothing,
    SYMMETRIC: tl.constexpr, SMOOTHED: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """strip [height, width] = the part of dS that begins at first_row, first_col. Zero past the ends of dS.

    dS_ij = u_i e^(s_ij - lse_i) + w_j e^(s_ij - lse_j) - 2 (1 - eps) u_i [j = t_i] - eps u_i / M - eps w_j / N
    u, w: row_weights, col_weights, the gradients of the cross-entropies of rows and columns. Without SYMMETRIC there is
    no w, and 1 in place of 2. With GROUPS (`targets` are the rows' groups) the third term is -(row_shares_i +
    col_shares_j) at every pair of one group. All terms meet in float32, and dS is rounded once. The tile of logits is
    computed as in the forward pass for both sides: its bits are those that gave the log-sum-exps.

    A plain tile, inside dS, without a positive and with log-sum-exps near each other, takes one exponential an entry
    for both softmaxes: 2^(s - c) (u_i 2^(c - lse_i) + w_j 2^(c - lse_j)), of the factors and bounds that
    softmax_factors_kernel has stored.
    """
    scale2 = tl.load(scale) * LOG2E
    tiles = height // BLOCK_M * (width // BLOCK_N)
    if GROUPS:  # whose positives are anywhere
        row_in_strip, col_in_strip = strip_place(tl.program_id(0), height, width, BLOCK_M, BLOCK_N)
        tile = similarities(
            queries, keys, first_row + row_in_strip + tl.arange(0, BLOCK_M),
            first_col + col_in_strip + tl.arange(0, BLOCK_N), N, M, D, stride_q, stride_k,
            BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        HALF: tl.constexpr = BLOCK_N // 2
        left, right = halves(scale2 * tile)
        for half in tl.static_range(2):
            store_grad(
                left if half == 0 else right, bias, targets, key_groups, row_lse, col_lse, row_weights, col_weights,
                row_shares, col_shares, strip, first_row, first_col, row_in_strip, col_in_strip + half * HALF, width,
                N, M, num_grouped, label_smoothing, SYMMETRIC, SMOOTHED, BIAS, GROUPS, BLOCK_M, HALF,
            )  # fmt: skip
    else:
        # FLAT: one loop over tiles and features. The first copies of a tile are on their way during the epilogue of the
        # last. It takes the tiles inside the logits.
        row_tiles = tl.minimum(height, tl.maximum(N - first_row, 0)) // BLOCK_M
        col_tiles = tl.minimum(width, tl.maximum(M - first_col, 0)) // BLOCK_N
        inside = row_tiles * col_tiles
        program = tl.program_id(0)
        programs = tl.num_programs(0)
        left_out = inside < tiles
        index = program - programs
        row = first_row
        col = first_col
        # Of the tile whose products are summed, while the copies are those of the next.
        done = program
        done_row, done_col = strip_place(done, row_tiles * BLOCK_M, col_tiles * BLOCK_N, BLOCK_M, BLOCK_N)
        near, c, shift = common_exponent(
            row_bounds, col_bounds, first_row + done_row, first_col + done_col, N, M, SYMMETRIC, BLOCK_M, BLOCK_N
        )
        x_offsets = offsets_in_tile(stride_q, BLOCK_M, BLOCK_K)
        y_offsets = offsets_in_tile(stride_k, BLOCK_N, BLOCK_K)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        start = D
        mine = tl.cdiv(tl.maximum(inside - program, 0), programs)
        for _ in tl.range(0, mine * (tl.cdiv(D, BLOCK_K) if FLAT else 1), disable_licm=True):
            if FLAT:
                start = tl.where(start + BLOCK_K < D, start + BLOCK_K, 0)
                if start == 0:
                    index += programs
                    row, col = strip_place(index, row_tiles * BLOCK_M, col_tiles * BLOCK_N, BLOCK_M, BLOCK_N)
                acc = add_products(
                    acc, queries, keys, first_row + row, first_col + col, stride_q, stride_k, x_offsets, y_offsets,
                    start, D, BLOCK_K, PRECISION,
                )  # fmt: skip
            else:
                acc = similarities(
                    queries, keys, first_row + done_row + tl.arange(0, BLOCK_M),
                    first_col + done_col + tl.arange(0, BLOCK_N), N, M, D, stride_q, stride_k,
                    BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                )  # fmt: skip
            if start + BLOCK_K >= D:
                # The wait for the products, which all warps must come to, stands where these are first used.
                left, right = halves(acc)
                first, second = halves(left)
                third, fourth = halves(right)
                WIDTH: tl.constexpr = BLOCK_N // 4
                if near:
                    rows = first_row + done_row + tl.arange(0, BLOCK_M)
                    factor = tl.load(row_factors + rows)
                    if SYMMETRIC:
                        factor *= tl.exp2(shift)
                    has_positive = _has_positive(
                        positives_in, first_row + done_row, first_col + done_col, M, BLOCK_M, BLOCK_N
                    )
                    of_positive = factor
                    target = rows
                    if has_positive:
                        target = tl.load(targets + rows).to(tl.int32)
                        in_tile = target - (first_col + done_col)
                        s = entries(first, in_tile)
                        s += entries(second, in_tile - WIDTH)
                        s += entries(third, in_tile - 2 * WIDTH)
                        s += entries(fourth, in_tile - 3 * WIDTH)
                        of_positive = _grad_of_positive(
                            scale2 * s, rows, target, (in_tile >= 0) & (in_tile < BLOCK_N), bias, row_lse, col_lse,
                            row_weights, col_weights, N, M, label_smoothing, SYMMETRIC, SMOOTHED, BIAS,
                        )  # fmt: skip
                    # The quarters of a tile go one after the other, so that they need not share the registers.
                    for quarter in tl.static_range(4):
                        if quarter < 2:
                            part = first if quarter == 0 else second
                        else:
                            part = third if quarter == 2 else fourth
                        _store_near(
                            part, scale2, c, factor, has_positive, target, of_positive, bias,
                            row_weights, col_weights, col_factors, strip, rows, first_col, done_row,
                            done_col + quarter * WIDTH, width, N, M, label_smoothing, SYMMETRIC, SMOOTHED, BIAS,
                            BLOCK_M, WIDTH,
                        )  # fmt: skip
                left_out |= ~near
                done += programs
                done_row, done_col = strip_place(done, row_tiles * BLOCK_M, col_tiles * BLOCK_N, BLOCK_M, BLOCK_N)
                near, c, shift = common_exponent(
                    row_bounds, col_bounds, first_row + done_row, first_col + done_col, N, M, SYMMETRIC,
                    BLOCK_M, BLOCK_N,
                )  # fmt: skip
                acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if left_out:
            # Such tiles are few: parts of their own, though more work, leave the registers to the others.
            PART: tl.constexpr = BLOCK_N // 4 if BLOCK_N > 32 else BLOCK_N // 2
            for step in tl.range(0, tl.cdiv(tl.maximum(tiles - program, 0), programs), disable_licm=True):
                row, col = strip_place(program + step * programs, height, width, BLOCK_M, BLOCK_N)
                near, c, shift = common_exponent(
                    row_bounds, col_bounds, first_row + row, first_col + col, N, M, SYMMETRIC, BLOCK_M, BLOCK_N
                )
                near &= (first_row + row + BLOCK_M <= N) & (first_col + col + BLOCK_N <= M)
                if not near:
                    rows = first_row + row + tl.arange(0, BLOCK_M)
                    for start in tl.range(0, BLOCK_N, PART, disable_licm=True):
                        cols = first_col + col + start + tl.arange(0, PART)
                        tile = similarities(
                            queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, PART, BLOCK_K, PRECISION,
                        )  # fmt: skip
                        store_grad(
                            scale2 * tile, bias, targets, key_groups, row_lse, col_lse, row_weights, col_weights,
                            row_shares, col_shares, strip, first_row, first_col, row, col + start,
                            width, N, M, num_grouped, label_smoothing, SYMMETRIC, SMOOTHED, BIAS, GROUPS, BLOCK_M, PART,
                        )  # fmt: skip


@triton.jit
def _store_near(
    s, scale2, c, factor, has_positive, target, of_positive, bias, row_weights, col_weights, col_factors, strip,
    rows, first_col, row_in_strip, col_in_strip, width, N, M, label_smoothing,
    SYMMETRIC: tl.constexpr, SMOOTHED: tl.constexpr, BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dS of a tile inside the logits whose log-sum-exps lie near each other, of its products s, into the strip; and
    of_positive where its rows have their targets."""
    in_cols = col_in_strip + tl.arange(0, BLOCK_N)
    cols = first_col + in_cols
    if BIAS:
        e = tl.exp2(with_bias(scale2 * s, bias, cols, M, BIAS) - c)
    else:
        e = exp2_of_scores(s, scale2, c, strip.dtype.element_ty == tl.float32)
    if SYMMETRIC:
        grad = e * (factor[:, None] + tl.load(col_factors + cols)[None, :])
    else:
        grad = e * factor[:, None]
    if SMOOTHED:
        grad -= (tl.load(row_weights + rows) * (label_smoothing / M))[:, None]
        if SYMMETRIC:
            grad -= (tl.load(col_weights + cols) * (label_smoothing / N))[None, :]
    if has_positive:
        grad = tl.where(cols[None, :] == target[:, None], of_positive[:, None], grad)
    in_rows = row_in_strip + tl.arange(0, BLOCK_M)
    out = strip + in_rows.to(tl.int64)[:, None] * width + in_cols[None, :]
    tl.store(out, grad.to(strip.dtype.element_ty))


@triton.jit
def _grad_of_positive(
    s, rows, target, here, bias, row_lse, col_lse, row_weights, col_weights, N, M, label_smoothing,
    SYMMETRIC: tl.constexpr, SMOOTHED: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """dS of the entries (i, target of i) of logits s, [BM], where they are `here`: each exponential apart, so that u_i
    and w_j can be subtracted without a loss."""
    if BIAS:
        s += tl.load(bias + target, mask=here, other=0.0) * LOG2E
    weight = tl.load(row_weights + rows)
    lse, rest = load_in_two(row_lse, N, rows, here)
    grad = weight * tl.exp2((s - lse) - rest)
    directions: tl.constexpr = 2.0 if SYMMETRIC else 1.0
    if SYMMETRIC:
        other_weight = tl.load(col_weights + target, mask=here, other=0.0)
        lse, rest = load_in_two(col_lse, M, target, here)
        grad += other_weight * tl.exp2((s - lse) - rest)
    if SMOOTHED:
        grad -= weight * (label_smoothing / M)
        if SYMMETRIC:
            grad -= other_weight * (label_smoothing / N)
    return grad - weight * ((1.0 - label_smoothing) * directions)


@triton.jit
def _has_positive(positives_in, first_row, first_col, M, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Whether a row of a tile has its target there."""
    words = tl.cdiv(tl.cdiv(M, BLOCK_N), 32)
    col_block = first_col // BLOCK_N
    bits = tl.load(positives_in + first_row // BLOCK_M * words + (col_block >> 5))
    return (bits >> (col_block & 31)) & 1 > 0
