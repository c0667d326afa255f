"""The kernels of cross-entropies over tiles of logits: InfoNCE, and linear cross-entropy as its rows with a bias."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.engine import (
    all_have_read,
    block_of_tiles,
    halves,
    merge,
    partials_of_block,
    similarities,
    softmax_grads,
    store_in_strip,
    store_in_two,
    strip_place,
    strip_tile,
    tile_statistics,
    with_bias,
)
from mmkernels._tiles.triton import LN2, LOG2E, LOWEST


@triton.jit
def _add_to_statistics(
    s, bias, m, z, p, rows, target, key_groups, positives, col_out, col_plane, col_start, N, M, num_grouped, first,
    SYMMETRIC: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Join the columns from col_start on to the rows' (m, z), and the rows to the columns' (m, z) in memory.

    `first`: there is nothing in memory yet. GROUPS joins the sums p of the positives' logits, too; `target` then holds
    the rows' groups.
    """
    cols = col_start + tl.arange(0, WIDTH)
    row_ok = rows < N
    col_ok = cols < M
    s = with_bias(s, bias, cols, M, BIAS)
    s = tl.where(row_ok[:, None] & col_ok[None, :], s, float("-inf"))
    if GROUPS:
        same = _same_group(target, key_groups, cols, num_grouped)
        matches = tl.max(tl.max(same.to(tl.int32), 1), 0)
        of_group = tl.where(same, s, 0.0)
        p += tl.sum(of_group, 1)
        if SYMMETRIC:
            # One plane of a pair is used, for the reason given at the pairs below.
            col_p = tl.sum(of_group, 0)
            one = tl.arange(0, 2)[None, :] == 0
            at_p = col_out + 2 * col_plane + cols[:, None] + tl.arange(0, 2)[None, :]  # [BN, 2]
            old_p = tl.load(at_p, mask=(cols < tl.where(first, 0, M))[:, None] & one, other=0.0)
            all_have_read()
            tl.store(at_p, tl.join(col_p, col_p) + old_p, mask=col_ok[:, None] & one)
    else:
        here = (target >= col_start) & (target < col_start + WIDTH)
        matches = tl.max(here.to(tl.int32), 0)
        if matches > 0:
            positive = tl.sum(tl.where(cols[None, :] == target[:, None], s, 0.0), 1)
            tl.store(positives + rows, positive, mask=here)

    row_m, row_z, tile_m, tile_z = tile_statistics(s, row_ok, col_ok, matches, SYMMETRIC)
    m, z = merge(m, z, row_m, row_z)
    if SYMMETRIC:
        old = cols < tl.where(first, 0, M)
        # Both statistics lie in one tile, which the compiler spreads over the threads: each alone would be held by all.
        pair = tl.arange(0, 2)
        at = col_out + cols[:, None] + pair[None, :] * col_plane  # [BN, 2]
        none = tl.where(pair == 0, LOWEST, 0.0)
        col_m, col_z = tl.split(tl.load(at, mask=old[:, None], other=none[None, :]))
        col_m, col_z = merge(col_m, col_z, tile_m, tile_z)
        all_have_read()
        tl.store(at, tl.join(col_m, col_z), mask=col_ok[:, None])
    return m, z, p


