"""The gradients of both sides from that of the logits, dS: the loss fills strips of it, and each is multiplied twice.

    dQ = dS K    dK = dS^T Q

A strip is a band of whole rows of dS, or of whole columns, in the dtype of the features. The side that it runs along
takes its gradient from one strip; the other side's is summed in float32 over the strips, in their order.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._tiles.launch import launcher
from mmkernels._tiles.product_kernels import FIRST, LAST, merge_product_kernel, product_kernel
from mmkernels._tiles.triton import Chip, Tile, cdiv, chip_of, round_up

MERGE_ROWS = 8  # rows of a program of merge_product_kernel: 2,048 of 512 features fill 1,024 programs
MERGE_FEATURES = 128  # and its features

_STRIP_BYTES = 256 << 20  # of a strip at most
_STRIP_ROWS = 128  # the fewest rows of a strip, or columns
# From so many rows on a strip earns its sums in float32: to add them is 8 bytes of traffic for 2 x 2048 FLOP.
_STRIP_DEPTH = 2048
_LEAST_STEPS = 4  # of a split of a product
_FP16_PEAK = 8192.0


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
    """The gradient of one side: what the product of a strip takes and where its sums go."""

    def __init__(
        self,
        transposed: bool,  # the keys' side, whose products are those of the strips transposed
        x: Tensor,
        y: Tensor,
        grad: Tensor,
        strips: _Strips,
        over_strips: bool,  # it is a sum over strips, which stays in float32 until the last
        factor: Tensor,
    ) -> None:
        self.transposed, self.x, self.y, self.grad, self.over_strips = transposed, x, y, grad, over_strips
        rows, self.depth = (strips.width, strips.height) if transposed else (strips.height, strips.width)
        self.rows = min(rows, len(grad))
        self.total = factor
        if over_strips:
            self.total = grad if grad.dtype == torch.float32 else factor.new_empty(grad.shape)
        self.splits, self.sums = 1, self.total  # of a product, and where its sums go

    def tiles(self, num_x: int, product: Tile) -> int:
        return cdiv(num_x, product.block_m) * cdiv(self.x.shape[1], product.block_n)

    def splits_over(self, processors: int, product: Tile) -> int:
        return _splits(self.tiles(self.rows, product), self.depth // product.block_k, processors)

    def part(self, strip: Tensor, first_row: int, first_col: int) -> tuple[int, int, int, int]:
        """first_x, num_x, first_y and depth of the product of the strip that begins at first_row, first_col of dS."""
        height, width = strip.shape
        if self.transposed:
            return first_col, min(width, len(self.grad) - first_col), first_row, height
        return first_row, min(height, len(self.grad) - first_row), first_col, width


class _Products:
    """What is launched for each strip: the product of a side, or those of both if dS is one strip, and what merges the
    splits. Two products are one launch, unless one has to be split to fill the multiprocessors."""

    def __init__(self, sides: list[_Side], share: bool, product: Tile, precision: str, factor: Tensor) -> None:
        first, self.sides, self.factor, self.product = sides[0], sides, factor, product
        self.num_features = first.grad.shape[1]
        processors = chip_of(first.x.device).multiprocessors
        together = all(side.splits_over(processors // len(sides), product) == 1 for side in sides)
        for side in () if together else sides:
            side.splits = side.splits_over(processors, product)
            if side.splits > 1:
                side.sums = factor.new_empty(side.splits, side.rows, self.num_features)
        merged = [side for side in sides if side.splits > 1]
        num_shares = self._merges(len(first.grad)) if first in merged else first.tiles(len(first.grad), product)
        self.shares = factor.new_empty(num_shares) if share else factor
        self.of_products = [
            (group, launcher(
                product_kernel, product, TRANSPOSED=group[0].transposed, BOTH=len(group) == 2,
                SPLIT=group[0] in merged, SHARE=share and group[0] is first and first not in merged,
                PRECISION=precision,
            ))
            for group in ([sides] if together else [[side] for side in sides])
        ]  # fmt: skip
        block = {"BLOCK_M": MERGE_ROWS, "BLOCK_N": MERGE_FEATURES}
        of_merge = launcher(merge_product_kernel, BOTH=len(merged) == 2, SHARE=share and first in merged, **block)
        self.of_merges = [(merged, of_merge)] if merged else []

    def _merges(self, num_x: int) -> int:
        return cdiv(num_x, MERGE_ROWS) * cdiv(self.num_features, MERGE_FEATURES)

    def add(self, strip: Tensor, first_row: int, first_col: int, is_first: bool, is_last: bool) -> None:
        """The products of the strip that begins at first_row, first_col of dS."""
        alone = not self.sides[0].over_strips
        place = (FIRST.value if is_first or alone else 0) | (LAST.value if is_last or alone else 0)
        for (side, *others), of_product in self.of_products:
            first_x, num_x, first_y, depth = side.part(strip, first_row, first_col)
            if num_x <= 0:
                return
            other = others[0] if others else side
            _, num_other, _, other_depth = other.part(strip, first_row, first_col) if others else (0, 0, 0, 0)
            programs = side.tiles(num_x, self.product) * side.splits + other.tiles(num_other, self.product)
            of_product(
                (programs,),
                strip, side.x, side.y, side.sums, self.factor, side.grad, self.shares, other.sums, other.grad,
                first_x, num_x, first_y, len(side.y), self.num_features, side.x.shape[1],
                side.x.stride(0), side.y.stride(0), strip.stride(0), depth, side.splits, place,
                num_other, len(side.x), other_depth,
            )  # fmt: skip
        for (side, *others), of_merge in self.of_merges:
            first_x, num_x, _, _ = side.part(strip, first_row, first_col)
            other = others[0] if others else side
            num_other = other.part(strip, first_row, first_col)[1] if others else 0
            of_merge(
                (self._merges(num_x) + self._merges(num_other),),
                side.sums, side.x, side.total, self.factor, side.grad, self.shares, other.sums, other.grad,
                first_x, num_x, self.num_features, side.x.stride(0), side.splits, place, num_other, other.splits,
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

    Returns parts that add up to the gradient of the scale, in the unit of dS; an empty tensor unless of_scale.

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
        sides.append(_Side(False, queries, keys, grad_queries, strips, several and of_columns, factor))
    if grad_keys is not None:
        sides.append(_Side(True, keys, queries, grad_keys, strips, several and not of_columns, factor))
    of_launches = [[side] for side in sides] if several else [sides] if sides else []
    products = [
        _Products(group, of_scale and group[0] is sides[0], product, precision, factor) for group in of_launches
    ]
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
        for one in products:
            one.add(strip, first_row, first_col, index == 0, index == num_strips - 1)
    return products[0].shares if of_scale else factor.new_empty(0)
