"""The gradients of both sides from that of the logits, dS: the loss fills strips of it, and each is multiplied twice.

    dQ = dS K    dK = dS^T Q

A strip is a band of whole rows of dS, or of whole columns, in the dtype of the features. The side that it runs along
takes its gradient from one strip; the other side's is summed in float32 over the strips, in their order.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._tiles.engine import halves, program_tile
from mmkernels._tiles.launch import launcher
from mmkernels._tiles.triton import Chip, Tile, cdiv, chip_of, dot, round_up

MERGE_ROWS = 8  # rows of a program of merge_product_kernel: 2,048 of 512 features fill 1,024 programs
MERGE_FEATURES = 128  # and its features

_STRIP_BYTES = 256 << 20  # of a strip at most
_STRIP_ROWS = 128  # the fewest rows of a strip, or columns
# From so many rows on a strip earns its sums in float32: to add them is 8 bytes of traffic for 2 x 2048 FLOP.
_STRIP_DEPTH = 2048
_LEAST_STEPS = 4  # of a split of a product
_FP16_PEAK = 8192.0
# Where a strip stands among those that add to the same sums.
_FIRST = tl.constexpr(1)
_LAST = tl.constexpr(2)
_ALONE = 3


@triton.jit
def _finish(sums, total, x, factor, grad, rows, features, inside, num_features, stride_x, place, SHARE: tl.constexpr):
    """Add the sums of a tile to those of the strips before, `total`; after the last strip their product with the factor
    goes to `grad`. Returns <x, sums> there, else 0.

    s = scale <q, k>, so d loss / d scale = sum_ij dS_ij <q_i, k_j> = <Q, dS K>, with no division by the scale.
    """
    rows = rows.to(tl.int64)[:, None]
    at = rows * num_features + features[None, :]
    sums += tl.load(total + at, mask=inside & ((place & _FIRST) == 0), other=0.0)
    share = 0.0
    if (place & _LAST) != 0:
        tl.store(grad + at, (sums * tl.load(factor)).to(grad.dtype.element_ty), mask=inside)
        if SHARE:
            x_tile = tl.load(x + rows * stride_x + features[None, :], mask=inside, other=0.0).to(tl.float32)
            share = tl.sum(tl.sum(x_tile * sums, 1), 0)
    else:
        tl.store(total + at, sums, mask=inside)
    return share


@triton.jit(do_not_specialize=["first_x", "num_x", "first_y", "num_y", "depth", "place"])
def product_kernel(
    strip, x, y, total, factor, grad, shares,
    first_x, num_x, first_y, num_y, num_features, D, stride_x, stride_y, stride_strip, depth, place,
    TRANSPOSED: tl.constexpr, SPLIT: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """strip y (TRANSPOSED: strip^T y) for num_x rows of the sums from first_x on, y from its row first_y on.

    The strip is `depth` deep, a multiple of BLOCK_K, and as high as whole tiles. SPLIT: program_id(1) takes its share
    of the depth, and leaves its sums in total [splits, num_x, num_features]. Otherwise see _finish.
    """
    row_tile, feature_tile = program_tile(tl.program_id(0), tl.cdiv(num_x, BLOCK_M), tl.cdiv(D, BLOCK_N))
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    features = feature_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (features < D)[None, :]
    if SPLIT:
        split = tl.program_id(1)
        steps = tl.cdiv(depth // BLOCK_K, tl.num_programs(1))
        first = split * steps * BLOCK_K
        end = tl.minimum(first + steps * BLOCK_K, depth)
    else:
        first = 0
        end = depth
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    k = tl.arange(0, BLOCK_K)
    strip_k = (first + k).to(tl.int64)[None, :]
    if TRANSPOSED:
        strip_ptrs = strip + strip_k * stride_strip + rows[:, None]  # [BM, BK]
    else:
        strip_ptrs = strip + rows.to(tl.int64)[:, None] * stride_strip + strip_k
    for start in range(first, end, BLOCK_K):
        # The strip is zero where y has no row: the last row of y may stand in there.
        y_rows = tl.minimum(first_y + start + k, num_y - 1).to(tl.int64) * stride_y
        y_tile = tl.load(y + y_rows[:, None] + features[None, :], mask=there, other=0.0)  # [BK, BN]
        acc = dot(tl.load(strip_ptrs), y_tile, acc, PRECISION)
        if TRANSPOSED:
            strip_ptrs += tl.cast(stride_strip, tl.int64) * BLOCK_K
        else:
            strip_ptrs += BLOCK_K
    row_ok = (rows < num_x)[:, None]
    if SPLIT:
        plane = tl.program_id(1).to(tl.int64) * num_x
        inside = row_ok & (features < num_features)[None, :]
        tl.store(total + (plane + rows)[:, None] * num_features + features[None, :], acc, mask=inside)
    else:
        # The quarters of a tile go one after the other, so that they need not share the registers.
        left, right = halves(acc)
        share = 0.0
        WIDTH: tl.constexpr = BLOCK_N // 4
        for quarter in tl.static_range(4):
            if quarter % 2 == 0:
                now, later = halves(left if quarter == 0 else right)
            else:
                now = later
            features = feature_tile * BLOCK_N + quarter * WIDTH + tl.arange(0, WIDTH)
            inside = row_ok & (features < num_features)[None, :]
            share += _finish(
                now, total, x, factor, grad, first_x + rows, features, inside, num_features, stride_x, place, SHARE
            )
        if SHARE:
            at = shares + (first_x // BLOCK_M + row_tile) * tl.cdiv(D, BLOCK_N) + feature_tile
            tl.store(at, share, mask=(place & _LAST) != 0)


@triton.jit(do_not_specialize=["first_x", "num_x", "num_splits", "place"])
def merge_product_kernel(
    partials, x, total, factor, grad, shares, first_x, num_x, num_features, stride_x, num_splits, place,
    SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sums of the splits of a product, partials [num_splits, num_x, num_features], in their order; see _finish."""
    tiles = tl.cdiv(num_features, BLOCK_N)
    rows = tl.program_id(0) // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < num_x)[:, None] & (features < num_features)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    at = partials + rows.to(tl.int64)[:, None] * num_features + features[None, :]
    plane = tl.cast(num_x, tl.int64) * num_features
    for split in range(0, num_splits, 4):
        # Four loads are on their way at a time.
        one = tl.load(at, mask=inside, other=0.0)
        two = tl.load(at + plane, mask=inside & (split + 1 < num_splits), other=0.0)
        three = tl.load(at + 2 * plane, mask=inside & (split + 2 < num_splits), other=0.0)
        four = tl.load(at + 3 * plane, mask=inside & (split + 3 < num_splits), other=0.0)
        acc = (((acc + one) + two) + three) + four
        at += 4 * plane
    share = _finish(acc, total, x, factor, grad, first_x + rows, features, inside, num_features, stride_x, place, SHARE)
    if SHARE:
        tl.store(shares + first_x // BLOCK_M * tiles + tl.program_id(0), share, mask=(place & _LAST) != 0)


def fp16_unit(peak: Tensor) -> Tensor:
    """The unit of dS in float16, where |dS| <= 5 peak: peak / 8192.

    The largest then fits, 40960 < 65504, and numbers below the least normal one, 6.1e-5, are under 1e-8 of the peak.
    """
    return torch.where(peak > 0, peak, 1.0) / _FP16_PEAK


Fill = Callable[[Tensor, int, int], None]  # (strip, first_row, first_col): see gradients_of_both


class _Strips(NamedTuple):
    """How dS is cut: into bands of whole rows, or of whole columns."""

    of_columns: bool
    height: int
    width: int


def _strips(rows: int, cols: int, itemsize: int, of_columns: bool, multiple: int, chip: Chip) -> _Strips:
    """Two thirds of the L2 cache, so that a strip stays there until both products have read it; or as many rows as its
    sums in float32 ask for, where that is more."""
    length, other = (cols, rows) if of_columns else (rows, cols)
    other = round_up(other, multiple)
    unit = max(_STRIP_ROWS, multiple)
    wanted = max(chip.l2_bytes * 2 // 3 // (other * itemsize), _STRIP_DEPTH)
    most = max(min(wanted, _STRIP_BYTES // (other * itemsize)) // unit * unit, unit)
    if most < length:
        most = round_up(cdiv(length, cdiv(length, most)), unit)  # of equal size
    most = min(most, round_up(length, multiple))
    return _Strips(True, other, most) if of_columns else _Strips(False, most, other)


def _splits(tiles: int, steps: int, multiprocessors: int) -> int:
    """Into how many parts the depth of a product is split, so that its programs fill the multiprocessors.

    The partial products of a strip are then at most one tile for each multiprocessor.
    """
    return max(1, min(multiprocessors // tiles, steps // _LEAST_STEPS))


class _Side:
    """The gradient of one side: the products of strips that add up to it."""

    def __init__(
        self,
        transposed: bool,  # the keys' side, whose products are those of the strips transposed
        x: Tensor,
        y: Tensor,
        grad: Tensor,
        strips: _Strips,
        over_strips: bool,  # it is a sum over strips, which stays in float32 until the last
        share: bool,
        product: Tile,
        precision: str,
        factor: Tensor,
    ) -> None:
        self.transposed, self.x, self.y, self.grad, self.factor = transposed, x, y, grad, factor
        self.over_strips, self.share = over_strips, share
        rows, depth = (strips.width, strips.height) if transposed else (strips.height, strips.width)
        num_x, self.num_features = grad.shape
        rows = min(rows, num_x)
        self.feature_tiles = cdiv(x.shape[1], product.block_n)
        tiles = cdiv(rows, product.block_m) * self.feature_tiles
        self.splits = _splits(tiles, depth // product.block_k, chip_of(x.device).multiprocessors)
        self.total = factor
        if over_strips:
            self.total = grad if grad.dtype == torch.float32 else factor.new_empty(grad.shape)
        self.partials = factor.new_empty(self.splits, rows, self.num_features) if self.splits > 1 else None
        self.merge_tiles = cdiv(self.num_features, MERGE_FEATURES)
        of_product = cdiv(num_x, product.block_m) * self.feature_tiles
        of_merge = cdiv(num_x, MERGE_ROWS) * self.merge_tiles
        self.shares = factor.new_empty(of_product if self.splits == 1 else of_merge) if share else factor
        self.block_m = product.block_m
        split = self.partials is not None
        self.of_product = launcher(
            product_kernel, product, TRANSPOSED=transposed, SPLIT=split, SHARE=share and not split, PRECISION=precision
        )

    def add(self, strip: Tensor, first_x: int, first_y: int, is_first: bool, is_last: bool) -> None:
        """The product of a strip whose gradients are those of the rows from first_x on."""
        x, y, grad, num_features = self.x, self.y, self.grad, self.num_features
        height, width = strip.shape
        rows, depth = (width, height) if self.transposed else (height, width)
        num_x = min(rows, len(grad) - first_x)
        if num_x <= 0:
            return
        place = (_FIRST.value if is_first else 0) | (_LAST.value if is_last else 0) if self.over_strips else _ALONE
        total = self.total if self.partials is None else self.partials
        tiles = cdiv(num_x, self.block_m) * self.feature_tiles
        self.of_product(
            (tiles, self.splits),
            strip, x, y, total, self.factor, grad, self.shares,
            first_x, num_x, first_y, len(y), num_features, x.shape[1], x.stride(0), y.stride(0), width, depth, place,
        )  # fmt: skip
        if self.partials is not None:
            launcher(merge_product_kernel, SHARE=self.share, BLOCK_M=MERGE_ROWS, BLOCK_N=MERGE_FEATURES)(
                (cdiv(num_x, MERGE_ROWS) * self.merge_tiles,),
                total, x, self.total, self.factor, grad, self.shares,
                first_x, num_x, num_features, x.stride(0), self.splits, place,
            )  # fmt: skip


def gradients_of_both(
    fill: Fill,
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    tile: Tile,
    product: Tile,
    precision: str,
    factor: Tensor,  # []
    grad_queries: Tensor | None,  # [N, features]
    grad_keys: Tensor | None,  # the gradients of the first keys, [M or fewer, features]
    of_scale: bool = False,
    key_sums: Tensor | None = None,  # [M]
    of_rows: bool = False,
) -> Tensor:
    """Fill the gradients of both sides, factor times dS K and dS^T Q, and key_sums with the sums of dS over queries.

    Returns the gradient of the scale in the unit of dS, []; an empty tensor unless of_scale.

    fill(strip, first_row, first_col) makes strip [height, width], contiguous, the part of dS that begins there, and 0
    where dS has no row or no column. Both sides of the strip are multiples of those of `tile`, the tile of `fill`.
    of_rows: `fill` wants whole rows, in their order.
    """
    N, M = len(queries), len(keys)
    # <Q, dQ> = <K, dK>: the scale takes its gradient from whichever product is made anyway, and whole.
    whole = grad_keys is not None and len(grad_keys) == M
    if grad_queries is None and of_scale and not whole:
        grad_queries = torch.empty_like(queries)
    if grad_queries is None and grad_keys is None and key_sums is None:
        return factor.new_empty(0)
    # Along the longer side: the shorter one's sums take less memory. One side alone needs no sums.
    of_columns = not of_rows and (key_sums is not None or grad_queries is None or (grad_keys is not None and M > N))
    cols = M if grad_queries is not None or key_sums is not None or grad_keys is None else len(grad_keys)
    multiple = max(tile.block_m, tile.block_n, product.block_m, product.block_k)
    strips = _strips(N, cols, queries.element_size(), of_columns, multiple, chip_of(queries.device))
    num_strips = cdiv(cols, strips.width) * cdiv(N, strips.height)
    several = num_strips > 1
    sides = []
    if grad_queries is not None:
        how = (several and of_columns, of_scale, product, precision, factor)
        sides.append(_Side(False, queries, keys, grad_queries, strips, *how))
    if grad_keys is not None:
        how = (several and not of_columns, of_scale and not sides, product, precision, factor)
        sides.append(_Side(True, keys, queries, grad_keys, strips, *how))
    buffer = queries.new_empty(strips.height, strips.width)
    for index in range(num_strips):
        first_row, first_col = (0, index * strips.width) if of_columns else (index * strips.height, 0)
        height = min(strips.height, round_up(N - first_row, multiple))
        width = min(strips.width, round_up(cols - first_col, multiple))
        strip = buffer
        if (height, width) != (strips.height, strips.width):  # the last is smaller
            strip = buffer.view(-1)[: height * width].view(height, width)
        fill(strip, first_row, first_col)
        if key_sums is not None:
            sums = key_sums[first_col : first_col + width]
            torch.sum(strip[:, : len(sums)], 0, dtype=torch.float32, out=sums)
        for side in sides:
            first_x, first_y = (first_col, first_row) if side.transposed else (first_row, first_col)
            side.add(strip, first_x, first_y, index == 0, index == num_strips - 1)
    return sides[0].shares.sum() if of_scale else factor.new_empty(0)
