"""Distillation in Triton: the cross-entropies of the student's softmaxes under the teacher's, over tiles of both.

Forward, G + G' = 2 N M (D + D') FLOP: a program owns a block of tiles. It makes the student's tile and the teacher's,
and joins what rows and columns need of both: the maximum m and the sum z of 2^(s - m), the teacher's n and y of
2^(t - n), and a, the sum of 2^(t - n) (s - m). The loss of a row is log2 z - a / y. Partial results, at most 32 for
each row and each column, are merged in a fixed order.

Backward, 3 G + G': strips as in info_nce, with the gradient of the logits from both tiles.

No atomics: results are the same bits from run to run. Logits are in base 2 inside the kernels.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._tiles.configs import choose, choose_distillation
from mmkernels._tiles.engine import (
    LEAST_SUM,
    all_have_read,
    block_of_tiles,
    halves,
    partials_of_block,
    similarities,
    softmax_grads,
    store_in_strip,
    store_in_two,
    strip_place,
    strip_tile,
    tile_statistics,
)
from mmkernels._tiles.launch import MERGE_BLOCK, aligned, launcher, walk_over
from mmkernels._tiles.products import fp16_unit, gradients_of_both
from mmkernels._tiles.triton import LN2, LOG2E, LOWEST, Tile, cdiv, on_device

_SUMS = 5  # the sums of a row or a column: m, z, n, y, a


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
def _teacher_sums(s, t, m, peak, ok, AXIS: tl.constexpr):
    """y and a of the rows (AXIS 1) or columns (AXIS 0) of a tile, relative to their m and n = peak, or to all of it."""
    mass = tl.exp2(t - peak)
    return tl.sum(mass, AXIS), tl.sum(tl.where(ok, mass * (s - tl.expand_dims(m, AXIS)), 0.0), AXIS)


@triton.jit
def _add_to_sums(
    s, t, m, z, n, y, a, rows, positives, col_out, col_plane, col_start, N, M, first,
    SYMMETRIC: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The rows' sums with the columns col_start and following; the columns' in memory, anew if `first`."""
    cols = col_start + tl.arange(0, WIDTH)
    row_ok = rows < N
    col_ok = cols < M
    ok = row_ok[:, None] & col_ok[None, :]
    here = rows[:, None] == cols[None, :]
    matches = tl.max(tl.max(here.to(tl.int32), 1), 0)
    if matches > 0:
        tl.store(
            positives + rows,
            tl.sum(tl.where(here, s, 0.0), 1),
            mask=(rows >= col_start) & (rows < col_start + WIDTH) & row_ok,
        )
    s = tl.where(ok, s, float("-inf"))
    t = tl.where(ok, t, float("-inf"))

    row_m, row_z, col_m, col_z = tile_statistics(s, row_ok, col_ok, matches, SYMMETRIC)
    peak = tl.maximum(tl.max(tl.max(t, 1), 0), LOWEST)
    row_y, row_a = _teacher_sums(s, t, row_m, peak, ok, 1)
    row_n = tl.full((rows.shape[0],), 0.0, tl.float32) + peak
    col_n = tl.full((WIDTH,), 0.0, tl.float32) + peak
    least = tl.min(tl.where(row_ok, row_y, 1.0), 0)
    col_y = col_z
    col_a = col_z
    if SYMMETRIC:
        col_y, col_a = _teacher_sums(s, t, col_m, peak, ok, 0)
        least = tl.minimum(least, tl.min(tl.where(col_ok, col_y, 1.0), 0))
    # One exponential serves rows and columns if all of them come near the maximum of the tile.
    if least <= LEAST_SUM:
        row_n = tl.maximum(tl.max(t, 1), LOWEST)
        row_y, row_a = _teacher_sums(s, t, row_m, row_n[:, None], ok, 1)
        if SYMMETRIC:
            col_n = tl.maximum(tl.max(t, 0), LOWEST)
            col_y, col_a = _teacher_sums(s, t, col_m, col_n[None, :], ok, 0)
    m, z, n, y, a = _join(m, z, n, y, a, row_m, row_z, row_n, row_y, row_a)
    if SYMMETRIC:
        at = col_out + cols
        old_m, old_z, old_n, old_y, old_a = _load_sums(at, col_plane, cols < tl.where(first, 0, M))
        col_m, col_z, col_n, col_y, col_a = _join(
            old_m, old_z, old_n, old_y, old_a, col_m, col_z, col_n, col_y, col_a
        )  # fmt: skip
        all_have_read()
        _store_sums(at, col_plane, col_m, col_z, col_n, col_y, col_a, col_ok)
    return m, z, n, y, a


