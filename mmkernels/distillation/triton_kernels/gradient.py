"""The kernels of distillation's backward pass: the gradient of the student's logits from tiles of both logits."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.engine import (
    add_products,
    halves,
    offsets_in_tile,
    similarities,
    softmax_grads,
    store_in_strip,
    strip_place,
    strip_tile,
)
from mmkernels._tiles.factors import common_exponent, store_factors
from mmkernels._tiles.triton import LOG2E


@triton.jit(do_not_specialize=["N", "M"])
def distillation_factors_kernel(
    row_lse, col_lse, teacher_row_lse, teacher_col_lse, weights, teacher_weights,
    row_factors, col_factors, row_bounds, col_bounds, N, M,
    SYMMETRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The factors of rows [2, N] and columns [2, M] of the student's softmaxes (program_id(1) = 0) and the teacher's
    (1), and the bounds of their blocks, [2, 2, blocks]; see mmkernels._tiles.factors."""
    row_blocks = tl.cdiv(N, BLOCK_M)
    col_blocks = tl.cdiv(M, BLOCK_N)
    of = tl.program_id(1)
    if of > 0:
        row_lse = teacher_row_lse
        col_lse = teacher_col_lse
        weights = teacher_weights
    block = tl.program_id(0)
    if block < row_blocks:
        rows = block * BLOCK_M + tl.arange(0, BLOCK_M)
        bounds = row_bounds + of * 2 * row_blocks
        store_factors(row_lse, weights, row_factors + of * N, bounds, N, rows, block, row_blocks)
    elif SYMMETRIC:
        cols = (block - row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
        bounds = col_bounds + of * 2 * col_blocks
        store_factors(col_lse, weights, col_factors + of * M, bounds, M, cols, block - row_blocks, col_blocks)


@triton.jit
def _common_exponents(
    row_bounds, col_bounds, first_row, first_col, N, M, SYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Whether a tile may take one exponential for both softmaxes of either model, for it lies off the diagonal and its
    log-sum-exps near each other; and c and shift of both."""
    near, c, shift = common_exponent(
        row_bounds, col_bounds, first_row, first_col, N, M, SYMMETRIC, BLOCK_M, BLOCK_N
    )  # fmt: skip
    row_bounds += 2 * tl.cdiv(N, BLOCK_M)
    col_bounds += 2 * tl.cdiv(M, BLOCK_N)
    teacher_near, teacher_c, teacher_shift = common_exponent(
        row_bounds, col_bounds, first_row, first_col, N, M, SYMMETRIC, BLOCK_M, BLOCK_N
    )  # fmt: skip
    apart = (first_row + BLOCK_M <= first_col) | (first_col + BLOCK_N <= first_row)
    return near & teacher_near & apart, c, shift, teacher_c, teacher_shift


@triton.jit
def _store_near(
    s, t, scale2, teacher_scale2, c, teacher_c, factor, teacher_factor, col_factors, strip,
    first_col, row_in_strip, col_in_strip, width, M,
    SYMMETRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dS of a tile whose log-sum-exps lie near each other, of its products s and t, into the strip."""
    in_cols = col_in_strip + tl.arange(0, BLOCK_N)
    p = tl.exp2(tl.fma(s, tl.zeros_like(s) + scale2, tl.zeros_like(s) - c))
    q = tl.exp2(tl.fma(t, tl.zeros_like(t) + teacher_scale2, tl.zeros_like(t) - teacher_c))
    if SYMMETRIC:
        at = col_factors + first_col + in_cols
        p *= factor[:, None] + tl.load(at)[None, :]
        q *= teacher_factor[:, None] + tl.load(at + M)[None, :]
    else:
        p *= factor[:, None]
        q *= teacher_factor[:, None]
    in_rows = row_in_strip + tl.arange(0, BLOCK_M)
    out = strip + in_rows.to(tl.int64)[:, None] * width + in_cols[None, :]
    tl.store(out, (p - q).to(strip.dtype.element_ty))


@triton.jit
def _store_exact(
    s, t, row_lse, col_lse, teacher_row_lse, teacher_col_lse, weights, teacher_weights, match_weights, strip,
    first_row, first_col, row_in_strip, col_in_strip, width, N, M,
    SYMMETRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dS of any tile of both logits into the strip that begins at first_row, first_col of the logits."""
    in_rows, in_cols, rows, cols, row_ok, col_ok = strip_tile(
        first_row, first_col, row_in_strip, col_in_strip, N, M, BLOCK_M, BLOCK_N
    )
    here = rows[:, None] == cols[None, :]
    matches = tl.max(tl.max(here.to(tl.int32), 1), 0)
    row_weight = tl.load(weights + rows, mask=row_ok, other=0.0)
    col_weight = tl.load(weights + cols, mask=col_ok, other=0.0) if SYMMETRIC else row_weight
    grad = softmax_grads(
        s, rows, cols, row_lse, col_lse, row_weight, col_weight, N, M, row_ok, col_ok, matches, SYMMETRIC
    )  # fmt: skip
    row_weight = tl.load(teacher_weights + rows, mask=row_ok, other=0.0)
    col_weight = tl.load(teacher_weights + cols, mask=col_ok, other=0.0) if SYMMETRIC else row_weight
    grad -= softmax_grads(
        t, rows, cols, teacher_row_lse, teacher_col_lse, row_weight, col_weight, N, M, row_ok, col_ok, matches,
        SYMMETRIC,
    )  # fmt: skip
    if matches > 0:
        grad -= tl.where(here, tl.load(match_weights + rows, mask=row_ok, other=0.0)[:, None], 0.0)

    inside = row_ok[:, None] & col_ok[None, :]
    store_in_strip(strip, grad, in_rows, in_cols, inside, width)


@triton.jit(do_not_specialize=["first_row", "first_col", "N", "M"])
def distillation_grad_kernel(
    queries, keys, scale, teacher_queries, teacher_keys, teacher_scale,
    row_lse, col_lse, teacher_row_lse, teacher_col_lse, weights, teacher_weights, match_weights,
    row_factors, col_factors, row_bounds, col_bounds, strip,
    first_row, first_col, height, width, N, M, D, TEACHER_D, stride_q, stride_k, stride_tq, stride_tk,
    SYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """strip [height, width] = the part of dS that begins at first_row, first_col. Zero past the ends of dS.

    dS_ij = w_i p_ij + w_j p'_ij - v_i P_ij - v_j P'_ij - g_i [i = j], the terms in j with SYMMETRIC alone: p, p' the
    student's softmaxes over rows and columns, P, P' the teacher's; w, v, g: weights, teacher_weights, match_weights.

    A tile inside dS, off the diagonal and with log-sum-exps near each other, takes one exponential an entry for both
    softmaxes of a model, of the factors and bounds that distillation_factors_kernel has stored.
    """
    scale2 = tl.load(scale) * LOG2E
    teacher_scale2 = tl.load(teacher_scale) * LOG2E
    # FLAT: one loop over tiles and features. The first copies of a tile are on their way during the epilogue of the
    # last. It takes the tiles inside the logits.
    row_tiles = tl.minimum(height, tl.maximum(N - first_row, 0)) // BLOCK_M
    col_tiles = tl.minimum(width, tl.maximum(M - first_col, 0)) // BLOCK_N
    inside = row_tiles * col_tiles
    tiles = height // BLOCK_M * (width // BLOCK_N)
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    left_out = inside < tiles
    index = program - programs
    row = first_row
    col = first_col
    # Of the tile whose products are summed, while the copies are those of the next.
    done = program
    done_row, done_col = strip_place(done, row_tiles * BLOCK_M, col_tiles * BLOCK_N, BLOCK_M, BLOCK_N)
    near, c, shift, teacher_c, teacher_shift = _common_exponents(
        row_bounds, col_bounds, first_row + done_row, first_col + done_col, N, M, SYMMETRIC, BLOCK_M, BLOCK_N
    )
    x_offsets = offsets_in_tile(stride_q, BLOCK_M, BLOCK_K)
    y_offsets = offsets_in_tile(stride_k, BLOCK_N, BLOCK_K)
    teacher_x_offsets = offsets_in_tile(stride_tq, BLOCK_M, BLOCK_K)
    teacher_y_offsets = offsets_in_tile(stride_tk, BLOCK_N, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    teacher_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    longest = tl.maximum(D, TEACHER_D)
    start = longest
    mine = tl.cdiv(tl.maximum(inside - program, 0), programs)
    for _ in tl.range(0, mine * (tl.cdiv(longest, BLOCK_K) if FLAT else 1), disable_licm=True):
        if FLAT:
            start = tl.where(start + BLOCK_K < longest, start + BLOCK_K, 0)
            if start == 0:
                index += programs
                row, col = strip_place(index, row_tiles * BLOCK_M, col_tiles * BLOCK_N, BLOCK_M, BLOCK_N)
            acc = add_products(
                acc, queries, keys, first_row + row, first_col + col, stride_q, stride_k, x_offsets, y_offsets,
                start, D, BLOCK_K, PRECISION,
            )  # fmt: skip
            teacher_acc = add_products(
                teacher_acc, teacher_queries, teacher_keys, first_row + row, first_col + col, stride_tq, stride_tk,
                teacher_x_offsets, teacher_y_offsets, start, TEACHER_D, BLOCK_K, PRECISION,
            )  # fmt: skip
        else:
            rows = first_row + done_row + tl.arange(0, BLOCK_M)
            cols = first_col + done_col + tl.arange(0, BLOCK_N)
            acc = similarities(
                queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            teacher_acc = similarities(
                teacher_queries, teacher_keys, rows, cols, N, M, TEACHER_D, stride_tq, stride_tk,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
        if start + BLOCK_K >= longest:
            # The wait for the products, which all warps must come to, stands where these are first used.
            left, right = halves(acc)
            teacher_left, teacher_right = halves(teacher_acc)
            WIDTH: tl.constexpr = BLOCK_N // 4
            if near:
                at = row_factors + first_row + done_row + tl.arange(0, BLOCK_M)
                factor = tl.load(at)
                teacher_factor = tl.load(at + N)
                if SYMMETRIC:
                    factor *= tl.exp2(shift)
                    teacher_factor *= tl.exp2(teacher_shift)
                # The quarters of a tile go one after the other, so that they need not share the registers.
                for quarter in tl.static_range(4):
                    if quarter % 2 == 0:
                        now, later = halves(left if quarter == 0 else right)
                        teacher_now, teacher_later = halves(teacher_left if quarter == 0 else teacher_right)
                    else:
                        now = later
                        teacher_now = teacher_later
                    _store_near(
                        now, teacher_now, scale2, teacher_scale2, c, teacher_c, factor, teacher_factor, col_factors,
                        strip, first_col, done_row, done_col + quarter * WIDTH, width, M, SYMMETRIC, BLOCK_M, WIDTH,
                    )  # fmt: skip
            left_out |= ~near
            done += programs
            done_row, done_col = strip_place(done, row_tiles * BLOCK_M, col_tiles * BLOCK_N, BLOCK_M, BLOCK_N)
            near, c, shift, teacher_c, teacher_shift = _common_exponents(
                row_bounds, col_bounds, first_row + done_row, first_col + done_col, N, M, SYMMETRIC, BLOCK_M, BLOCK_N
            )
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            teacher_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if left_out:
        # Such tiles are few: parts of their own, though more work, leave the registers to the others.
        PART: tl.constexpr = BLOCK_N // 4 if BLOCK_N > 32 else BLOCK_N // 2
        for step in tl.range(0, tl.cdiv(tl.maximum(tiles - program, 0), programs), disable_licm=True):
            row, col = strip_place(program + step * programs, height, width, BLOCK_M, BLOCK_N)
            near, c, shift, teacher_c, teacher_shift = _common_exponents(
                row_bounds, col_bounds, first_row + row, first_col + col, N, M, SYMMETRIC, BLOCK_M, BLOCK_N
            )
            near &= (first_row + row + BLOCK_M <= N) & (first_col + col + BLOCK_N <= M)
            if not near:
                rows = first_row + row + tl.arange(0, BLOCK_M)
                for start in tl.range(0, BLOCK_N, PART, disable_licm=True):
                    cols = first_col + col + start + tl.arange(0, PART)
                    s = similarities(
                        queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, PART, BLOCK_K, PRECISION,
                    )  # fmt: skip
                    t = similarities(
                        teacher_queries, teacher_keys, rows, cols, N, M, TEACHER_D, stride_tq, stride_tk,
                        BLOCK_M, PART, BLOCK_K, PRECISION,
                    )  # fmt: skip
                    _store_exact(
                        scale2 * s, teacher_scale2 * t, row_lse, col_lse, teacher_row_lse, teacher_col_lse, weights,
                        teacher_weights, match_weights, strip, first_row, first_col, row, col + start, width, N, M,
                        SYMMETRIC, BLOCK_M, PART,
                    )  # fmt: skip
