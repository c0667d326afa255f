"""The sigmoid loss in Triton, on the tiles and strips of mmkernels._tiles.

G = 2 N M D FLOP. The losses alone take 1 G. The gradients take 3 G: a strip of rows of dS, the gradient of the logits,
is stored in the dtype of the features; a plain product of the strip gives dQ, and one of the strip transposed is added
to dK. The kernel that makes the strips sums up the losses and the gradients of scale and bias from the same tiles, in
float32: it needs no forward pass.

Memory beyond inputs and outputs: 4 N bytes, partial sums of at most 16 MiB (of one tile's height of rows, if that is
more), and one strip with its products, as for info_nce. No atomics: results are the same bits from run to run.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._tiles.configs import choose, choose_tile
from mmkernels._tiles.engine import halves, program_tile, similarities
from mmkernels._tiles.launch import aligned, launcher
from mmkernels._tiles.products import fp16_unit, gradients_of_both
from mmkernels._tiles.triton import LN2, LOG2E, cdiv, on_device, round_up

_PROGRAMS = 1024  # of a launch, if it has as many tiles
_TILES = 4  # of a program at most: longer sums in float32 would lose digits
_PARTIAL_BYTES = 16 << 20  # sums of programs that are held at once, without a strip
SUM_ROWS, SUM_STEP = 32, 32  # rows of a program of finish_pairs_kernel, and splits that it adds at a time

# The sums of a program over its tiles, one value per row each.
_LOSS = tl.constexpr(0)
_GRAD = tl.constexpr(1)
_GRAD_BY_PRODUCT = tl.constexpr(2)


@triton.jit
def _log2_1p_over(x):
    """log2(1 + x) / x for 0 <= x <= 1: the sum 1 + x would lose the digits of a small x."""
    p = tl.fma(x, -4.7875186733e-3, 2.9148939098e-2)
    p = tl.fma(p, x, -8.3191996070e-2)
    p = tl.fma(p, x, 1.5408763031e-1)
    p = tl.fma(p, x, -2.2153141152e-1)
    p = tl.fma(p, x, 2.8414453327e-1)
    p = tl.fma(p, x, -3.6007629250e-1)
    p = tl.fma(p, x, 4.8085764440e-1)
    p = tl.fma(p, x, -7.2134653155e-1)
    return tl.fma(p, x, LOG2E)


@triton.jit
def _add_pairs(
    product, scale, bias, row_weights, loss, grad_sum, product_sum, rows, matches, cols, N, M, strip,
    LOSSES: tl.constexpr, SUMS: tl.constexpr, STORE: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The sums of the rows, in base 2, with those of a tile of products; its dS into the strip, whose row `strip` is.

    Without EDGE the tile has pairs alone, and no match among them.
    """
    y = tl.fma(product, scale, bias)  # -label * logit / ln 2 of a pair that does not match
    if EDGE:
        inside = (rows < N)[:, None] & (cols < M)[None, :]
        match = matches[:, None] == cols[None, :]
        y = tl.where(match, -y, y)
    e = tl.exp2(-tl.abs(y))
    if LOSSES:
        cost = tl.fma(e, _log2_1p_over(e), tl.maximum(y, 0.0))
        if EDGE:
            cost = tl.where(inside, cost, 0.0)
        loss += tl.sum(cost, 1)
    if SUMS or STORE:
        grad = tl.where(y < 0, e, 1.0) / (1.0 + e)
        if EDGE:
            # The strip is zero past the ends of the logits, for the products read it whole.
            grad = tl.where(inside, tl.where(match, -grad, grad), 0.0)
        if SUMS:
            grad_sum += tl.sum(grad, 1)
            product_sum += tl.sum(grad * product, 1)
        if STORE:
            grad *= row_weights[:, None]
            tl.store(strip[:, None] + cols[None, :], grad.to(strip.dtype.element_ty))
    return loss, grad_sum, product_sum


@triton.jit
def _add_tile(
    tile, scale, bias, row_weights, loss, grad_sum, product_sum, rows, matches, col_start, N, M, strip,
    LOSSES: tl.constexpr, SUMS: tl.constexpr, STORE: tl.constexpr, EDGE: tl.constexpr, QUARTER: tl.constexpr,
):  # fmt: skip
    """_add_pairs for the quarters of a tile, one after the other, so that they need not share the registers."""
    left, right = halves(tile)
    for quarter in tl.static_range(4):
        if quarter % 2 == 0:
            now, later = halves(left if quarter == 0 else right)
        else:
            now = later
        cols = col_start + quarter * QUARTER + tl.arange(0, QUARTER)
        loss, grad_sum, product_sum = _add_pairs(
            now, scale, bias, row_weights, loss, grad_sum, product_sum, rows, matches, cols, N, M, strip,
            LOSSES, SUMS, STORE, EDGE,
        )  # fmt: skip
    return loss, grad_sum, product_sum