@triton.jit(do_not_specialize=["N", "M", "tiles_per_group", "tiles_per_split", "num_groups", "num_splits"])
def distillation_forward_kernel(
    queries, keys, scale, teacher_queries, teacher_keys, teacher_scale, positives, row_partials, col_partials,
    N, M, D, TEACHER_D, stride_q, stride_k, stride_tq, stride_tk,
    tiles_per_group, tiles_per_split, num_groups, num_splits,
    SYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sums of a group of rows against a split of the columns: row_partials [5, num_splits, N] and col_partials
    [5, num_groups, M]; positives [N] takes s[i, i] from the same tile as the sums.

    The columns' sums grow in col_partials itself: this program alone owns its part of them.
    """
    group, split, first_row, end_row, first_col, end_col = block_of_tiles(
        tl.program_id(0), N, M, tiles_per_group, tiles_per_split, num_groups, num_splits, BLOCK_M, BLOCK_N
    )
    scale2 = tl.load(scale) * LOG2E
    teacher_scale2 = tl.load(teacher_scale) * LOG2E
    row_out, row_plane, col_out, col_plane = partials_of_block(
        row_partials, col_partials, group, split, N, M, num_groups, num_splits
    )

    for row_start in tl.range(first_row, end_row, BLOCK_M, disable_licm=True):
        rows = row_start + tl.arange(0, BLOCK_M)
        m = tl.full((BLOCK_M,), LOWEST, tl.float32)
        n = tl.full((BLOCK_M,), LOWEST, tl.float32)
        z = tl.zeros((BLOCK_M,), tl.float32)
        y = tl.zeros((BLOCK_M,), tl.float32)
        a = tl.zeros((BLOCK_M,), tl.float32)
        if SYMMETRIC:
            # Below, threads read what others of this program wrote to col_partials for the tiles above.
            tl.debug_barrier()
        for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
            cols = col_start + tl.arange(0, BLOCK_N)
            student = similarities(
                queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            teacher = similarities(
                teacher_queries, teacher_keys, rows, cols, N, M, TEACHER_D, stride_tq, stride_tk,
                BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
            first = row_start == first_row
            # The halves of a tile go one after the other, so that they need not share the registers.
            HALF: tl.constexpr = BLOCK_N // 2
            s_left, s_right = halves(scale2 * student)
            t_left, t_right = halves(teacher_scale2 * teacher)
            m, z, n, y, a = _add_to_sums(
                s_left, t_left, m, z, n, y, a, rows, positives, col_out, col_plane, col_start, N, M, first,
                SYMMETRIC, HALF,
            )  # fmt: skip
            m, z, n, y, a = _add_to_sums(
                s_right, t_right, m, z, n, y, a, rows, positives, col_out, col_plane, col_start + HALF, N, M, first,
                SYMMETRIC, HALF,
            )  # fmt: skip
        _store_sums(row_out + rows, row_plane, m, z, n, y, a, rows < N)


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


@triton.jit
def _store_grad(
    s, t, row_lse, col_lse, teacher_row_lse, teacher_col_lse, weights, teacher_weights, match_weights, strip,
    first_row, first_col, row_in_strip, col_in_strip, width, N, M,
    SYMMETRIC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dS of a tile of both logits into the strip that begins at first_row, first_col of the logits."""
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
    row_lse, col_lse, teacher_row_lse, teacher_col_lse, weights, teacher_weights, match_weights, strip,
    first_row, first_col, height, width, N, M, D, TEACHER_D, stride_q, stride_k, stride_tq, stride_tk,
    SYMMETRIC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """strip [height, width] = the part of dS that begins at first_row, first_col. Zero past the ends of dS.

    dS_ij = w_i p_ij + w_j p'_ij - v_i P_ij - v_j P'_ij - g_i [i = j], the terms in j with SYMMETRIC alone: p, p' the
    student's softmaxes over rows and columns, P, P' the teacher's; w, v, g: weights, teacher_weights, match_weights.
    """
    row_in_strip, col_in_strip = strip_place(tl.program_id(0), height, width, BLOCK_M, BLOCK_N)
    rows = first_row + row_in_strip + tl.arange(0, BLOCK_M)
    cols = first_col + col_in_strip + tl.arange(0, BLOCK_N)
    student = similarities(
        queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    teacher = similarities(
        teacher_queries, teacher_keys, rows, cols, N, M, TEACHER_D, stride_tq, stride_tk,
        BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    s_left, s_right = halves((tl.load(scale) * LOG2E) * student)
    t_left, t_right = halves((tl.load(teacher_scale) * LOG2E) * teacher)
    HALF: tl.constexpr = BLOCK_N // 2
    _store_grad(
        s_left, t_left, row_lse, col_lse, teacher_row_lse, teacher_col_lse, weights, teacher_weights, match_weights,
        strip, first_row, first_col, row_in_strip, col_in_strip, width, N, M, SYMMETRIC, BLOCK_M, HALF,
    )  # fmt: skip
    _store_grad(
        s_right, t_right, row_lse, col_lse, teacher_row_lse, teacher_col_lse, weights, teacher_weights, match_weights,
        strip, first_row, first_col, row_in_strip, col_in_strip + HALF, width, N, M, SYMMETRIC, BLOCK_M, HALF,
    )  # fmt: skip


def distillation_forward(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    teacher_queries: Tensor,  # [N, D']
    teacher_keys: Tensor,  # [M, D']
    teacher_scale: Tensor,  # []
    symmetric: bool,
    keep_products: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses under the teacher [N] and under the diagonal [N]; of the student and of the teacher the log-sum-exps
    of the rows [2, N] and of the columns [2, M] ([2, 0] unless symmetric), in base 2; no products are kept."""
    if keep_products:
        raise NotImplementedError("keep_products: expected False, the Triton kernels make the products again")
    N, M = queries.shape[0], keys.shape[0]
    _, precision = choose(queries)
    tile = choose_distillation(queries).forward
    queries, keys = aligned(queries), aligned(keys)
    teacher_queries, teacher_keys = aligned(teacher_queries), aligned(teacher_keys)

    walk = walk_over(N, M, tile)
    distilled, matched, positives = (scale.new_empty(N) for _ in range(3))
    row_lse, teacher_row_lse = (scale.new_empty(2, N) for _ in range(2))
    col_lse, teacher_col_lse = (scale.new_empty(2, M if symmetric else 0) for _ in range(2))
    row_partials = scale.new_empty(_SUMS, walk.splits, N)
    col_partials = scale.new_empty(_SUMS, walk.groups, M) if symmetric else row_partials
    with on_device(queries.device):
        launcher(distillation_forward_kernel, tile, SYMMETRIC=symmetric, PRECISION=precision)(
            (walk.groups * walk.splits,),
            queries, keys, scale, teacher_queries, teacher_keys, teacher_scale, positives, row_partials, col_partials,
            N, M, queries.shape[1], teacher_queries.shape[1],
            queries.stride(0), keys.stride(0), teacher_queries.stride(0), teacher_keys.stride(0), *walk,
        )  # fmt: skip
        launcher(finish_distillation_kernel, SYMMETRIC=symmetric, BLOCK=MERGE_BLOCK)(
            (cdiv(N, MERGE_BLOCK),),
            row_partials, col_partials, positives, distilled, matched,
            row_lse, col_lse, teacher_row_lse, teacher_col_lse, N, M, walk.groups, walk.splits,
        )  # fmt: skip
    return distilled, matched, row_lse, col_lse, teacher_row_lse, teacher_col_lse, scale.new_empty(0, M, N)


class _Logits(NamedTuple):
    """All that the gradient of the student's logits depends on."""

    queries: Tensor  # [N, D]
    keys: Tensor  # [M, D]
    scale: Tensor  # []
    teacher_queries: Tensor  # [N, D']
    teacher_keys: Tensor  # [M, D']
    teacher_scale: Tensor  # []
    row_lse: Tensor  # [2, N]
    col_lse: Tensor  # [2, M]
    teacher_row_lse: Tensor  # [2, N]
    teacher_col_lse: Tensor  # [2, M]
    weights: Tensor  # [N], multiply the student's softmaxes over row i and column i
    teacher_weights: Tensor  # [N], multiply the teacher's
    match_weights: Tensor  # [N], multiply the indicator of query i and key i
    symmetric: bool
    tile: Tile
    precision: str

    def fill(self, strip: Tensor, first_row: int, first_col: int) -> None:
        """The part of dS that begins at first_row, first_col into the strip; see gradients_of_both."""
        queries, keys, teacher_queries, teacher_keys = self.queries, self.keys, self.teacher_queries, self.teacher_keys
        height, width = strip.shape
        launcher(distillation_grad_kernel, self.tile, SYMMETRIC=self.symmetric, PRECISION=self.precision)(
            (height // self.tile.block_m * (width // self.tile.block_n),),
            queries, keys, self.scale, teacher_queries, teacher_keys, self.teacher_scale,
            self.row_lse, self.col_lse, self.teacher_row_lse, self.teacher_col_lse,
            self.weights, self.teacher_weights, self.match_weights, strip,
            first_row, first_col, height, width, len(queries), len(keys), queries.shape[1], teacher_queries.shape[1],
            queries.stride(0), keys.stride(0), teacher_queries.stride(0), teacher_keys.stride(0),
        )  # fmt: skip


def distillation_backward(
    grad_distilled: Tensor,  # [N]
    grad_matched: Tensor,  # [N]
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    teacher_queries: Tensor,  # [N, D']
    teacher_keys: Tensor,  # [M, D']
    teacher_scale: Tensor,  # []
    row_lse: Tensor,  # [2, N]
    col_lse: Tensor,  # [2, M]
    teacher_row_lse: Tensor,  # [2, N]
    teacher_col_lse: Tensor,  # [2, M]
    products: Tensor,  # none
    symmetric: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and scale; an empty tensor for each false entry of output_mask."""
    grad_queries = queries.new_empty(queries.shape if output_mask[0] else 0)
    grad_keys = keys.new_empty(keys.shape if output_mask[1] else 0)
    config, precision = choose(queries)
    match_weights = grad_matched.float()
    share = 0.5 if symmetric else 1.0
    teacher_weights = share * grad_distilled.float()
    weights = teacher_weights + share * match_weights
    factor = scale
    unit = None
    with on_device(queries.device):
        if queries.dtype == torch.float16:
            # |dS| <= 5 peak.
            unit = fp16_unit(torch.maximum(teacher_weights.abs().amax(), match_weights.abs().amax()))
            factor = scale * unit
            weights, teacher_weights, match_weights = weights / unit, teacher_weights / unit, match_weights / unit
        logits = _Logits(
            aligned(queries), aligned(keys), scale, aligned(teacher_queries), aligned(teacher_keys), teacher_scale,
            row_lse, col_lse, teacher_row_lse, teacher_col_lse, weights, teacher_weights, match_weights.contiguous(),
            symmetric, choose_distillation(queries).grad_logits, precision,
        )  # fmt: skip
        grad_scale = gradients_of_both(
            logits.fill, logits.queries, logits.keys, logits.tile, config.product, precision, factor,
            grad_queries if output_mask[0] else None, grad_keys if output_mask[1] else None, output_mask[2],
        )  # fmt: skip
    return grad_queries, grad_keys, grad_scale if unit is None or not output_mask[2] else grad_scale * unit
