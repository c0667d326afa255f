"""Cross-entropies of rows and columns of logits in Triton: one pass over tiles forward, strips of gradients backward.

Forward, G = 2 N M D FLOP: a program owns a block of tiles. Every tile updates the running maximum and sum of its
rows and of its columns; the partial statistics, at most 32 for each row and each column, are merged in a fixed order.

Backward, 4 G: for a strip of queries the gradient of the logits, dS, is computed and stored in the dtype of the
features; dQ of the strip is then a plain product dS K. Strips of keys, stored transposed, give dK in the same way.
A product over a stored strip keeps its tiles large at every D. The alternative, one kernel that holds dQ in registers,
holds 64 rows x 512 features at most: its narrow tiles are bound by the L2 cache, and for each further 512 features it
computes dS once more (2 G more at D = 1024, 6 G more at D = 2048).

Memory beyond inputs and outputs, in bytes, e = bytes of an element:
    forward   12 N + 8 (min(32, N / tile) M + min(32, M / tile) N)
    backward  12 N + 4 M; one strip, at most max(128 rows, min(32 MiB, a quarter of dS)); partial products, 32.5 MiB
    and a padded copy of the features where D or the row stride is no multiple of 16 or the address none of 16 bytes.

No atomics: results are the same bits from run to run. Logits are in base 2 inside the kernels: 2^x is one instruction.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from mmkernels._targets import require_targets
from mmkernels._tiles.configs import Config, choose
from mmkernels._tiles.triton import Tile, on_device, round_up
from mmkernels.info_nce.groups import Groups, number_groups, require_groups
from mmkernels.info_nce.triton_kernels.cross_entropy import (
    column_weights_kernel,
    finish_forward_kernel,
    forward_kernel,
    grad_logits_kernel,
    merge_product_kernel,
    product_kernel,
)

# scale * q.k is rounded before a maximum is taken from it: fused into one operation with the subtraction, the largest
# logit less itself would not be zero, and a loss near zero at a large scale would be noise. Dots stay fused.
NO_FUSION = {"enable_fp_fusion": False}
MERGE_ROWS = 32  # rows of a program of _merge_product_kernel
MERGE_FEATURES = 128  # and its features
MERGE_STEP = 16  # depth of a step of the kernels without a dot product
MERGE_BLOCK = 128  # and the entries of one of their programs

MAX_PARTIALS = 32  # partial statistics of a row or a column
_STRIP_BYTES = 32 << 20  # about what the L2 cache of an H100 holds beside the features
_STRIP_ROWS = 128  # the fewest rows of a strip
_PRODUCT_PROGRAMS = 256  # programs that the product over a strip is split into, for lack of output tiles
FP16_PEAK = 8192.0


def info_nce_forward(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    targets: Tensor | None,  # [N]
    query_groups: Tensor | None,  # [N]
    key_groups: Tensor | None,  # [M] or fewer: the keys past its end are of no group
    symmetric: bool,
    label_smoothing: float,
    keep_products: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The losses [N] and the log-sum-exps of the rows [2, N] and of the columns [2, M] ([2, 0] unless symmetric); no
    products are kept."""
    if keep_products:
        raise NotImplementedError("keep_products: expected False, the Triton kernels make the products again")
    if targets is not None:
        require_targets("info_nce", targets, keys.shape[0], "keys")
    groups = None
    if query_groups is not None and key_groups is not None:
        groups = number_groups(query_groups, key_groups)
        require_groups(groups, query_groups, key_groups, targets, symmetric)
    found = cross_entropy_forward(queries, keys, scale, None, targets, symmetric, label_smoothing, groups)
    return *found, scale.new_empty(0, len(queries))