@triton.jit(do_not_specialize=["first", "N", "M", "match_offset", "tiles_per_split", "num_splits"])
def pairs_kernel(
    queries, keys, scale, bias, weights, sums, strip,
    first, height, width, N, M, match_offset, D, stride_q, stride_k, tiles_per_split, num_splits,
    LOSSES: tl.constexpr, SUMS: tl.constexpr, STORE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Queries first .. first + height - 1 against a split of the keys; height and width are whole tiles. Key
    i + match_offset matches query i.

    sums [3, num_splits, height] takes of each query the losses (LOSSES), the gradients and the gradients times the
    products (SUMS); strip [height, width] takes dS (STORE), 0 where there is no pair. dS_ij = -label_ij w_i
    sigmoid(-label_ij s_ij), w: weights.
    """
    row_tile, split = program_tile(tl.program_id(0), height // BLOCK_M, num_splits)
    in_rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first + in_rows
    matches = rows + match_offset
    scale = tl.load(scale) * LOG2E
    bias = tl.load(bias) * LOG2E
    row_weights = tl.load(weights + rows, mask=rows < N, other=0.0)
    strip_rows = strip + in_rows.to(tl.int64) * width
    loss = tl.zeros((BLOCK_M,), tl.float32)
    grad_sum = tl.zeros((BLOCK_M,), tl.float32)
    product_sum = tl.zeros((BLOCK_M,), tl.float32)
    QUARTER: tl.constexpr = BLOCK_N // 4
    first_col = split * tiles_per_split * BLOCK_N
    end_col = tl.minimum(first_col + tiles_per_split * BLOCK_N, width)
    for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
        tile = similarities(
            queries, keys, rows, col_start + tl.arange(0, BLOCK_N),
            N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        beyond = (first + (row_tile + 1) * BLOCK_M > N) | (col_start + BLOCK_N > M)
        first_match = first + row_tile * BLOCK_M + match_offset
        if beyond | ((first_match < col_start + BLOCK_N) & (col_start < first_match + BLOCK_M)):
            loss, grad_sum, product_sum = _add_tile(
                tile, scale, bias, row_weights, loss, grad_sum, product_sum, rows, matches, col_start, N, M, strip_rows,
                LOSSES, SUMS, STORE, True, QUARTER,
            )  # fmt: skip
        else:
            loss, grad_sum, product_sum = _add_tile(
                tile, scale, bias, row_weights, loss, grad_sum, product_sum, rows, matches, col_start, N, M, strip_rows,
                LOSSES, SUMS, STORE, False, QUARTER,
            )  # fmt: skip
    out = sums + split.to(tl.int64) * height + in_rows
    plane = tl.cast(num_splits, tl.int64) * height
    if LOSSES:
        tl.store(out + _LOSS * plane, loss * LN2)
    if SUMS:
        tl.store(out + _GRAD * plane, grad_sum * row_weights)
        tl.store(out + _GRAD_BY_PRODUCT * plane, product_sum * row_weights)


@triton.jit
def _sum_of_splits(sums, height, num_splits, rows, ok, BLOCK: tl.constexpr, STEP: tl.constexpr):
    """The sums of the rows over the splits, in float64."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num_splits, STEP):
        splits = start + tl.arange(0, STEP)
        at = sums + splits[:, None] * height + rows[None, :]
        total += tl.sum(tl.load(at, mask=(splits < num_splits)[:, None] & ok[None, :], other=0.0).to(tl.float64), 0)
    return total


@triton.jit(do_not_specialize=["first", "height", "N", "num_splits"])
def finish_pairs_kernel(
    sums, losses, totals, first, height, N, num_splits,
    LOSSES: tl.constexpr, SUMS: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """losses [N] of the queries first and following; totals [2, blocks of queries]: the sums of their gradients, in
    float64, because the terms may cancel."""
    in_rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = first + in_rows
    ok = (in_rows < height) & (rows < N)
    plane = num_splits * height
    if LOSSES:
        loss = _sum_of_splits(sums + _LOSS * plane, height, num_splits, in_rows, ok, BLOCK, STEP)
        tl.store(losses + rows, loss.to(tl.float32), mask=ok)
    if SUMS:
        block = first // BLOCK + tl.program_id(0)
        blocks = tl.cdiv(N, BLOCK)
        grads = _sum_of_splits(sums + _GRAD * plane, height, num_splits, in_rows, ok, BLOCK, STEP)
        tl.store(totals + block, tl.sum(grads, 0), mask=block < blocks)
        grads = _sum_of_splits(sums + _GRAD_BY_PRODUCT * plane, height, num_splits, in_rows, ok, BLOCK, STEP)
        tl.store(totals + blocks + block, tl.sum(grads, 0), mask=block < blocks)


def siglip_losses(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, match_offset: int) -> Tensor:
    """One loss per query, [N]."""
    pairs = _Pairs(queries, keys, scale, bias, match_offset, scale, True, False)
    with on_device(queries.device):
        pairs.sum_up()
    return pairs.losses


def siglip_gradients(
    weights: Tensor,  # [N]
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    bias: Tensor,  # []
    with_losses: bool,
    match_offset: int,
    in_float32: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses [N] and the gradients of sum_i weights[i] losses[i] to queries, keys, scale and bias; an empty tensor
    for what is not asked for."""
    of_queries, of_keys, of_scale, of_bias = output_mask
    dtype = torch.float32 if in_float32 else queries.dtype
    grad_queries = queries.new_empty(queries.shape if of_queries else 0, dtype=dtype)
    grad_keys = keys.new_empty(keys.shape if of_keys else 0, dtype=dtype)
    grad_scale, grad_bias = scale.new_empty(0), scale.new_empty(0)
    weights = weights.float().contiguous()
    unit = None
    factor = scale
    with on_device(queries.device):
        if queries.dtype == torch.float16:
            unit = fp16_unit(weights.abs().amax())  # |dS| <= the largest weight
            factor, weights = scale * unit, weights / unit
        # Sums of gradients alone would be a form of their own for a call that nobody makes.
        losses = with_losses or not (of_queries or of_keys)
        pairs = _Pairs(queries, keys, scale, bias, match_offset, weights, losses, of_scale or of_bias)
        if of_queries or of_keys:
            gradients_of_both(
                pairs.fill, pairs.queries, pairs.keys, pairs.tile, pairs.product, pairs.precision, factor,
                grad_queries if of_queries else None, grad_keys if of_keys else None, of_rows=True,
            )  # fmt: skip
        else:
            pairs.sum_up()
        if pairs.sums:
            total = pairs.totals.sum(1)
            total = (total if unit is None else total * unit).float()
            grad_scale = total[1] if of_scale else grad_scale
            grad_bias = total[0] if of_bias else grad_bias
    losses_of_rows = pairs.losses if with_losses else scale.new_empty(0)
    return losses_of_rows, grad_queries, grad_keys, grad_scale.clone(), grad_bias.clone()


class _Pairs:
    """All pairs of queries and keys, and what is summed up on the way over them."""

    def __init__(
        self,
        queries: Tensor,
        keys: Tensor,
        scale: Tensor,
        bias: Tensor,
        match_offset: int,
        weights: Tensor,
        with_losses: bool,
        sums: bool,
    ) -> None:
        self.queries, self.keys = aligned(queries), aligned(keys)
        self.scale, self.bias, self.match_offset, self.weights = scale, bias, match_offset, weights
        self.product = choose(queries)[0].product
        self.tile, self.precision = choose_tile("siglip", queries)
        self.with_losses, self.sums = with_losses, sums
        self.losses = scale.new_empty(len(queries) if with_losses else 0)
        blocks = cdiv(len(queries), SUM_ROWS) if sums else 0
        self.totals = scale.new_empty(2, blocks, dtype=torch.float64)

    def sum_up(self) -> None:
        """The sums alone."""
        tile = self.tile
        height, width = round_up(len(self.queries), tile.block_m), round_up(len(self.keys), tile.block_n)
        splits = cdiv(width // tile.block_n, _TILES)
        unit = max(tile.block_m, SUM_ROWS)
        step = min(max(_PARTIAL_BYTES // (12 * splits) // unit, 1) * unit, height)
        for first in range(0, height, step):
            self._launch(None, first, min(step, height - first), width)

    def fill(self, strip: Tensor, first_row: int, _: int) -> None:
        """Rows first_row and following of dS into the strip, see gradients_of_both; and the sums."""
        self._launch(strip, first_row, *strip.shape)

    def _launch(self, strip: Tensor | None, first: int, height: int, width: int) -> None:
        queries, keys, tile = self.queries, self.keys, self.tile
        row_tiles, col_tiles = height // tile.block_m, width // tile.block_n
        tiles_per_split = min(cdiv(col_tiles, cdiv(_PROGRAMS, row_tiles)), _TILES)
        splits = cdiv(col_tiles, tiles_per_split)
        summing = self.with_losses or self.sums
        partials = self.scale.new_empty(3, splits, height) if summing else self.scale
        flags = {"LOSSES": self.with_losses, "SUMS": self.sums}
        launcher(pairs_kernel, tile, STORE=strip is not None, PRECISION=self.precision, **flags)(
            (row_tiles * splits,),
            queries, keys, self.scale, self.bias, self.weights, partials, queries if strip is None else strip,
            first, height, width, len(queries), len(keys), self.match_offset, queries.shape[1], queries.stride(0),
            keys.stride(0), tiles_per_split, splits,
        )  # fmt: skip
        if summing:
            launcher(finish_pairs_kernel, BLOCK=SUM_ROWS, STEP=SUM_STEP, **flags)(
                (cdiv(height, SUM_ROWS),),
                partials, self.losses, self.totals, first, height, len(queries), splits,
            )  # fmt: skip
