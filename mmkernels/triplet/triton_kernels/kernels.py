"""The kernels of the triplet loss over tiles of similarities."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.engine import all_have_read, block_of_tiles, halves, program_tile, similarities

_INFINITY = tl.constexpr(float("inf"))
_LAST = tl.constexpr(2**31 - 1)
# In place of a similarity that is no negative's, where hinges are added: finite, so that no NaN comes of it beside a
# positive at minus infinity.
_EXCLUDED = tl.constexpr(-1e38)


@triton.jit(do_not_specialize=["N", "M"])
def positives_kernel(
    queries, keys, positives, N, M, D, stride_q, stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """positives [N] = <q_i, k_i>, from the tiles on the diagonal: the same bits as in the other kernels."""
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    for col_start in tl.range(first_row, tl.minimum(first_row + BLOCK_M, N), BLOCK_N, disable_licm=True):
        cols = col_start + tl.arange(0, BLOCK_N)
        s = similarities(
            queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        positive = tl.sum(tl.where(rows[:, None] == cols[None, :], s, 0.0), 1)
        here = (rows >= col_start) & (rows < col_start + BLOCK_N) & (rows < N)
        tl.store(positives + rows, positive, mask=here)


@triton.jit
def _negatives(s, rows, cols, N, M, EXCLUDED: tl.constexpr):
    """The similarities of a tile; EXCLUDED on the diagonal and past the last row and column."""
    negative = (rows < N)[:, None] & (cols < M)[None, :] & (rows[:, None] != cols[None, :])
    return tl.where(negative, s, EXCLUDED)


@triton.jit
def _costs(s, positive, margin):
    """The hinges of a tile, and 1 for each that is above 0; a NaN stays one in both."""
    above = (s - positive) + margin
    counts = tl.where(above > 0.0, 1.0, above)
    return tl.where(above <= 0.0, 0.0, above), tl.where(above <= 0.0, 0.0, counts)


@triton.jit
def _add_hinges(
    s, positives, weights, strip, row_positive, row_weight, row_sum, row_count, rows,
    col_sums, col_counts, col_start, N, M, first_row, height, width, margin, anew,
    SYMMETRIC: tl.constexpr, GRADIENT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The rows' sums and counts with the columns col_start and following; the columns' in memory; and the gradient."""
    cols = col_start + tl.arange(0, WIDTH)
    s = _negatives(s, rows, cols, N, M, _EXCLUDED)
    cost, counts = _costs(s, row_positive[:, None], margin)
    row_sum += tl.sum(cost, 1)
    if GRADIENT:
        row_count += tl.sum(counts, 1)
        grad = counts * row_weight[:, None]
    if SYMMETRIC:
        matched = cols < N
        old = cols < tl.where(anew, 0, N)
        # A column without a positive has no hinge above 0.
        positive = tl.load(positives + cols, mask=matched, other=_INFINITY)
        cost, counts = _costs(s, positive[None, :], margin)
        total = tl.load(col_sums + cols, mask=old, other=0.0) + tl.sum(cost, 0)
        if GRADIENT:
            count = tl.load(col_counts + cols, mask=old, other=0.0) + tl.sum(counts, 0)
            grad += counts * tl.load(weights + cols, mask=matched, other=0.0)[None, :]
        all_have_read()
        tl.store(col_sums + cols, total, mask=matched)
        if GRADIENT:
            tl.store(col_counts + cols, count, mask=matched)
    if GRADIENT:
        # A strip has less than 2^31 entries.
        in_strip = rows - first_row
        ok = (in_strip < height)[:, None] & (cols < width)[None, :]
        tl.store(strip + ((in_strip * width)[:, None] + cols[None, :]), grad.to(strip.dtype.element_ty), mask=ok)
    return row_sum, row_count


