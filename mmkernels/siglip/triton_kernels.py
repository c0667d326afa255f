"""The sigmoid loss in Triton, on the tiles and strips of mmkernels._tiles.

G = 2 N M D FLOP. The losses alone take 1 G. The gradients take 4 G: a strip of dS, the gradient of the logits, is
stored in the dtype of the features, and dQ of the strip is a plain product dS K; strips of keys, stored transposed,
give dK. The pass over the queries' strips sums up the losses and the gradients of scale and bias from the same tiles,
in float32: it needs no forward pass.

Memory beyond inputs and outputs: 12 N bytes, partial sums of at most 16 MiB (of one tile's height of rows, if that is
more), and one strip with its partial products, as for info_nce. No atomics: results are the same bits
from run to run.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._tiles.configs import choose, choose_tile
from mmkernels._tiles.engine import halves, program_tile, similarities
from mmkernels._tiles.launch import aligned, launch_options
from mmkernels._tiles.products import fp16_unit, strip_products
from mmkernels._tiles.triton import LOG2E, on_device, round_up

_PROGRAMS = 1024  # of a launch, if it has as many tiles
_TILES = 4  # of a program at most: longer sums in float32 would lose digits
_PARTIAL_BYTES = 16 << 20  # sums of programs that are held at once

# The sums of a program over its tiles, one value per row each.
_LOSS = tl.constexpr(0)
_GRAD = tl.constexpr(1)
_GRAD_BY_PRODUCT = tl.constexpr(2)


@triton.jit
def _log1p(x):
    """log(1 + x) for 0 <= x <= 1, as x + x^2 R(x): the sum 1 + x would lose the digits of a small x."""
    p = tl.fma(x, -3.3184550703e-3, 2.0204504952e-2)
    p = tl.fma(p, x, -5.7664297521e-2)
    p = tl.fma(p, x, 1.0680540651e-1)
    p = tl.fma(p, x, -1.5355387330e-1)
    p = tl.fma(p, x, 1.9695398211e-1)
    p = tl.fma(p, x, -2.4958586693e-1)
    p = tl.fma(p, x, 3.3330512047e-1)
    p = tl.fma(p, x, -4.9999931455e-1)
    return tl.fma(x * x, p, x)


@triton.jit
def _add_pairs(
    product, scale, bias, weights, loss, grad_sum, product_sum, rows, cols, num_x, num_y, strip, length, width,
    LOSSES: tl.constexpr, SUMS: tl.constexpr, STORE: tl.constexpr, OF_KEYS: tl.constexpr,
):  # fmt: skip
    """The sums of the rows with those of a tile of products; its dS into the strip, from its row `strip` on."""
    inside = (rows < num_x)[:, None] & (cols < num_y)[None, :]
    match = rows[:, None] == cols[None, :]
    y = product * scale + bias
    y = tl.where(match, -y, y)  # -label * logit
    e = tl.exp2(-tl.abs(y) * LOG2E)
    if LOSSES:
        loss += tl.sum(tl.where(inside, tl.maximum(y, 0.0) + _log1p(e), 0.0), 1)
    if SUMS or STORE:
        grad = tl.where(y < 0, e, 1.0) / (1.0 + e)
        grad = tl.where(match, -grad, grad)
        if OF_KEYS:
            grad *= tl.load(weights + cols, mask=cols < num_y, other=0.0)[None, :]
        else:
            grad *= tl.load(weights + rows, mask=rows < num_x, other=0.0)[:, None]
        # The strip is zero past the ends of the logits, because the product reads it unmasked.
        grad = tl.where(inside, grad, 0.0)
        if SUMS:
            grad_sum += tl.sum(grad, 1)
            product_sum += tl.sum(grad * product, 1)
        if STORE:
            ok = length[:, None] & (cols < width)[None, :]
            tl.store(strip[:, None] + cols[None, :], grad.to(strip.dtype.element_ty), mask=ok)
    return loss, grad_sum, product_sum


@triton.jit(do_not_specialize=["first", "length", "num_x", "num_y", "tiles_per_split", "num_splits", "stride_sums"])
def pairs_kernel(
    x, y, scale, bias, weights, sums, strip,
    first, length, num_x, num_y, D, stride_x, stride_y, width, tiles_per_split, num_splits, stride_sums,
    LOSSES: tl.constexpr, SUMS: tl.constexpr, STORE: tl.constexpr, OF_KEYS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows first .. first + length of the pairs of x and y against a split of the columns; OF_KEYS: x are the keys.

    sums [3, num_splits, stride_sums] takes of each row the losses (LOSSES), the gradients and the gradients times the
    products (SUMS); strip [length, width] takes dS (STORE), zero past its end. dS_ij = -label_ij w sigmoid(-label_ij
    s_ij), w the weight of the query of the pair.
    """
    row_tile, split = program_tile(tl.program_id(0), tl.cdiv(length, BLOCK_M), num_splits)
    in_rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    rows = first + in_rows
    in_strip = in_rows < length
    scale = tl.load(scale)
    bias = tl.load(bias)
    strip_rows = strip + in_rows.to(tl.int64) * width
    loss = tl.zeros((BLOCK_M,), tl.float32)
    grad_sum = tl.zeros((BLOCK_M,), tl.float32)
    product_sum = tl.zeros((BLOCK_M,), tl.float32)
    QUARTER: tl.constexpr = BLOCK_N // 4
    first_col = split * tiles_per_split * BLOCK_N
    end_col = tl.minimum(first_col + tiles_per_split * BLOCK_N, width)
    for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
        tile = similarities(
            x, y, rows, col_start + tl.arange(0, BLOCK_N),
            num_x, num_y, D, stride_x, stride_y, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        # The quarters of a tile go one after the other, so that they need not share the registers.
        left, right = halves(tile)
        for quarter in tl.static_range(4):
            if quarter % 2 == 0:
                now, later = halves(left if quarter == 0 else right)
            else:
                now = later
            loss, grad_sum, product_sum = _add_pairs(
                now, scale, bias, weights, loss, grad_sum, product_sum,
                rows, col_start + quarter * QUARTER + tl.arange(0, QUARTER), num_x, num_y, strip_rows, in_strip, width,
                LOSSES, SUMS, STORE, OF_KEYS,
            )  # fmt: skip
    out = sums + split.to(tl.int64) * stride_sums + in_rows
    plane = tl.cast(num_splits, tl.int64) * stride_sums
    if LOSSES:
        tl.store(out + _LOSS * plane, loss, mask=in_strip)
    if SUMS:
        tl.store(out + _GRAD * plane, grad_sum, mask=in_strip)
        tl.store(out + _GRAD_BY_PRODUCT * plane, product_sum, mask=in_strip)


def siglip_losses(queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """One loss per query, [N]."""
    pairs = _Pairs(queries, keys, scale, bias, scale)
    with on_device(queries.device):
        return pairs.sum_up(True, False)[0].clone()


def siglip_gradients(
    weights: Tensor,  # [N]
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    bias: Tensor,  # []
    with_losses: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The losses [N] and the gradients of sum_i weights[i] losses[i] to queries, keys, scale and bias; an empty tensor
    for what is not asked for."""
    of_queries, of_keys, of_scale, of_bias = output_mask
    grad_queries = queries.new_empty(queries.shape if of_queries else 0)
    grad_keys = keys.new_empty(keys.shape if of_keys else 0)
    weights = weights.float().contiguous()
    unit = None
    factor = scale
    with on_device(queries.device):
        if queries.dtype == torch.float16:
            unit = fp16_unit(weights.abs().amax())  # |dS| <= the largest weight
            factor, weights = scale * unit, weights / unit
        pairs = _Pairs(queries, keys, scale, bias, weights)
        of_rows = of_all = None
        sums = of_scale or of_bias  # they may come from either side
        if of_queries:
            of_rows = of_all = pairs.products(False, factor, grad_queries, with_losses, sums)
        elif with_losses:
            of_rows = pairs.sum_up(True, False)
        if of_keys:
            of_keys_rows = pairs.products(True, factor, grad_keys, False, sums and not of_queries)
            of_all = of_keys_rows if of_all is None else of_all
        elif sums and not of_queries:
            of_all = pairs.sum_up(False, True)
        empty = scale.new_empty(0)
        losses, grad_scale, grad_bias = empty, empty.clone(), empty.clone()
        if with_losses and of_rows is not None:
            losses = of_rows[0].clone()
        if sums and of_all is not None:
            # These numbers may cancel, so float64 adds them.
            total = of_all.sum(1, dtype=torch.float64) * (1.0 if unit is None else unit)
            grad_bias = total[1].float() if of_bias else grad_bias
            grad_scale = total[2].float() if of_scale else grad_scale
    return losses, grad_queries, grad_keys, grad_scale, grad_bias


class _Pairs:
    """All pairs of queries and keys. A pass over them gives sums per row: see pairs_kernel."""

    def __init__(self, queries: Tensor, keys: Tensor, scale: Tensor, bias: Tensor, weights: Tensor) -> None:
        self.queries, self.keys = aligned(queries), aligned(keys)
        self.scale, self.bias, self.weights = scale, bias, weights
        self.product = choose(queries)[0].product
        self.tile, self.precision = choose_tile("siglip", queries)

    def sum_up(self, losses: bool, grads: bool) -> Tensor:
        """The sums asked for, [3, N], of each query."""
        tile = self.tile
        sums = self.scale.new_empty(3, len(self.queries))
        splits = triton.cdiv(triton.cdiv(len(self.keys), tile.block_n), _TILES)
        step = max(_PARTIAL_BYTES // (12 * splits) // tile.block_m, 1) * tile.block_m
        for first in range(0, len(self.queries), step):
            self._launch(False, losses, grads, sums, None, first, min(step, len(self.queries) - first))
        return sums

    def products(self, of_keys: bool, factor: Tensor, grad: Tensor, losses: bool, grads: bool) -> Tensor:
        """Fill grad = factor * dS K (of_keys: dS^T Q). Returns the sums asked for, of each row of that side."""
        x, y = (self.keys, self.queries) if of_keys else (self.queries, self.keys)
        sums = self.scale.new_empty(3, len(x))
        fill = functools.partial(self._launch, of_keys, losses, grads, sums)
        strip_products(fill, x, y, self.product, self.precision, factor, grad)
        return sums

    def _launch(
        self, of_keys: bool, losses: bool, grads: bool, sums: Tensor, strip: Tensor | None, first: int, rows: int
    ) -> None:
        """Rows `first` and following: the sums asked for, and dS into the strip, if there is one."""
        x, y = (self.keys, self.queries) if of_keys else (self.queries, self.keys)
        tile = self.tile
        width = round_up(len(y), 64) if strip is None else strip.shape[1]
        row_tiles, col_tiles = triton.cdiv(rows, tile.block_m), triton.cdiv(width, tile.block_n)
        tiles_per_split = min(triton.cdiv(col_tiles, triton.cdiv(_PROGRAMS, row_tiles)), _TILES)
        splits = triton.cdiv(col_tiles, tiles_per_split)
        partials = self.scale.new_empty(3, splits, rows) if losses or grads else self.scale
        pairs_kernel[(row_tiles * splits,)](
            x, y, self.scale, self.bias, self.weights, partials, x if strip is None else strip,
            first, rows, len(x), len(y), x.shape[1], x.stride(0), y.stride(0), width, tiles_per_split, splits, rows,
            LOSSES=losses, SUMS=grads, STORE=strip is not None, OF_KEYS=of_keys,
            PRECISION=self.precision, **launch_options(tile),
        )  # fmt: skip
        if losses:
            torch.sum(partials[0], 0, out=sums[0, first : first + rows])
        if grads:
            torch.sum(partials[1:], 1, out=sums[1:, first : first + rows])
