"""The kernels that multiply strips of dS, see mmkernels._tiles.products."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.engine import halves, program_tile
from mmkernels._tiles.triton import dot

# Where a strip stands among those that add to the same sums.
FIRST = tl.constexpr(1)
LAST = tl.constexpr(2)


@triton.jit
def _finish(sums, total, x, factor, grad, rows, features, inside, num_features, stride_x, place, SHARE: tl.constexpr):
    """Add the sums of a tile to those of the strips before, `total`; after the last strip their product with the factor
    goes to `grad`. Returns <x, sums> there, else 0.

    s = scale <q, k>, so d loss / d scale = sum_ij dS_ij <q_i, k_j> = <Q, dS K>, with no division by the scale.
    """
    rows = rows.to(tl.int64)[:, None]
    at = rows * num_features + features[None, :]
    sums += tl.load(total + at, mask=tl.where((place & FIRST) == 0, inside, False), other=0.0)
    share = 0.0
    if (place & LAST) != 0:
        tl.store(grad + at, (sums * tl.load(factor)).to(grad.dtype.element_ty), mask=inside)
        if SHARE:
            x_tile = tl.load(x + rows * stride_x + features[None, :], mask=inside, other=0.0).to(tl.float32)
            share = tl.sum(tl.sum(x_tile * sums, 1), 0)
    else:
        tl.store(total + at, sums, mask=inside)
    return share


@triton.jit
def _product(
    program, strip, x, y, total, factor, grad, shares,
    first_x, num_x, first_y, num_y, num_features, D, stride_x, stride_y, stride_strip, depth, splits, place,
    TRANSPOSED: tl.constexpr, SPLIT: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A program's tile of strip y (TRANSPOSED: strip^T y), for num_x rows of the sums from first_x on, y from its row
    first_y on; see product_kernel."""
    row_tiles = tl.cdiv(num_x, BLOCK_M)
    feature_tiles = tl.cdiv(D, BLOCK_N)
    first = 0
    end = depth
    if SPLIT:
        split = program // (row_tiles * feature_tiles)
        program = program % (row_tiles * feature_tiles)
        steps = tl.cdiv(depth // BLOCK_K, splits)
        first = split * steps * BLOCK_K
        end = tl.minimum(first + steps * BLOCK_K, depth)
    row_tile, feature_tile = program_tile(program, row_tiles, feature_tiles)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    features = feature_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    there = (features < D)[None, :]
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
        plane = split.to(tl.int64) * num_x
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
            at = shares + (first_x // BLOCK_M + row_tile) * feature_tiles + feature_tile
            tl.store(at, share, mask=(place & LAST) != 0)


@triton.jit(
    do_not_specialize=[
        "first_x", "num_x", "first_y", "num_y", "depth", "splits", "place", "num_other", "len_x", "other_depth"
    ]
)  # fmt: skip
def product_kernel(
    strip, x, y, total, factor, grad, shares, other_total, other_grad,
    first_x, num_x, first_y, num_y, num_features, D, stride_x, stride_y, stride_strip, depth, splits, place,
    num_other, len_x, other_depth,
    TRANSPOSED: tl.constexpr, BOTH: tl.constexpr, SPLIT: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """strip y (TRANSPOSED: strip^T y) for num_x rows of the sums from first_x on, y from its row first_y on; with BOTH
    also strip^T x, for the first num_other rows of y's side, where the strip is all of dS.

    The strip is `depth` deep, a multiple of BLOCK_K, and as high as whole tiles. SPLIT: a program takes its share of
    the depth, and leaves its sums in total [splits, num_x, num_features]. Otherwise see _finish.
    """
    program = tl.program_id(0)
    if BOTH:
        programs = tl.cdiv(num_x, BLOCK_M) * tl.cdiv(D, BLOCK_N)
        # Either loop once: a branch would have the compiler keep the addresses of both products, and spill.
        for _ in tl.range(0, (program < programs).to(tl.int32), disable_licm=True):
            _product(
                program, strip, x, y, total, factor, grad, shares,
                0, num_x, 0, num_y, num_features, D, stride_x, stride_y, stride_strip, depth, 1, place,
                False, False, SHARE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
        for _ in tl.range(0, (program >= programs).to(tl.int32), disable_licm=True):
            _product(
                program - programs, strip, y, x, other_total, factor, other_grad, shares,
                0, num_other, 0, len_x, num_features, D, stride_y, stride_x, stride_strip, other_depth, 1, place,
                True, False, False, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
            )  # fmt: skip
    else:
        _product(
            program, strip, x, y, total, factor, grad, shares,
            first_x, num_x, first_y, num_y, num_features, D, stride_x, stride_y, stride_strip, depth, splits, place,
            TRANSPOSED, SPLIT, SHARE, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip


@triton.jit
def _merge(
    program, partials, x, total, factor, grad, shares, first_x, num_x, num_features, stride_x, num_splits, place,
    SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """A program's part of the sums of the splits, in their order; see merge_product_kernel."""
    tiles = tl.cdiv(num_features, BLOCK_N)
    rows = program // tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    features = program % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < num_x)[:, None] & (features < num_features)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    at = partials + rows.to(tl.int64)[:, None] * num_features + features[None, :]
    plane = tl.cast(num_x, tl.int64) * num_features
    for split in range(0, num_splits, 4):
        # Four loads are on their way at a time.
        one = tl.load(at, mask=inside, other=0.0)
        two = tl.load(at + plane, mask=tl.where(split + 1 < num_splits, inside, False), other=0.0)
        three = tl.load(at + 2 * plane, mask=tl.where(split + 2 < num_splits, inside, False), other=0.0)
        four = tl.load(at + 3 * plane, mask=tl.where(split + 3 < num_splits, inside, False), other=0.0)
        acc = (((acc + one) + two) + three) + four
        at += 4 * plane
    share = _finish(acc, total, x, factor, grad, first_x + rows, features, inside, num_features, stride_x, place, SHARE)
    if SHARE:
        tl.store(shares + first_x // BLOCK_M * tiles + program, share, mask=(place & LAST) != 0)


@triton.jit(do_not_specialize=["first_x", "num_x", "num_splits", "place", "num_other", "other_splits"])
def merge_product_kernel(
    partials, x, total, factor, grad, shares, other_partials, other_grad,
    first_x, num_x, num_features, stride_x, num_splits, place, num_other, other_splits,
    BOTH: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sums of the splits of a product, partials [num_splits, num_x, num_features], in their order; see _finish.
    With BOTH also those of product_kernel's other one."""
    program = tl.program_id(0)
    if BOTH:
        programs = tl.cdiv(num_x, BLOCK_M) * tl.cdiv(num_features, BLOCK_N)
        if program >= programs:
            _merge(
                program - programs, other_partials, x, total, factor, other_grad, shares,
                0, num_other, num_features, stride_x, other_splits, place, False, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        else:
            _merge(
                program, partials, x, total, factor, grad, shares,
                0, num_x, num_features, stride_x, num_splits, place, SHARE, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        _merge(
            program, partials, x, total, factor, grad, shares,
            first_x, num_x, num_features, stride_x, num_splits, place, SHARE, BLOCK_M, BLOCK_N,
        )  # fmt: skip