@triton.jit
def _add_quarter(
    s, positives, weights, strip, row_positive, row_weight, row_sum, row_count, rows,
    col_sums, col_counts, col_start, N, M, first_row, height, width, margin, anew,
    SYMMETRIC: tl.constexpr, GRADIENT: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Run _add_hinges on one half after the other."""
    HALF: tl.constexpr = WIDTH // 2
    left, right = halves(s)
    row_sum, row_count = _add_hinges(
        left, positives, weights, strip, row_positive, row_weight, row_sum, row_count, rows,
        col_sums, col_counts, col_start, N, M, first_row, height, width, margin, anew, SYMMETRIC, GRADIENT, HALF,
    )  # fmt: skip
    return _add_hinges(
        right, positives, weights, strip, row_positive, row_weight, row_sum, row_count, rows,
        col_sums, col_counts, col_start + HALF, N, M, first_row, height, width, margin, anew,
        SYMMETRIC, GRADIENT, HALF,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "first", "height", "width", "N", "M", "tiles_per_group", "tiles_per_split", "num_groups", "num_splits",
        "all_groups", "margin",
    ]
)  # fmt: skip
def hinges_kernel(
    queries, keys, positives, weights, strip, row_partials, col_partials,
    first, height, width, N, M, D, stride_q, stride_k,
    tiles_per_group, tiles_per_split, num_groups, num_splits, all_groups, margin,
    SYMMETRIC: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The hinges of rows first to first + height - 1, one group of them against one split of the columns per program.

    row_partials [2, num_splits, N] and col_partials [2, all_groups, N] take the sum of the hinges of a row and of a
    column and, with GRADIENT, how many are above 0. The columns' grow in col_partials itself, over the rows of a group
    and over the launches for one strip of rows after the other: this program alone owns its part of them.
    With GRADIENT strip [height, width] takes [row's hinge > 0] w_i + [column's hinge > 0] w_j, w: weights [N]; zero
    where there is no negative. The positives' own part is known when the last hinge is: see finish_gradients_kernel.
    """
    group, split = program_tile(tl.program_id(0), num_groups, num_splits)
    row_plane = tl.cast(num_splits, tl.int64) * N
    col_plane = tl.cast(all_groups, tl.int64) * N
    row_out = row_partials + split.to(tl.int64) * N
    col_out = col_partials + group.to(tl.int64) * N

    first_row = first + group * tiles_per_group * BLOCK_M
    first_col = split * tiles_per_split * BLOCK_N
    end_row = tl.minimum(first_row + tiles_per_group * BLOCK_M, first + height)
    end_col = tl.minimum(first_col + tiles_per_split * BLOCK_N, width)
    for row_start in tl.range(first_row, end_row, BLOCK_M, disable_licm=True):
        rows = row_start + tl.arange(0, BLOCK_M)
        row_ok = rows < N
        row_positive = tl.load(positives + rows, mask=row_ok, other=0.0)
        row_weight = tl.load(weights + rows, mask=row_ok, other=0.0) if GRADIENT else row_positive
        row_sum = tl.zeros((BLOCK_M,), tl.float32)
        row_count = tl.zeros((BLOCK_M,), tl.float32)
        anew = (row_start == first_row) & (first == 0)
        if SYMMETRIC:
            # Below, threads read what others of this program wrote to col_partials for the tiles above.
            tl.debug_barrier()
        for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
            tile = similarities(
                queries, keys, rows, col_start + tl.arange(0, BLOCK_N),
                N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            # The eighths of a tile go one after the other, so that they need not share the registers.
            QUARTER: tl.constexpr = BLOCK_N // 4
            left, right = halves(tile)
            first_quarter, second_quarter = halves(left)
            third_quarter, fourth_quarter = halves(right)
            row_sum, row_count = _add_quarter(
                first_quarter, positives, weights, strip, row_positive, row_weight, row_sum, row_count, rows,
                col_out, col_out + col_plane, col_start, N, M, first, height, width, margin, anew,
                SYMMETRIC, GRADIENT, QUARTER,
            )  # fmt: skip
            row_sum, row_count = _add_quarter(
                second_quarter, positives, weights, strip, row_positive, row_weight, row_sum, row_count, rows,
                col_out, col_out + col_plane, col_start + QUARTER, N, M, first, height, width, margin, anew,
                SYMMETRIC, GRADIENT, QUARTER,
            )  # fmt: skip
            row_sum, row_count = _add_quarter(
                third_quarter, positives, weights, strip, row_positive, row_weight, row_sum, row_count, rows,
                col_out, col_out + col_plane, col_start + 2 * QUARTER, N, M, first, height, width, margin, anew,
                SYMMETRIC, GRADIENT, QUARTER,
            )  # fmt: skip
            row_sum, row_count = _add_quarter(
                fourth_quarter, positives, weights, strip, row_positive, row_weight, row_sum, row_count, rows,
                col_out, col_out + col_plane, col_start + 3 * QUARTER, N, M, first, height, width, margin, anew,
                SYMMETRIC, GRADIENT, QUARTER,
            )  # fmt: skip
        tl.store(row_out + rows, row_sum, mask=row_ok)
        if GRADIENT:
            tl.store(row_out + row_plane + rows, row_count, mask=row_ok)


@triton.jit(do_not_specialize=["num_x", "N", "num_features"])
def finish_gradients_kernel(
    grad, x, of_positives, factor, num_x, N, num_features, stride_x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad_i = factor (grad_i - of_positives_i x_i): each hinge above 0 takes from its positive."""
    tiles = tl.cdiv(num_features, BLOCK_N)
    rows = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (features < num_features)[None, :]
    ok = (rows < num_x)[:, None] & inside
    matched = rows < N
    weight = tl.load(of_positives + rows, mask=matched, other=0.0)
    x_tile = tl.load(x + rows.to(tl.int64)[:, None] * stride_x + features[None, :], mask=matched[:, None] & inside,
                     other=0.0)  # fmt: skip
    at = grad + rows.to(tl.int64)[:, None] * num_features + features[None, :]
    total = tl.load(at, mask=ok, other=0.0) - weight[:, None] * x_tile.to(tl.float32)
    tl.store(at, tl.load(factor) * total, mask=ok)


@triton.jit
def _candidates(s, positive, margin, SEMI_HARD: tl.constexpr):
    """The similarities of the negatives that may be the worst, infinity for a NaN; minus infinity for the others."""
    value = tl.where(s == s, s, _INFINITY)
    if SEMI_HARD:
        value = tl.where(s >= positive, -_INFINITY, value)
        value = tl.where((s - positive) + margin <= 0.0, -_INFINITY, value)
    return value


@triton.jit
def _add_worst(
    s, positives, row_positive, row_best, row_index, rows, col_best, col_index, col_start, N, M, margin, anew,
    SYMMETRIC: tl.constexpr, SEMI_HARD: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The rows' worst with the columns col_start and following; the columns' in memory."""
    cols = col_start + tl.arange(0, WIDTH)
    s = _negatives(s, rows, cols, N, M, -_INFINITY)
    value = _candidates(s, row_positive[:, None], margin, SEMI_HARD)
    best = tl.max(value, 1)
    index = tl.min(tl.where(value == best[:, None], cols[None, :], _LAST), 1)
    row_index = tl.where(best > row_best, index, row_index)
    row_best = tl.maximum(row_best, best)
    if SYMMETRIC:
        matched = cols < N
        old = cols < tl.where(anew, 0, N)
        positive = tl.load(positives + cols, mask=matched, other=0.0)
        value = _candidates(s, positive[None, :], margin, SEMI_HARD)
        best = tl.max(value, 0)
        index = tl.min(tl.where(value == best[None, :], rows[:, None], _LAST), 0)
        old_best = tl.load(col_best + cols, mask=old, other=-_INFINITY)
        old_index = tl.load(col_index + cols, mask=old, other=0)
        all_have_read()
        tl.store(col_index + cols, tl.where(best > old_best, index, old_index), mask=matched)
        tl.store(col_best + cols, tl.maximum(old_best, best), mask=matched)
    return row_best, row_index


@triton.jit(do_not_specialize=["N", "M", "tiles_per_group", "tiles_per_split", "num_groups", "num_splits", "margin"])
def worst_kernel(
    queries, keys, positives, row_best, row_index, col_best, col_index,
    N, M, D, stride_q, stride_k, tiles_per_group, tiles_per_split, num_groups, num_splits, margin,
    SYMMETRIC: tl.constexpr, SEMI_HARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The worst negative of a group of rows in a split of the columns, and of these columns in the group.

    row_best and row_index [num_splits, N], col_best and col_index [num_groups, N]: its similarity, and the first place
    that has it. The columns' grow in memory: this program alone owns its part of them.
    """
    group, split, first_row, end_row, first_col, end_col = block_of_tiles(
        tl.program_id(0), N, M, tiles_per_group, tiles_per_split, num_groups, num_splits, BLOCK_M, BLOCK_N
    )
    row_at = split.to(tl.int64) * N
    col_at = group.to(tl.int64) * N
    for row_start in tl.range(first_row, end_row, BLOCK_M, disable_licm=True):
        rows = row_start + tl.arange(0, BLOCK_M)
        row_ok = rows < N
        row_positive = tl.load(positives + rows, mask=row_ok, other=0.0)
        best = tl.full((BLOCK_M,), -_INFINITY, tl.float32)
        index = tl.zeros((BLOCK_M,), tl.int32)
        if SYMMETRIC:
            # Below, threads read what others of this program wrote for the tiles above.
            tl.debug_barrier()
        for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
            tile = similarities(
                queries, keys, rows, col_start + tl.arange(0, BLOCK_N),
                N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            anew = row_start == first_row
            # The halves of a tile go one after the other, so that they need not share the registers.
            HALF: tl.constexpr = BLOCK_N // 2
            left, right = halves(tile)
            best, index = _add_worst(
                left, positives, row_positive, best, index, rows, col_best + col_at, col_index + col_at, col_start,
                N, M, margin, anew, SYMMETRIC, SEMI_HARD, HALF,
            )  # fmt: skip
            best, index = _add_worst(
                right, positives, row_positive, best, index, rows, col_best + col_at, col_index + col_at,
                col_start + HALF, N, M, margin, anew, SYMMETRIC, SEMI_HARD, HALF,
            )  # fmt: skip
        tl.store(row_best + row_at + rows, best, mask=row_ok)
        tl.store(row_index + row_at + rows, index, mask=row_ok)


@triton.jit
def _merged_hinge(
    all_best, all_index, count, length, num_negatives, rows, ok, positive, margin,
    SEMI_HARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The hinge of the worst negative over `count` parts, the first of equals; and its place, -1 for a hinge of 0."""
    best = tl.full((BLOCK,), -_INFINITY, tl.float32)
    index = tl.zeros((BLOCK,), tl.int32)
    for part in range(count):
        at = tl.cast(part, tl.int64) * length + rows
        value = tl.load(all_best + at, mask=ok, other=-_INFINITY)
        index = tl.where(value > best, tl.load(all_index + at, mask=ok, other=0), index)
        best = tl.maximum(best, value)
    # A worst negative at minus infinity is one like others, as a semi-hard one beside a positive of NaN alone.
    none = num_negatives == 0
    if SEMI_HARD:
        none |= (best == -_INFINITY) & (positive == positive)
    # Infinity stands for a NaN.
    above = (tl.where(best == _INFINITY, float("nan"), best) - positive) + margin
    costless = (above <= 0.0) | none
    return tl.where(costless, 0.0, above), tl.where(costless, -1, index)


@triton.jit(do_not_specialize=["N", "M", "num_groups", "num_splits", "margin"])
def finish_worst_kernel(
    row_best, row_index, col_best, col_index, positives, losses, worst, N, M, num_groups, num_splits, margin,
    SYMMETRIC: tl.constexpr, SEMI_HARD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [N] and worst [2, N] ([1, N] unless SYMMETRIC) from the parts that worst_kernel left."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = rows < N
    positive = tl.load(positives + rows, mask=ok, other=0.0)
    loss, index = _merged_hinge(row_best, row_index, num_splits, N, M - 1, rows, ok, positive, margin, SEMI_HARD, BLOCK)
    tl.store(worst + rows, index, mask=ok)
    if SYMMETRIC:
        other, index = _merged_hinge(
            col_best, col_index, num_groups, N, N - 1, rows, ok, positive, margin, SEMI_HARD, BLOCK
        )
        tl.store(worst + N + rows, index, mask=ok)
        loss = (loss + other) * 0.5
    tl.store(losses + rows, loss, mask=ok)


@triton.jit(do_not_specialize=["num_features"])
def sparse_product_kernel(
    starts, columns, values, x, out, num_features, stride_x, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out_i = the sum of values[e] x[columns[e]] over the entries e of row i, starts[i] to starts[i + 1], in order."""
    tiles = tl.cdiv(num_features, BLOCK)
    row = tl.program_id(0) // tiles
    features = tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = features < num_features
    end = tl.load(starts + row + 1)
    acc = tl.zeros((BLOCK,), tl.float32)
    for first in range(tl.load(starts + row), end, STEP):
        entries = first + tl.arange(0, STEP)
        ok = entries < end
        value = tl.load(values + entries, mask=ok, other=0.0)
        at = tl.load(columns + entries, mask=ok, other=0).to(tl.int64) * stride_x
        x_tile = tl.load(x + at[:, None] + features[None, :], mask=ok[:, None] & inside[None, :], other=0.0)
        acc += tl.sum(x_tile.to(tl.float32) * value[:, None], 0)
    tl.store(out + row.to(tl.int64) * num_features + features, acc.to(out.dtype.element_ty), mask=inside)