def cross_entropy_forward(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    bias: Tensor | None,  # [M], only for rows alone
    targets: Tensor | None,  # [N], -1: none; None: i
    symmetric: bool,
    label_smoothing: float,
    groups: Groups | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As info_nce_forward; the logits are scale q.k + bias. The loss of a row without a target means nothing.

    The log-sum-exps are in base 2, each as the rounded value and what rounding took.
    """
    N, M = queries.shape[0], keys.shape[0]
    config, precision = choose(queries)
    tile = config.forward
    queries, keys = aligned(queries), aligned(keys)
    targets = _targets(targets, N, queries.device)
    row_ids, key_ids, of_query, of_key = (targets,) * 4 if groups is None else groups

    row_tiles, col_tiles = triton.cdiv(N, tile.block_m), triton.cdiv(M, tile.block_n)
    tiles_per_group = triton.cdiv(row_tiles, MAX_PARTIALS)
    tiles_per_split = triton.cdiv(col_tiles, MAX_PARTIALS)
    row_groups, splits = triton.cdiv(row_tiles, tiles_per_group), triton.cdiv(col_tiles, tiles_per_split)
    smoothed = label_smoothing > 0
    losses, positives = scale.new_empty(N), scale.new_empty(N)
    row_lse, col_lse = scale.new_empty(2, N), scale.new_empty(2, M if symmetric else 0)
    planes = 2 if groups is None else 3
    row_partials = scale.new_empty(planes, splits, N)
    col_partials = scale.new_empty(planes, row_groups, M) if symmetric else row_partials

    with on_device(queries.device):
        forward_kernel[(row_groups * splits,)](
            queries, keys, scale, scale if bias is None else bias,
            row_ids, key_ids, positives, row_partials, col_partials,
            N, M, len(key_ids), queries.shape[1], queries.stride(0), keys.stride(0),
            tiles_per_group, tiles_per_split, row_groups, splits,
            SYMMETRIC=symmetric, BIAS=bias is not None, GROUPS=groups is not None,
            PRECISION=precision, **launch_options(tile),
        )  # fmt: skip
        query_sum = queries.sum(0, dtype=torch.float32) if smoothed and symmetric else scale
        key_sum = keys.sum(0, dtype=torch.float32) if smoothed else scale
        bias_sum = scale if bias is None or not smoothed else bias.sum()
        blocks = triton.cdiv(N, MERGE_BLOCK) + (triton.cdiv(M, MERGE_BLOCK) if symmetric else 0)
        finish_forward_kernel[(blocks,)](
            row_partials, col_partials, positives, targets, of_query, of_key, losses, row_lse, col_lse,
            queries, keys, query_sum, key_sum, bias_sum, scale,
            N, M, queries.shape[1], queries.stride(0), keys.stride(0), row_groups, splits, float(label_smoothing),
            SYMMETRIC=symmetric, SMOOTHED=smoothed, BIAS=bias is not None, GROUPS=groups is not None,
            STEP=MERGE_STEP, BLOCK=MERGE_BLOCK, **NO_FUSION,
        )  # fmt: skip
    return losses, row_lse, col_lse


def info_nce_backward(
    grad_losses: Tensor,  # [N]
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    targets: Tensor | None,  # [N]
    query_groups: Tensor | None,  # [N]
    key_groups: Tensor | None,  # [M] or fewer
    row_lse: Tensor,  # [2, N]
    col_lse: Tensor,  # [2, M]
    products: Tensor,  # none
    symmetric: bool,
    label_smoothing: float,
    num_grad_keys: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, the first num_grad_keys keys and scale; an empty tensor for each false entry of
    output_mask."""
    groups = None
    if query_groups is not None and key_groups is not None:
        groups = number_groups(query_groups, key_groups)
    arguments = (queries, keys, scale, None, targets, row_lse, col_lse, symmetric, label_smoothing)
    return cross_entropy_backward(grad_losses, *arguments, [*output_mask, False], groups, num_grad_keys)[:3]


def cross_entropy_backward(
    grad_losses: Tensor,  # [N], 0 where there is no target
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    bias: Tensor | None,  # [M], only for rows alone
    targets: Tensor | None,  # [N], -1: none; None: i
    row_lse: Tensor,  # [2, N]
    col_lse: Tensor,  # [2, M]
    symmetric: bool,
    label_smoothing: float,
    output_mask: list[bool],
    groups: Groups | None = None,
    num_grad_keys: int | None = None,  # None: all
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of queries, keys, scale and bias; an empty tensor for each false entry of output_mask."""
    N, M = queries.shape[0], keys.shape[0]
    num_grad_keys = M if num_grad_keys is None else num_grad_keys
    grad_queries = queries.new_empty(queries.shape if output_mask[0] else 0)
    grad_keys = keys.new_empty((num_grad_keys, keys.shape[1]) if output_mask[1] else 0)
    grad_bias = scale.new_empty(M if output_mask[3] else 0)
    config, precision = choose(queries)
    padded_queries, padded_keys = aligned(queries), aligned(keys)
    identity = targets is None
    targets = _targets(targets, N, queries.device)

    weights = grad_losses.float() * (0.5 if symmetric else 1.0)  # [N]: a g_i
    factor = scale
    unit = None
    with on_device(queries.device):
        col_weights = _column_weights(weights, targets, M, identity) if symmetric else weights
        if queries.dtype == torch.float16:
            # |dS| <= 2.5 peak. In units of peak / 8192 the largest fits fp16, and what falls below its least normal
            # number is under 1e-8 of the peak.
            peak = torch.maximum(2 * weights.abs().amax(), col_weights.abs().amax())
            unit = torch.where(peak > 0, peak, 1.0) / FP16_PEAK
            factor = scale * unit
            weights, col_weights = weights / unit, col_weights / unit
        row_shares = col_shares = weights
        if groups is not None:
            row_shares = weights * (1 - label_smoothing) / groups.of_query
            if symmetric:
                # A key that is not matched may be of no query's group: 0 / 1 of it.
                grouped = len(groups.keys)
                col_shares = col_weights[:grouped] * (1 - label_smoothing) / groups.of_key.clamp(min=1)
                col_shares = F.pad(col_shares, (0, M - grouped))
        # <Q, dQ> = <K, dK>: the scale takes its gradient from whichever product is made anyway, and whole.
        shares = scale.new_empty(0)
        for_queries = output_mask[0] or (output_mask[2] and not (output_mask[1] and num_grad_keys == M))
        logits = _Logits(
            padded_queries, padded_keys, scale, bias, targets, groups, row_lse, col_lse, weights, col_weights,
            row_shares, col_shares, symmetric, label_smoothing, config, precision,
        )  # fmt: skip
        if for_queries:
            shares = strip_products(
                functools.partial(logits.fill, False), padded_queries, padded_keys, config.product, precision, factor,
                grad_queries if output_mask[0] else None, output_mask[2],
            )  # fmt: skip
        if output_mask[1] or output_mask[3]:
            key_shares = strip_products(
                functools.partial(logits.fill, True), padded_keys, padded_queries, config.product, precision, factor,
                grad_keys if output_mask[1] else None, output_mask[2] and not for_queries,
                grad_bias if output_mask[3] else None,
            )  # fmt: skip
            shares = shares if for_queries else key_shares
    grad_scale = shares.sum() if output_mask[2] else scale.new_empty(0)
    if unit is not None:
        grad_scale, grad_bias = grad_scale * unit, grad_bias * unit
    return grad_queries, grad_keys, grad_scale, grad_bias


class _Logits(NamedTuple):
    """All that the gradient of the logits is made from."""

    queries: Tensor  # [N, D]
    keys: Tensor  # [M, D]
    scale: Tensor  # []
    bias: Tensor | None  # [M]
    targets: Tensor  # [N]
    groups: Groups | None
    row_lse: Tensor  # [2, N]
    col_lse: Tensor  # [2, M]
    row_weights: Tensor  # [N], the gradient of the cross-entropy of each row
    col_weights: Tensor  # [M], of each column
    row_shares: Tensor  # [N], of groups: what each positive of a row takes off
    col_shares: Tensor  # [M], of a column
    symmetric: bool
    label_smoothing: float
    config: Config
    precision: str

    def fill(self, of_keys: bool, strip: Tensor, first: int, rows: int) -> None:
        """The strip's rows: rows `first` and following of dS (of_keys: of dS transposed), zero past its end."""
        queries, keys, tile = self.queries, self.keys, self.config.of_grad_logits(self.groups is not None)
        width = strip.shape[1]
        height, breadth = (width, rows) if of_keys else (rows, width)
        row_ids, key_ids = (self.targets,) * 2 if self.groups is None else self.groups[:2]
        grad_logits_kernel[(triton.cdiv(height, tile.block_m) * triton.cdiv(breadth, tile.block_n),)](
            queries, keys, self.scale, self.scale if self.bias is None else self.bias,
            row_ids, key_ids, self.row_lse, self.col_lse, self.row_weights, self.col_weights,
            self.row_shares, self.col_shares, strip,
            first, rows, len(queries), len(keys), len(key_ids), queries.shape[1], queries.stride(0), keys.stride(0),
            width, float(self.label_smoothing),
            SYMMETRIC=self.symmetric, OF_KEYS=of_keys, SMOOTHED=self.label_smoothing > 0,
            BIAS=self.bias is not None, GROUPS=self.groups is not None,
            PRECISION=self.precision, **launch_options(tile),
        )  # fmt: skip


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
    # A quarter of dS at most: the whole of it is never stored, however small it is.
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


def _column_weights(weights: Tensor, targets: Tensor, num_keys: int, identity: bool) -> Tensor:
    """[M]: the sum of the weights of the queries whose target is the key."""
    if identity:
        return F.pad(weights, (0, num_keys - weights.shape[0]))
    col_weights = weights.new_empty(num_keys)
    column_weights_kernel[(triton.cdiv(num_keys, MERGE_BLOCK),)](
        targets, weights, col_weights, weights.shape[0], num_keys, STEP=MERGE_STEP, BLOCK=MERGE_BLOCK, **NO_FUSION
    )
    return col_weights


def _targets(targets: Tensor | None, num_queries: int, device: torch.device) -> Tensor:
    return torch.arange(num_queries, device=device) if targets is None else targets.contiguous()


def aligned(features: Tensor) -> Tensor:
    """The features as the kernels are compiled for them: contiguous rows that start at multiples of 16 bytes.

    Any other layout is copied once, with zeros up to the next multiple of 16 features.
    """
    rows, D = features.shape
    if features.stride(1) == 1 and D % 16 == 0 and features.stride(0) % 16 == 0 and features.data_ptr() % 16 == 0:
        return features
    copy = features.new_zeros(rows, round_up(D, 16))
    copy[:, :D] = features
    return copy


def launch_options(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **NO_FUSION,
    }
