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

from mmkernels._tiles.configs import choose, choose_tile, strip_flags
from mmkernels._tiles.engine import (
    add_products,
    bits_of_overlap,
    count_bits,
    first_bits,
    halves,
    in_eights,
    lowest_bit,
    offsets_in_tile,
    program_tile,
    similarities,
)
from mmkernels._tiles.launch import aligned, launcher
from mmkernels._tiles.products import fp16_unit, gradients_of_both
from mmkernels._tiles.triton import LN2, LOG2E, Tile, cdiv, family_of, on_device, round_up

_PROGRAMS = 1024  # of a launch, if it has as many tiles
_TILES = 4  # of a program at most: longer sums in float32 would lose digits
_PARTIAL_BYTES = 16 << 20  # sums of programs that are held at once, without a strip
SUM_ROWS, SUM_STEP = 32, 32  # rows of a program of finish_pairs_kernel, and splits that it adds at a time

# The sums of a program over its tiles, one value per row each.
_LOSS = tl.constexpr(0)
_GRAD = tl.constexpr(1)
_GRAD_BY_PRODUCT = tl.constexpr(2)
_WIDTH = tl.constexpr(32)


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
    """The sums of the rows in base 2, in_eights, with those of a tile of products; its dS into the strip, whose rows
    are `strip`.

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
        loss += in_eights(cost)
    if SUMS or STORE:
        grad = tl.where(y < 0, e, 1.0) / (1.0 + e)
        if EDGE:
            # The strip is zero past the ends of the logits, for the products read it whole.
            grad = tl.where(inside, tl.where(match, -grad, grad), 0.0)
        if SUMS:
            grad_sum += in_eights(grad)
            product_sum += in_eights(grad * product)
        if STORE:
            grad *= row_weights[:, None]
            tl.store(strip[:, None] + cols[None, :], grad.to(strip.dtype.element_ty))
    return loss, grad_sum, product_sum


@triton.jit
def _add_plain(
    tile, scale, bias, row_weights, loss, grad_sum, product_sum, rows, col_start, N, M, strip,
    LOSSES: tl.constexpr, SUMS: tl.constexpr, STORE: tl.constexpr,
):  # fmt: skip
    """_add_pairs for a tile of pairs that do not match, _WIDTH columns at a time, so that they need not share the
    registers."""
    WIDTH: tl.constexpr = tile.shape[1]
    if WIDTH > _WIDTH:
        left, right = halves(tile)
        loss, grad_sum, product_sum = _add_plain(
            left, scale, bias, row_weights, loss, grad_sum, product_sum, rows, col_start, N, M, strip,
            LOSSES, SUMS, STORE,
        )  # fmt: skip
        loss, grad_sum, product_sum = _add_plain(
            right, scale, bias, row_weights, loss, grad_sum, product_sum, rows, col_start + WIDTH // 2, N, M, strip,
            LOSSES, SUMS, STORE,
        )  # fmt: skip
    else:
        cols = col_start + tl.arange(0, WIDTH)
        loss, grad_sum, product_sum = _add_pairs(
            tile, scale, bias, row_weights, loss, grad_sum, product_sum, rows, rows, cols, N, M, strip,
            LOSSES, SUMS, STORE, False,
        )  # fmt: skip
    return loss, grad_sum, product_sum


@triton.jit(do_not_specialize=["first", "N", "M", "match_offset", "tiles_per_split", "num_splits"])
def pairs_kernel(
    queries, keys, scale, bias, weights, sums, strip,
    first, height, width, N, M, match_offset, D, stride_q, stride_k, tiles_per_split, num_splits,
    LOSSES: tl.constexpr, SUMS: tl.constexpr, STORE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    FLAT: tl.constexpr,
):  # fmt: skip
    """Queries first .. first + height - 1 against a split of the keys; height and width are whole tiles. Key
    i + match_offset matches query i.

    sums [3, num_splits, height] takes of each query the losses (LOSSES), the gradients and the gradients times the
    products (SUMS); strip [height, width] takes dS (STORE), 0 where there is no pair. dS_ij = -label_ij w_i
    sigmoid(-label_ij s_ij), w: weights.

    A plain tile, inside the logits and without a match, needs no mask. The others follow.
    """
    row_tile, split = program_tile(tl.program_id(0), height // BLOCK_M, num_splits)
    in_rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first + in_rows
    matches = rows + match_offset
    scale = tl.load(scale) * LOG2E
    bias = tl.load(bias) * LOG2E
    row_weights = tl.load(weights + rows, mask=rows < N, other=0.0)
    strip_rows = strip + in_rows.to(tl.int64) * width
    loss = tl.zeros((BLOCK_M, 8), tl.float32)  # in_eights
    grad_sum = loss
    product_sum = loss
    PART: tl.constexpr = BLOCK_N // 4 if BLOCK_N > 32 else BLOCK_N // 2
    first_col = split * tiles_per_split * BLOCK_N
    end_col = tl.minimum(first_col + tiles_per_split * BLOCK_N, width)
    first_row = first + row_tile * BLOCK_M
    first_match = first_row + match_offset
    plain = 0  # bit i: tile i of the split
    if first_row + BLOCK_M <= N:
        plain = first_bits(tl.maximum(tl.minimum(end_col, M) - first_col, 0) // BLOCK_N)
        plain &= ~bits_of_overlap(first_match, BLOCK_M, first_col, BLOCK_N)
    # FLAT: one loop over tiles and features. The first copies of a tile are on their way during the epilogue of the
    # last.
    next_ones = plain
    ones = plain
    col = first_col
    x_offsets = offsets_in_tile(stride_q, BLOCK_M, BLOCK_K)
    y_offsets = offsets_in_tile(stride_k, BLOCK_N, BLOCK_K)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    start = D
    for _ in tl.range(0, count_bits(plain) * (tl.cdiv(D, BLOCK_K) if FLAT else 1), disable_licm=True):
        if FLAT:
            start = tl.where(start + BLOCK_K < D, start + BLOCK_K, 0)
            if start == 0:
                col = first_col + lowest_bit(next_ones) * BLOCK_N
                next_ones &= next_ones - 1
            acc = add_products(
                acc, queries, keys, first_row, col, stride_q, stride_k, x_offsets, y_offsets, start, D,
                BLOCK_K, PRECISION,
            )  # fmt: skip
        else:
            cols = first_col + lowest_bit(ones) * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = similarities(
                queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
        if start + BLOCK_K >= D:
            loss, grad_sum, product_sum = _add_plain(
                acc, scale, bias, row_weights, loss, grad_sum, product_sum, rows,
                first_col + lowest_bit(ones) * BLOCK_N, N, M, strip_rows, LOSSES, SUMS, STORE,
            )  # fmt: skip
            ones &= ones - 1
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
        if (plain >> ((col_start - first_col) // BLOCK_N)) & 1 == 0:
            # Such tiles are few: parts of their own, though more work, leave the registers to the others.
            for part in tl.range(col_start, col_start + BLOCK_N, PART, disable_licm=True):
                cols = part + tl.arange(0, PART)
                tile = similarities(
                    queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, PART, BLOCK_K, PRECISION,
                )  # fmt: skip
                loss, grad_sum, product_sum = _add_pairs(
                    tile, scale, bias, row_weights, loss, grad_sum, product_sum, rows, matches, cols, N, M,
                    strip_rows, LOSSES, SUMS, STORE, True,
                )  # fmt: skip
    out = sums + split.to(tl.int64) * height + in_rows
    plane = tl.cast(num_splits, tl.int64) * height
    if LOSSES:
        tl.store(out + _LOSS * plane, tl.sum(loss, 1) * LN2)
    if SUMS:
        tl.store(out + _GRAD * plane, tl.sum(grad_sum, 1) * row_weights)
        tl.store(out + _GRAD_BY_PRODUCT * plane, tl.sum(product_sum, 1) * row_weights)


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


def pairs_tile(tile: Tile, is_float16: bool) -> Tile:
    """The tile of pairs_kernel: of 128 x 64 in four warps, on sm_90, it spills in float16."""
    if is_float16 and (tile.block_m, tile.block_n, tile.num_warps) == (128, 64, 4):
        return tile._replace(block_m=64, block_n=128)
    return tile


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
        tile, self.precision = choose_tile("siglip", queries)
        self.tile = pairs_tile(tile, queries.dtype == torch.float16)
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
        of_family = strip_flags(family_of(queries.device))
        launcher(pairs_kernel, tile, STORE=strip is not None, PRECISION=self.precision, **flags, **of_family)(
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
