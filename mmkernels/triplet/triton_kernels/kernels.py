"""The kernels of the triplet loss over tiles of similarities."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.engine import all_have_read, block_of_tiles, halves, in_eights, program_tile, similarities

_INFINITY = tl.constexpr(float("inf"))
_LAST = tl.constexpr(2**31 - 1)
# A column counts its hinges above 0 in twelve bits of a float32, two columns in its 24: the walk is 32 tiles high.
_COUNT = tl.constexpr(4096.0)
# Similarities whose bound is below it are finite, and so are their hinges.
_LARGEST = tl.constexpr(1e37)
# In place of a finite similarity that is no negative's: no hinge is above 0.
_EXCLUDED = tl.constexpr(-1e38)
# The positives and their weights lie in arrays of whole blocks of so many.
PADDING = tl.constexpr(256)
_PEAKS = tl.constexpr(256)  # read at a time


@triton.jit
def _magnitude(x):
    """The bits of |x|, which are in the order of the numbers; those of a NaN are the largest."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit(do_not_specialize=["N", "M"])
def positives_kernel(
    queries, keys, positives, peaks, N, M, D, stride_q, stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """positives <q_i, k_i>, from the tiles on the diagonal: the same bits as in the other kernels; infinity from N on,
    up to M rounded up to PADDING. peaks [2, blocks] takes the largest |q| and |k| of each block, as _magnitude."""
    first_row = tl.program_id(0) * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    tl.store(positives + rows, tl.full((BLOCK_M,), _INFINITY, tl.float32), mask=rows >= N)
    for col_start in tl.range(first_row, tl.minimum(first_row + BLOCK_M, N), BLOCK_N, disable_licm=True):
        cols = col_start + tl.arange(0, BLOCK_N)
        s = similarities(
            queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        positive = tl.sum(tl.where(rows[:, None] == cols[None, :], s, 0.0), 1)
        here = (rows >= col_start) & (rows < col_start + BLOCK_N) & (rows < N)
        tl.store(positives + rows, positive, mask=here)
    k = tl.arange(0, BLOCK_K)
    of_queries = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    of_keys = tl.zeros((BLOCK_M, BLOCK_K), tl.int32)
    q_ptrs = queries + tl.minimum(rows, N - 1).to(tl.int64)[:, None] * stride_q + k[None, :]
    k_ptrs = keys + tl.minimum(rows, M - 1).to(tl.int64)[:, None] * stride_k + k[None, :]
    for start in range(0, D, BLOCK_K):
        inside = (k < D - start)[None, :]
        of_queries = tl.maximum(of_queries, _magnitude(tl.load(q_ptrs + start, mask=inside, other=0.0)))
        of_keys = tl.maximum(of_keys, _magnitude(tl.load(k_ptrs + start, mask=inside, other=0.0)))
    tl.store(peaks + tl.program_id(0), tl.max(tl.max(of_queries, 1), 0))
    tl.store(peaks + tl.num_programs(0) + tl.program_id(0), tl.max(tl.max(of_keys, 1), 0))


@triton.jit
def _all_finite(peaks, M, D, BLOCK_M: tl.constexpr):
    """Whether no similarity can be NaN or infinite: |s| <= D max |q| max |k|."""
    blocks = tl.cdiv(M, PADDING) * (PADDING // BLOCK_M)
    index = tl.arange(0, _PEAKS)
    of_queries = tl.zeros((_PEAKS,), tl.int32)
    of_keys = tl.zeros((_PEAKS,), tl.int32)
    for start in range(0, blocks, _PEAKS):
        ok = index < blocks - start
        of_queries = tl.maximum(of_queries, tl.load(peaks + start + index, mask=ok, other=0))
        of_keys = tl.maximum(of_keys, tl.load(peaks + blocks + start + index, mask=ok, other=0))
    largest = tl.max(of_queries, 0).to(tl.float32, bitcast=True) * tl.max(of_keys, 0).to(tl.float32, bitcast=True)
    return D * largest < _LARGEST


@triton.jit
def _in_slots(x, SLOTS: tl.constexpr):
    """The sums of rows 8 apart, which a thread has in its registers, if there are half as many slots as rows."""
    M: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    if SLOTS < M:
        x = tl.reshape(tl.sum(tl.reshape(x, (SLOTS // 8, M // SLOTS, 8, WIDTH)), 1), (SLOTS, WIDTH))
    return x


@triton.jit
def _add_hinges(
    s, row_cost, row_count, col_cost, col_count, col_positive, weights, strip, row_positive, row_weight, cols,
    margin, ONE, SYMMETRIC: tl.constexpr, GRADIENT: tl.constexpr, WEIGHTED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Add the hinges of a part of a tile, and how many are above 0, to the sums of rows, and slot by slot to those of
    columns; the columns' count in units of ONE. The gradient goes into the strip, whose rows `strip` are."""
    above = (s - row_positive[:, None]) + margin
    row_cost += in_eights(tl.maximum(above, 0.0))
    if GRADIENT:
        count = tl.where(above > 0.0, 1.0, 0.0)
        row_count += in_eights(count)
        grad = count * row_weight[:, None] if WEIGHTED else count
    if SYMMETRIC:
        # A column without a positive has infinity for one, and no hinge above 0.
        above = (s - col_positive[None, :]) + margin
        col_cost += _in_slots(tl.maximum(above, 0.0), SLOTS)
        if GRADIENT:
            count = tl.where(above > 0.0, 1.0, 0.0)
            number = _in_slots(count, SLOTS)
            col_count = tl.fma(number, tl.zeros_like(number) + ONE, col_count)
            if WEIGHTED:
                grad = tl.fma(count, tl.zeros_like(grad) + tl.load(weights + cols)[None, :], grad)
            else:
                grad += count
    if GRADIENT:
        tl.store(strip[:, None] + cols[None, :], grad.to(strip.dtype.element_ty))
    return row_cost, row_count, col_cost, col_count


@triton.jit
def _exact_costs(s, positive, margin, negative):
    """The hinges of negatives, 0 elsewhere; 1 for each that is above 0 or NaN; and the same, but NaN for a NaN."""
    above = (s - positive) + margin
    counts = negative & ~(above <= 0.0)
    count = tl.where(counts, 1.0, 0.0)
    return tl.where(counts, above, 0.0), count, tl.where(negative & (above != above), above, count)


@triton.jit
def _exact_hinges(
    queries, keys, positives, weights, strip, row_out, row_plane, col_out, col_plane, first, width,
    first_row, end_row, first_col, end_col, N, M, D, stride_q, stride_k, margin,
    SYMMETRIC: tl.constexpr, GRADIENT: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What hinges_kernel makes of a block, of any similarities: NaN hinges and their gradients are NaN. All sums grow
    in memory."""
    for row_start in tl.range(first_row, end_row, BLOCK_M, disable_licm=True):
        rows = row_start + tl.arange(0, BLOCK_M)
        row_ok = rows < N
        row_positive = tl.load(positives + rows, mask=row_ok, other=0.0)
        row_cost = tl.zeros((BLOCK_M,), tl.float32)
        row_count = tl.zeros((BLOCK_M,), tl.float32)
        for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
            cols = col_start + tl.arange(0, BLOCK_N)
            s = similarities(
                queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            negative = row_ok[:, None] & (cols < M)[None, :] & (rows[:, None] != cols[None, :])
            cost, count, grad = _exact_costs(s, row_positive[:, None], margin, negative)
            row_cost += tl.sum(cost, 1)
            if GRADIENT:
                row_count += tl.sum(count, 1)
                if WEIGHTED:
                    grad *= tl.load(weights + rows, mask=row_ok, other=0.0)[:, None]
            if SYMMETRIC:
                matched = cols < N
                positive = tl.load(positives + cols, mask=matched, other=0.0)
                cost, count, of_column = _exact_costs(s, positive[None, :], margin, negative & matched[None, :])
                old = cols < tl.where((first > 0) | (row_start > first_row), N, 0)
                total = tl.load(col_out + cols, mask=old, other=0.0) + tl.sum(cost, 0)
                if GRADIENT:
                    number = tl.load(col_out + col_plane + cols, mask=old, other=0.0) + tl.sum(count, 0)
                    if WEIGHTED:
                        of_column *= tl.load(weights + cols, mask=matched, other=0.0)[None, :]
                    grad += of_column
                all_have_read()
                tl.store(col_out + cols, total, mask=matched)
                if GRADIENT:
                    tl.store(col_out + col_plane + cols, number, mask=matched)
            if GRADIENT:
                at = strip + (rows - first).to(tl.int64)[:, None] * width + cols[None, :]
                tl.store(at, grad.to(strip.dtype.element_ty))
        tl.store(row_out + rows, row_cost, mask=row_ok)
        if GRADIENT:
            tl.store(row_out + row_plane + rows, row_count, mask=row_ok)
        tl.debug_barrier()  # threads read what others of this program wrote to col_partials


@triton.jit
def _store_part(parts, sums, start, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, QUARTER: tl.constexpr):
    """The sums of a part's columns over the slots of sixteen rows, which lie in one warp, to parts [BM / 16, BN]."""
    PARTS: tl.constexpr = BLOCK_M // 16
    part = tl.arange(0, PARTS)
    col = start + tl.arange(0, QUARTER)
    sums = tl.sum(tl.reshape(sums, (PARTS, sums.shape[0] // PARTS, QUARTER)), 1)
    tl.store(parts + part[:, None] * BLOCK_N + col[None, :], sums)


@triton.jit
def _add_to_columns(out, parts, cols, old, ok, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Add what _store_part has left to the columns' sums in memory."""
    col = tl.arange(0, BLOCK_N)
    total = tl.load(out + cols, mask=old, other=0.0)
    for index in tl.static_range(BLOCK_M // 16):
        total += tl.load(parts + index * BLOCK_N + col)
    all_have_read()
    tl.store(out + cols, total, mask=ok)


@triton.jit(
    do_not_specialize=[
        "first", "height", "width", "N", "M", "tiles_per_group", "tiles_per_split", "num_groups", "num_splits",
        "all_groups", "margin",
    ]
)  # fmt: skip
def hinges_kernel(
    queries, keys, positives, peaks, weights, strip, row_partials, col_partials, parts,
    first, height, width, N, M, D, stride_q, stride_k,
    tiles_per_group, tiles_per_split, num_groups, num_splits, all_groups, margin,
    SYMMETRIC: tl.constexpr, GRADIENT: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The hinges of rows first to first + height - 1, one group of them against one split of the columns per program,
    column by column of tiles.

    row_partials [2, num_splits, N] and col_partials [2, all_groups, N] take the sum of the hinges of a row and of a
    column and, with GRADIENT, how many are above 0. The columns' are added up in registers over the rows of a group,
    and in col_partials over the launches for one strip of rows after the other: this program alone owns its part.
    With GRADIENT strip [height, width] takes [row's hinge > 0] w_i + [column's hinge > 0] w_j, zero where there is no
    negative; w: weights, 0 from N on, and 1 unless WEIGHTED. The positives' own part is known when the last hinge is:
    see finish_hinges_kernel.

    No comparison asks for a NaN where no similarity can be one; see _exact_hinges for all others.
    """
    group, split = program_tile(tl.program_id(0), num_groups, num_splits)
    row_plane = tl.cast(num_splits, tl.int64) * N
    col_plane = tl.cast(all_groups, tl.int64) * N
    row_out = row_partials + split.to(tl.int64) * N
    col_out = col_partials + group.to(tl.int64) * N
    PART: tl.constexpr = BLOCK_M // 16 * BLOCK_N
    QUARTER: tl.constexpr = BLOCK_N // 4
    SLOTS: tl.constexpr = BLOCK_M // 2 if BLOCK_M >= 128 else BLOCK_M
    parts += tl.program_id(0) * (2 * PART if GRADIENT else PART)

    first_row = first + group * tiles_per_group * BLOCK_M
    first_col = split * tiles_per_split * BLOCK_N
    end_row = tl.minimum(first_row + tiles_per_group * BLOCK_M, first + height)
    end_col = tl.minimum(first_col + tiles_per_split * BLOCK_N, width)
    if _all_finite(peaks, M, D, BLOCK_M):
        for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
            cols = col_start + tl.arange(0, BLOCK_N)
            cost_0 = tl.zeros((SLOTS, QUARTER), tl.float32)
            cost_1 = tl.zeros((SLOTS, QUARTER), tl.float32)
            cost_2 = tl.zeros((SLOTS, QUARTER), tl.float32)
            cost_3 = tl.zeros((SLOTS, QUARTER), tl.float32)
            count_01 = tl.zeros((SLOTS, QUARTER), tl.float32)
            count_23 = tl.zeros((SLOTS, QUARTER), tl.float32)
            of_quarter = col_start + tl.arange(0, QUARTER)
            positive_0 = tl.load(positives + of_quarter)
            positive_1 = tl.load(positives + QUARTER + of_quarter)
            positive_2 = tl.load(positives + 2 * QUARTER + of_quarter)
            positive_3 = tl.load(positives + 3 * QUARTER + of_quarter)
            tl.debug_barrier()  # threads read what others of this program wrote to row_partials
            for row_start in tl.range(first_row, end_row, BLOCK_M, disable_licm=True):
                rows = row_start + tl.arange(0, BLOCK_M)
                row_ok = rows < N
                row_positive = tl.load(positives + rows, mask=row_ok, other=0.0)
                row_weight = row_positive
                if WEIGHTED:
                    row_weight = tl.load(weights + rows, mask=row_ok, other=0.0)
                tile = similarities(
                    queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                )  # fmt: skip
                inside = (row_start + BLOCK_M <= N) & (col_start + BLOCK_N <= M)
                diagonal = (row_start < col_start + BLOCK_N) & (col_start < row_start + BLOCK_M)
                if diagonal | (not inside):
                    negative = row_ok[:, None] & (cols < M)[None, :] & (rows[:, None] != cols[None, :])
                    tile = tl.where(negative, tile, _EXCLUDED)
                old = rows < tl.where(col_start > first_col, N, 0)
                old_cost = tl.load(row_out + rows, mask=old, other=0.0)
                row_strip = strip + tl.zeros((BLOCK_M,), tl.int32)
                if GRADIENT:
                    row_strip = strip + tl.multiple_of((rows - first).to(tl.int64) * width, BLOCK_N)
                    old_count = tl.load(row_out + row_plane + rows, mask=old, other=0.0)
                # The quarters of a tile go one after the other, so that they need not share the registers.
                left, right = halves(tile)
                quarter_0, quarter_1 = halves(left)
                quarter_2, quarter_3 = halves(right)
                row_cost = tl.zeros((BLOCK_M, 8), tl.float32)
                row_count = tl.zeros((BLOCK_M, 8), tl.float32)
                row_cost, row_count, cost_0, count_01 = _add_hinges(
                    quarter_0, row_cost, row_count, cost_0, count_01, positive_0, weights, row_strip,
                    row_positive, row_weight, of_quarter, margin, 1.0, SYMMETRIC, GRADIENT, WEIGHTED, SLOTS,
                )  # fmt: skip
                row_cost, row_count, cost_1, count_01 = _add_hinges(
                    quarter_1, row_cost, row_count, cost_1, count_01, positive_1, weights, row_strip,
                    row_positive, row_weight, of_quarter + QUARTER, margin, _COUNT,
                    SYMMETRIC, GRADIENT, WEIGHTED, SLOTS,
                )  # fmt: skip
                row_cost, row_count, cost_2, count_23 = _add_hinges(
                    quarter_2, row_cost, row_count, cost_2, count_23, positive_2, weights, row_strip,
                    row_positive, row_weight, of_quarter + 2 * QUARTER, margin, 1.0,
                    SYMMETRIC, GRADIENT, WEIGHTED, SLOTS,
                )  # fmt: skip
                row_cost, row_count, cost_3, count_23 = _add_hinges(
                    quarter_3, row_cost, row_count, cost_3, count_23, positive_3, weights, row_strip,
                    row_positive, row_weight, of_quarter + 3 * QUARTER, margin, _COUNT,
                    SYMMETRIC, GRADIENT, WEIGHTED, SLOTS,
                )  # fmt: skip
                all_have_read()
                tl.store(row_out + rows, old_cost + tl.sum(row_cost, 1), mask=row_ok)
                if GRADIENT:
                    tl.store(row_out + row_plane + rows, old_count + tl.sum(row_count, 1), mask=row_ok)
            if SYMMETRIC:
                _store_part(parts, cost_0, 0, BLOCK_M, BLOCK_N, QUARTER)
                _store_part(parts, cost_1, QUARTER, BLOCK_M, BLOCK_N, QUARTER)
                _store_part(parts, cost_2, 2 * QUARTER, BLOCK_M, BLOCK_N, QUARTER)
                _store_part(parts, cost_3, 3 * QUARTER, BLOCK_M, BLOCK_N, QUARTER)
                if GRADIENT:
                    for quarter in tl.static_range(4):
                        both = (count_01 if quarter < 2 else count_23).to(tl.int32)
                        count = ((both >> 12) if quarter % 2 else (both & 4095)).to(tl.float32)
                        _store_part(parts + PART, count, quarter * QUARTER, BLOCK_M, BLOCK_N, QUARTER)
                tl.debug_barrier()
                ok = cols < N
                old = cols < tl.where(first > 0, N, 0)
                _add_to_columns(col_out, parts, cols, old, ok, BLOCK_M, BLOCK_N)
                if GRADIENT:
                    _add_to_columns(col_out + col_plane, parts + PART, cols, old, ok, BLOCK_M, BLOCK_N)
    else:
        _exact_hinges(
            queries, keys, positives, weights, strip, row_out, row_plane, col_out, col_plane, first, width,
            first_row, end_row, first_col, end_col, N, M, D, stride_q, stride_k, margin,
            SYMMETRIC, GRADIENT, WEIGHTED, BLOCK_M, QUARTER if QUARTER >= 16 else BLOCK_N // 2, BLOCK_K, PRECISION,
        )  # fmt: skip


@triton.jit
def _over_parts(partials, count, length, rows, ok, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(count):
        total += tl.load(partials + tl.cast(part, tl.int64) * length + rows, mask=ok, other=0.0)
    return total


@triton.jit(do_not_specialize=["N", "num_splits", "num_groups"])
def finish_hinges_kernel(
    row_partials, col_partials, weights, losses, of_positives, N, num_splits, num_groups,
    SYMMETRIC: tl.constexpr, GRADIENT: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [N] and, with GRADIENT, of_positives [N]: the weight of each row times its hinges above 0; NaN where a
    hinge is."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = rows < N
    loss = _over_parts(row_partials, num_splits, N, rows, ok, BLOCK)
    if SYMMETRIC:
        loss = (loss + _over_parts(col_partials, num_groups, N, rows, ok, BLOCK)) * 0.5
    tl.store(losses + rows, loss, mask=ok)
    if GRADIENT:
        row_plane = tl.cast(num_splits, tl.int64) * N
        count = _over_parts(row_partials + row_plane, num_splits, N, rows, ok, BLOCK)
        if SYMMETRIC:
            col_plane = tl.cast(num_groups, tl.int64) * N
            count += _over_parts(col_partials + col_plane, num_groups, N, rows, ok, BLOCK)
        count = tl.where(loss == loss, count, loss)
        if WEIGHTED:
            count *= tl.load(weights + rows, mask=ok, other=0.0)
        tl.store(of_positives + rows, count, mask=ok)


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
def _higher(value, place, other_value, other_place):
    """The larger of two values and its place; of equals the lower place."""
    take = (other_value > value) | ((other_value == value) & (other_place < place))
    return tl.where(take, other_value, value), tl.where(take, other_place, place)


@triton.jit
def _worst_of_rows(s, best, part, positive, FIRST: tl.constexpr, SEMI_HARD: tl.constexpr):
    """Join the columns of a tile, in parts of 8 from part FIRST on, to the rows' best values [BM, 8], slot by slot, and
    the parts that have them; of equals the first."""
    WIDTH: tl.constexpr = s.shape[1]
    if WIDTH > 8:
        left, right = halves(s)
        best, part = _worst_of_rows(left, best, part, positive, FIRST, SEMI_HARD)
        best, part = _worst_of_rows(right, best, part, positive, FIRST + WIDTH // 16, SEMI_HARD)
    else:
        if SEMI_HARD:
            s = tl.where(s < positive[:, None], s, -_INFINITY)
        part = tl.where(s > best, FIRST, part)
        best = tl.maximum(best, s)
    return best, part


@triton.jit
def _worst_of_columns(s, best, place, positive, now, SEMI_HARD: tl.constexpr):
    """Join some rows of a tile to the columns' best values, slot by slot, and their places; of equals the first."""
    if SEMI_HARD:
        s = tl.where(s < positive[None, :], s, -_INFINITY)
    return tl.maximum(best, s), tl.where(s > best, now, place)


@triton.jit
def _store_worst_of_columns(
    best, place, parts, col_best, col_index, cols, first_row, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The best of each column over the slots, and the first row that has it. The slots of sixteen rows lie in one warp;
    what the warps have goes through parts [2, BM / 16, BN] in memory: the bits of the values, and the rows."""
    SLOTS: tl.constexpr = best.shape[0]
    PARTS: tl.constexpr = BLOCK_M // 16
    FOLD: tl.constexpr = BLOCK_M // SLOTS
    slot = tl.arange(0, SLOTS)
    start = first_row + (slot // 8 * (8 * FOLD) + slot % 8)[:, None]
    part = tl.arange(0, PARTS)
    HALF: tl.constexpr = BLOCK_N // 2
    shape: tl.constexpr = (PARTS, SLOTS // PARTS, HALF)
    left, right = halves(best)
    left_place, right_place = halves(place)
    for half in tl.static_range(2):
        place = left_place if half == 0 else right_place
        row = start + place // FOLD * BLOCK_M + place % FOLD * 8
        value = tl.reshape(left if half == 0 else right, shape)
        value, row = tl.reduce((value, tl.reshape(row, shape)), 1, _higher)
        at = parts + part[:, None] * BLOCK_N + (half * HALF + tl.arange(0, HALF))[None, :]
        tl.store(at, value.to(tl.int32, bitcast=True))
        tl.store(at + PARTS * BLOCK_N, row)
    col = tl.arange(0, BLOCK_N)
    tl.debug_barrier()
    value = tl.load(parts + col).to(tl.float32, bitcast=True)
    row = tl.load(parts + PARTS * BLOCK_N + col)
    for index in tl.static_range(1, PARTS):
        at = parts + index * BLOCK_N + col
        value, row = _higher(value, row, tl.load(at).to(tl.float32, bitcast=True), tl.load(at + PARTS * BLOCK_N))
    tl.store(col_best + cols, value, mask=cols < N)
    tl.store(col_index + cols, row, mask=cols < N)


@triton.jit
def _candidates(s, positive, margin, negative, SEMI_HARD: tl.constexpr):
    """The similarities of the negatives that may be the worst, infinity for a NaN; minus infinity for the others."""
    value = tl.where(s == s, s, _INFINITY)
    if SEMI_HARD:
        negative &= ~(s >= positive) & ~((s - positive) + margin <= 0.0)
    return tl.where(negative, value, -_INFINITY)


@triton.jit
def _exact_worst(
    queries, keys, positives, row_best, row_index, col_best, col_index, first_row, end_row, first_col, end_col,
    N, M, D, stride_q, stride_k, margin, SYMMETRIC: tl.constexpr, SEMI_HARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What worst_kernel makes of a block, of any similarities. The columns' worst grow in memory."""
    for row_start in tl.range(first_row, end_row, BLOCK_M, disable_licm=True):
        rows = row_start + tl.arange(0, BLOCK_M)
        row_ok = rows < N
        row_positive = tl.load(positives + rows, mask=row_ok, other=0.0)
        row_value = tl.full((BLOCK_M,), -_INFINITY, tl.float32)
        row_place = tl.zeros((BLOCK_M,), tl.int32)
        for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
            cols = col_start + tl.arange(0, BLOCK_N)
            s = similarities(
                queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            negative = row_ok[:, None] & (cols < M)[None, :] & (rows[:, None] != cols[None, :])
            value = _candidates(s, row_positive[:, None], margin, negative, SEMI_HARD)
            best = tl.max(value, 1)
            place = tl.min(tl.where(value == best[:, None], cols[None, :], _LAST), 1)
            row_place = tl.where(best > row_value, place, row_place)
            row_value = tl.maximum(row_value, best)
            if SYMMETRIC:
                matched = cols < N
                positive = tl.load(positives + cols, mask=matched, other=0.0)
                value = _candidates(s, positive[None, :], margin, negative, SEMI_HARD)
                best = tl.max(value, 0)
                place = tl.min(tl.where(value == best[None, :], rows[:, None], _LAST), 0)
                old = cols < tl.where(row_start > first_row, N, 0)
                old_best = tl.load(col_best + cols, mask=old, other=-_INFINITY)
                old_place = tl.load(col_index + cols, mask=old, other=0)
                all_have_read()
                tl.store(col_index + cols, tl.where(best > old_best, place, old_place), mask=matched)
                tl.store(col_best + cols, tl.maximum(old_best, best), mask=matched)
        tl.store(row_best + rows, row_value, mask=row_ok)
        tl.store(row_index + rows, row_place, mask=row_ok)
        tl.debug_barrier()  # threads read what others of this program wrote for the columns


@triton.jit(do_not_specialize=["N", "M", "tiles_per_group", "tiles_per_split", "num_groups", "num_splits", "margin"])
def worst_kernel(
    queries, keys, positives, peaks, row_best, row_index, col_best, col_index, parts,
    N, M, D, stride_q, stride_k, tiles_per_group, tiles_per_split, num_groups, num_splits, margin,
    SYMMETRIC: tl.constexpr, SEMI_HARD: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The worst negative of a group of rows in a split of the columns, and of these columns in the group, column by
    column of tiles.

    row_best and row_index [num_splits, N], col_best and col_index [num_groups, N]: its similarity, and the first place
    that has it. The rows' grow in memory, which this program alone owns; the columns' in registers.

    A semi-hard negative is the largest similarity below the positive here. finish_worst_kernel finds the few that lie
    so far below that they cost nothing: if the largest does, all do. No comparison asks for a NaN where no similarity
    can be one; see _exact_worst for all others.
    """
    group, split, first_row, end_row, first_col, end_col = block_of_tiles(
        tl.program_id(0), N, M, tiles_per_group, tiles_per_split, num_groups, num_splits, BLOCK_M, BLOCK_N
    )
    row_best += split.to(tl.int64) * N
    row_index += split.to(tl.int64) * N
    col_best += group.to(tl.int64) * N
    col_index += group.to(tl.int64) * N
    parts += tl.program_id(0) * (2 * (BLOCK_M // 16) * BLOCK_N)
    FOLD: tl.constexpr = 2 if BLOCK_M >= 128 else 1
    SLOTS: tl.constexpr = BLOCK_M // FOLD
    if _all_finite(peaks, M, D, BLOCK_M):
        for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
            cols = col_start + tl.arange(0, BLOCK_N)
            col_value = tl.full((SLOTS, BLOCK_N), -_INFINITY, tl.float32)
            col_place = tl.zeros((SLOTS, BLOCK_N), tl.int32)
            tl.debug_barrier()  # threads read what others of this program wrote for the rows
            for row_start in tl.range(first_row, end_row, BLOCK_M, disable_licm=True):
                rows = row_start + tl.arange(0, BLOCK_M)
                row_ok = rows < N
                row_positive = tl.load(positives + rows, mask=row_ok, other=0.0)
                tile = similarities(
                    queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
                )  # fmt: skip
                inside = (row_start + BLOCK_M <= N) & (col_start + BLOCK_N <= M)
                diagonal = (row_start < col_start + BLOCK_N) & (col_start < row_start + BLOCK_M)
                if diagonal | (not inside):
                    negative = row_ok[:, None] & (cols < M)[None, :] & (rows[:, None] != cols[None, :])
                    tile = tl.where(negative, tile, -_INFINITY)
                old = rows < tl.where(col_start > first_col, N, 0)
                old_best = tl.load(row_best + rows, mask=old, other=-_INFINITY)
                old_index = tl.load(row_index + rows, mask=old, other=0)
                best = tl.full((BLOCK_M, 8), -_INFINITY, tl.float32)
                part = tl.zeros((BLOCK_M, 8), tl.int32)
                best, part = _worst_of_rows(tile, best, part, row_positive, 0, SEMI_HARD)
                best, index = tl.reduce((best, part * 8 + tl.arange(0, 8)[None, :]), 1, _higher)
                all_have_read()
                tl.store(row_index + rows, tl.where(best > old_best, col_start + index, old_index), mask=row_ok)
                tl.store(row_best + rows, tl.maximum(old_best, best), mask=row_ok)
                if SYMMETRIC:
                    positive = tl.load(positives + cols)
                    now = (row_start - first_row) // BLOCK_M * FOLD
                    if FOLD == 1:
                        col_value, col_place = _worst_of_columns(tile, col_value, col_place, positive, now, SEMI_HARD)
                    else:  # a thread has rows 8 apart in its registers
                        pairs = tl.reshape(tile, (BLOCK_M // 16, 2, 8, BLOCK_N))
                        upper, lower = tl.split(tl.permute(pairs, (0, 2, 3, 1)))
                        col_value, col_place = _worst_of_columns(
                            tl.reshape(upper, (SLOTS, BLOCK_N)), col_value, col_place, positive, now, SEMI_HARD
                        )
                        col_value, col_place = _worst_of_columns(
                            tl.reshape(lower, (SLOTS, BLOCK_N)), col_value, col_place, positive, now + 1, SEMI_HARD
                        )
            if SYMMETRIC:
                _store_worst_of_columns(
                    col_value, col_place, parts, col_best, col_index, cols, first_row, N, BLOCK_M, BLOCK_N
                )
    else:
        EXACT: tl.constexpr = BLOCK_N // 4 if BLOCK_N > 32 else BLOCK_N // 2
        _exact_worst(
            queries, keys, positives, row_best, row_index, col_best, col_index, first_row, end_row, first_col, end_col,
            N, M, D, stride_q, stride_k, margin, SYMMETRIC, SEMI_HARD, BLOCK_M, EXACT, BLOCK_K, PRECISION,
        )  # fmt: skip


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