@triton.jit
def _add_half(
    s, bias, m, z, p, rows, target, key_groups, positives, col_out, col_plane, col_start, N, M, num_grouped, first,
    SYMMETRIC: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Run _add_to_statistics; with GROUPS in two steps, because the sums of groups take more registers."""
    if GROUPS:
        STEP: tl.constexpr = WIDTH // 2
        left, right = halves(s)
        m, z, p = _add_to_statistics(
            left, bias, m, z, p, rows, target, key_groups, positives, col_out, col_plane, col_start,
            N, M, num_grouped, first, SYMMETRIC, BIAS, GROUPS, STEP,
        )  # fmt: skip
        m, z, p = _add_to_statistics(
            right, bias, m, z, p, rows, target, key_groups, positives, col_out, col_plane, col_start + STEP,
            N, M, num_grouped, first, SYMMETRIC, BIAS, GROUPS, STEP,
        )  # fmt: skip
    else:
        m, z, p = _add_to_statistics(
            s, bias, m, z, p, rows, target, key_groups, positives, col_out, col_plane, col_start,
            N, M, num_grouped, first, SYMMETRIC, BIAS, GROUPS, WIDTH,
        )  # fmt: skip
    return m, z, p


@triton.jit
def _same_group(row_group, key_groups, cols, num_grouped):
    """Which entries of a tile are of one group, [BM, BN]; keys from num_grouped on are of none."""
    col_group = tl.load(key_groups + cols, mask=cols < num_grouped, other=-2)
    return row_group[:, None] == col_group[None, :]


@triton.jit(
    do_not_specialize=["N", "M", "num_grouped", "tiles_per_group", "tiles_per_split", "num_groups", "num_splits"]
)
def forward_kernel(
    queries, keys, scale, bias, targets, key_groups, positives, row_partials, col_partials,
    N, M, num_grouped, D, stride_q, stride_k, tiles_per_group, tiles_per_split, num_groups, num_splits,
    SYMMETRIC: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Statistics of a group of rows against a split of the columns.

    row_partials [2, num_splits, N] and col_partials [2, num_groups, M] take (m, z), z = sum of 2^(s - m); positives [N]
    takes s[i, targets[i]], from the same tile as the statistics; a target of -1 is none. The columns' statistics
    grow in col_partials itself: this program alone owns its part of them.

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

    for row_start in tl.range(first_row, end_row, BLOCK_M, disable_licm=True):
        rows = row_start + tl.arange(0, BLOCK_M)
        row_ok = rows < N
        target = tl.load(targets + rows, mask=row_ok, other=-1).to(tl.int32)  # [BM]
        m = tl.full((BLOCK_M,), LOWEST, tl.float32)
        z = tl.zeros((BLOCK_M,), tl.float32)
        p = tl.zeros((BLOCK_M,), tl.float32)
        if SYMMETRIC:
            # Below, threads read what others of this program wrote to col_partials for the tiles above.
            tl.debug_barrier()
        for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
            tile = similarities(
                queries, keys, rows, col_start + tl.arange(0, BLOCK_N),
                N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            first = row_start == first_row
            # The halves of a tile go one after the other, so that they need not share the registers.
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = halves(scale2 * tile)
            m, z, p = _add_half(
                left, bias, m, z, p, rows, target, key_groups, positives, col_out, col_plane, col_start,
                N, M, num_grouped, first, SYMMETRIC, BIAS, GROUPS, HALF,
            )  # fmt: skip
            m, z, p = _add_half(
                right, bias, m, z, p, rows, target, key_groups, positives, col_out, col_plane, col_start + HALF,
                N, M, num_grouped, first, SYMMETRIC, BIAS, GROUPS, HALF,
            )  # fmt: skip
        tl.store(row_out + rows, m, mask=row_ok)
        tl.store(row_out + row_plane + rows, z, mask=row_ok)
        if GROUPS:
            tl.store(row_out + 2 * row_plane + rows, p, mask=row_ok)


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


@triton.jit
def _store_grad(
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
    row_shares, col_shares, strip,
    first_row, first_col, height, width, N, M, num_grouped, D, stride_q, stride_k, label_smoothing,
    SYMMETRIC: tl.constexpr, SMOOTHED: tl.constexpr, BIAS: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """strip [height, width] = the part of dS that begins at first_row, first_col. Zero past the ends of dS.

    dS_ij = u_i e^(s_ij - lse_i) + w_j e^(s_ij - lse_j) - 2 (1 - eps) u_i [j = t_i] - eps u_i / M - eps w_j / N
    u, w: row_weights, col_weights, the gradients of the cross-entropies of rows and columns. Without SYMMETRIC there is
    no w, and 1 in place of 2. With GROUPS (`targets` are the rows' groups) the third term is -(row_shares_i +
    col_shares_j) at every pair of one group. All terms meet in float32, and dS is rounded once. The tile of logits is
    computed as in the forward pass for both sides: its bits are those that gave the log-sum-exps.
    """
    row_in_strip, col_in_strip = strip_place(tl.program_id(0), height, width, BLOCK_M, BLOCK_N)
    rows = first_row + row_in_strip + tl.arange(0, BLOCK_M)
    cols = first_col + col_in_strip + tl.arange(0, BLOCK_N)
    tile = similarities(
        queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    left, right = halves((tl.load(scale) * LOG2E) * tile)
    HALF: tl.constexpr = BLOCK_N // 2
    _store_grad(
        left, bias, targets, key_groups, row_lse, col_lse, row_weights, col_weights, row_shares, col_shares, strip,
        first_row, first_col, row_in_strip, col_in_strip, width, N, M, num_grouped,
        label_smoothing, SYMMETRIC, SMOOTHED, BIAS, GROUPS, BLOCK_M, HALF,
    )  # fmt: skip
    _store_grad(
        right, bias, targets, key_groups, row_lse, col_lse, row_weights, col_weights, row_shares, col_shares, strip,
        first_row, first_col, row_in_strip, col_in_strip + HALF, width, N, M, num_grouped,
        label_smoothing, SYMMETRIC, SMOOTHED, BIAS, GROUPS, BLOCK_M, HALF,
    )  # fmt: skip
