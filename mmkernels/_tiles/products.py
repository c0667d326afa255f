"""The gradients of both sides from that of the logits, dS: strips of it are filled by the loss, stored, and multiplied.

A strip has rows of dS (for dQ = dS K) or of dS transposed (for dK = dS^T Q), in the dtype of the features.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._tiles.engine import program_tile
from mmkernels._tiles.launch import NO_FUSION, launch_options
from mmkernels._tiles.triton import Tile, dot, round_up

MERGE_ROWS = 32  # rows of a program of merge_product_kernel
MERGE_FEATURES = 128  # and its features

_STRIP_BYTES = 32 << 20  # fits beside the features into the L2 cache of an H100, 50 MB
_STRIP_ROWS = 128  # the fewest rows of a strip
_PRODUCT_PROGRAMS = 256  # a product over a strip with fewer output tiles is split along its depth into so many
_FP16_PEAK = 8192.0


@triton.jit(do_not_specialize=["num_y", "strip_rows", "steps_per_split", "num_splits"])
def product_kernel(
    strip, y, partials,
    num_y, D, stride_y, strip_rows, stride_strip, steps_per_split, num_splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """partials [num_splits, strip_rows, D] = dS y over a split of the columns of the strip each, in float32."""
    split = tl.program_id(0) % num_splits
    row_tile, feature_tile = program_tile(
        tl.program_id(0) // num_splits, tl.cdiv(strip_rows, BLOCK_M), tl.cdiv(D, BLOCK_N)
    )
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    features = feature_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (features < D)[None, :]
    first = split * steps_per_split * BLOCK_K
    end = tl.minimum(first + steps_per_split * BLOCK_K, stride_strip)
    k = first + tl.arange(0, BLOCK_K)
    strip_ptrs = strip + tl.minimum(rows, strip_rows - 1).to(tl.int64)[:, None] * stride_strip + k[None, :]  # [BM, BK]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(first, end, BLOCK_K):
        # The strip is zero past num_y, so that the last row of y may stand in for rows that do not exist.
        y_rows = tl.minimum(start + tl.arange(0, BLOCK_K), num_y - 1).to(tl.int64) * stride_y
        y_tile = tl.load(y + y_rows[:, None] + features[None, :], mask=inside, other=0.0)  # [BK, BN]
        acc = dot(tl.load(strip_ptrs), y_tile, acc, PRECISION)
        strip_ptrs += BLOCK_K
    out = partials + (split.to(tl.int64) * strip_rows + rows.to(tl.int64)[:, None]) * D + features[None, :]
    tl.store(out, acc, mask=(rows < strip_rows)[:, None] & inside)


@triton.jit(do_not_specialize=["first_x", "num_features", "strip_rows", "num_splits", "first_share"])
def merge_product_kernel(
    partials, x, factor, grad, shares,
    first_x, num_features, D, stride_x, strip_rows, num_splits, first_share,
    STORE: tl.constexpr, SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """grad[first_x + r] = factor * the sum of the partial products; shares: <x, sum>, part of d loss / d scale.

    s = scale <q, k>, so d loss / d scale = sum_ij dS_ij <q_i, k_j> = <Q, dS K>, with no division by the scale.
    """
    row_tile = tl.program_id(0) // tl.cdiv(D, BLOCK_N)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.program_id(0) % tl.cdiv(D, BLOCK_N) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (rows < strip_rows)[:, None] & (features < num_features)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    at = partials + rows.to(tl.int64)[:, None] * D + features[None, :]
    plane = tl.cast(strip_rows, tl.int64) * D
    for _split in range(num_splits):
        acc += tl.load(at, mask=inside, other=0.0)
        at += plane
    x_rows = (first_x + rows).to(tl.int64)[:, None]
    if SHARE:
        x_tile = tl.load(x + x_rows * stride_x + features[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(shares + first_share + tl.program_id(0), tl.sum(tl.sum(x_tile * acc, 1), 0))
    if STORE:
        out = grad + x_rows * num_features + features[None, :]
        tl.store(out, (acc * tl.load(factor)).to(grad.dtype.element_ty), mask=inside)


def fp16_unit(peak: Tensor) -> Tensor:
    """The unit of dS in float16, where |dS| <= 5 peak: peak / 8192.

    The largest then fits, 40960 < 65504, and numbers below the least normal one, 6.1e-5, are under 1e-8 of the peak.
    """
    return torch.where(peak > 0, peak, 1.0) / _FP16_PEAK


def strip_products(
    fill: Callable[[Tensor, int, int], None],  # (strip, first, rows): rows first, first + 1, ... of dS into the strip
    x: Tensor,
    y: Tensor,
    product: Tile,
    precision: str,
    factor: Tensor,
    grad: Tensor | None,
    share: bool = False,
    sums: Tensor | None = None,
) -> Tensor:
    """Fill grad = factor * dS y strip by strip, dS [rows of x, rows of y]; and sums with the sums of the strips' rows.

    grad may have fewer rows than x: the last get none. Returns shares of the scale's gradient if `share`.
    """
    num_x, D = x.shape[0] if grad is None else grad.shape[0], x.shape[1]
    num_y = y.shape[0]
    width = round_up(num_y, 64)
    strip_rows = min(_STRIP_BYTES // (x.element_size() * width), _STRIP_BYTES // (4 * D)) // _STRIP_ROWS * _STRIP_ROWS
    # A quarter of dS at most: it is never stored whole, however small it is.
    strip_rows = min(strip_rows, round_up(triton.cdiv(num_x, 4), _STRIP_ROWS))
    strip_rows = min(max(strip_rows, _STRIP_ROWS), num_x)
    tiles = triton.cdiv(strip_rows, product.block_m) * triton.cdiv(D, product.block_n)
    steps = width // product.block_k
    splits = max(1, min(_PRODUCT_PROGRAMS // tiles, steps // 4))
    steps_per_split = triton.cdiv(steps, splits)
    splits = triton.cdiv(steps, steps_per_split)

    strip = x.new_empty(strip_rows, width)
    partials = factor.new_empty(splits, strip_rows, D)
    features = triton.cdiv(D, MERGE_FEATURES)
    starts = range(0, num_x, strip_rows)
    shares_per_strip = triton.cdiv(strip_rows, MERGE_ROWS) * features
    num_shares = (len(starts) - 1) * shares_per_strip + triton.cdiv(num_x - starts[-1], MERGE_ROWS) * features
    shares = factor.new_empty(num_shares if share else 0)
    for index, first in enumerate(starts):
        rows = min(strip_rows, num_x - first)
        fill(strip, first, rows)
        if sums is not None:
            torch.sum(strip[:rows], 1, dtype=torch.float32, out=sums[first : first + rows])
        if grad is None and not share:
            continue
        product_kernel[(triton.cdiv(rows, product.block_m) * triton.cdiv(D, product.block_n) * splits,)](
            strip, y, partials,
            num_y, D, y.stride(0), rows, width, steps_per_split, splits,
            PRECISION=precision, **launch_options(product),
        )  # fmt: skip
        merge_product_kernel[(triton.cdiv(rows, MERGE_ROWS) * features,)](
            partials, x, factor, x if grad is None else grad, shares,
            first, D if grad is None else grad.shape[1], D, x.stride(0), rows, splits, index * shares_per_strip,
            STORE=grad is not None, SHARE=share, BLOCK_M=MERGE_ROWS, BLOCK_N=MERGE_FEATURES, **NO_FUSION,
        )  # fmt: skip
    return shares


def products_of_both(
    fill: Callable[[bool, Tensor, int, int], None],  # (of_keys, strip, first, rows): strip_products' fill of one side
    queries: Tensor,
    keys: Tensor,
    product: Tile,
    precision: str,
    factor: Tensor,
    grad_queries: Tensor | None,
    grad_keys: Tensor | None,
    of_scale: bool,
    key_sums: Tensor | None = None,
) -> Tensor:
    """Fill the gradients of both sides, and key_sums with the sums of dS over the queries. Returns the gradient of the
    scale in the unit of dS, []; an empty tensor unless of_scale."""
    # <Q, dQ> = <K, dK>: the scale takes its gradient from whichever product is made anyway, and whole.
    whole = grad_keys is not None and len(grad_keys) == len(keys)
    for_queries = grad_queries is not None or (of_scale and not whole)
    shares = factor.new_empty(0)
    if for_queries:
        of_queries = functools.partial(fill, False)
        shares = strip_products(of_queries, queries, keys, product, precision, factor, grad_queries, of_scale)
    if grad_keys is not None or key_sums is not None:
        of_keys, share = functools.partial(fill, True), of_scale and not for_queries
        key_shares = strip_products(of_keys, keys, queries, product, precision, factor, grad_keys, share, key_sums)
        shares = shares if for_queries else key_shares
    return shares.sum() if of_scale else shares.new_empty(0)
