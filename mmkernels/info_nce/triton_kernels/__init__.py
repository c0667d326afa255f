"""Cross-entropies of rows and columns of logits in Triton: one pass over tiles forward, strips of gradients backward.

Forward, G = 2 N M D FLOP: a program owns a block of tiles and walks down its columns. Every tile updates the running
maximum and sum of its rows in memory and of its columns in registers; the partial statistics, at most 32 for each row
and each column, are merged in a fixed order.

Backward, 3 G: a strip of the gradient of the logits, dS, is computed and stored in the dtype of the features; a plain
product of the strip gives dQ, and one of the strip transposed gives dK (mmkernels._tiles.products).
A product over a stored strip keeps its tiles large at every D. The alternative, one kernel that holds dQ in registers,
holds 64 rows x 512 features at most: its narrow tiles are bound by the L2 cache, and for each further 512 features it
computes dS once more (2 G more at D = 1024, 6 G more at D = 2048).

Memory beyond inputs and outputs, in bytes, e = bytes of an element:
    forward   12 N + 8 (min(32, N / tile) M + min(32, M / tile) N); sums of the warps, at most 4 MiB
    backward  12 N + 4 M; one strip, min(dS, max(2/3 of the L2 cache, 2048 rows), max(256 MiB, 128 rows));
              if there are several and e = 2, 4 min(N, M) D; partial products, 128 KiB for each multiprocessor
    and a padded copy of the features where D or the row stride is no multiple of 16 or the address none of 16 bytes.

No atomics: results are the same bits from run to run. Logits are in base 2 inside the kernels: 2^x is one instruction.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmkernels._checks import require_targets
from mmkernels._tiles.configs import choose
from mmkernels._tiles.launch import MERGE_BLOCK, MERGE_STEP, aligned, launcher, walk_down_columns
from mmkernels._tiles.products import fp16_unit, gradients_of_both
from mmkernels._tiles.replay import replayed
from mmkernels._tiles.slots import slot_flags
from mmkernels._tiles.triton import Tile, cdiv, chip_of, family_of, on_device
from mmkernels.info_nce.groups import Groups, number_groups, require_groups
from mmkernels.info_nce.triton_kernels.cross_entropy import (
    column_weights_kernel,
    finish_forward_kernel,
    forward_kernel,
    grad_logits_kernel,
    softmax_factors_kernel,
)


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
    of = CrossEntropy(queries, keys, scale, None, targets, groups, symmetric, label_smoothing)
    return *cross_entropy_forward(of), scale.new_empty(0, len(queries))


class CrossEntropy(NamedTuple):
    """The logits scale q.k + bias, and the targets of their rows and columns."""

    queries: Tensor  # [N, D]
    keys: Tensor  # [M, D]
    scale: Tensor  # []
    bias: Tensor | None  # [M], only for rows alone
    targets: Tensor | None  # [N], -1: none; None: i
    groups: Groups | None
    symmetric: bool
    label_smoothing: float


def cross_entropy_forward(of: CrossEntropy) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and log-sum-exps as info_nce_forward returns them. The loss of a row without a target means nothing.

    The log-sum-exps are in base 2, each as a rounded value and its rounding error.
    """
    config, precision = choose(of.queries)
    tile = config.of_forward(of.groups is not None, of.symmetric)
    targets = target_indices(of.targets, len(of.queries), of.queries.device)
    of = of._replace(queries=aligned(of.queries), keys=aligned(of.keys), targets=targets)
    with on_device(of.queries.device):
        return replayed(_forward, of, tile, precision)


def _forward(of: CrossEntropy, tile: Tile, precision: str) -> tuple[Tensor, Tensor, Tensor]:
    """cross_entropy_forward, of aligned features and given targets."""
    queries, keys, scale, bias, targets, groups, symmetric, _ = of
    assert targets is not None
    N, M = queries.shape[0], keys.shape[0]
    row_ids, key_ids = (targets, targets) if groups is None else groups[:2]

    walk = walk_down_columns(N, M, tile, queries.device)
    positives = scale.new_empty(N)
    planes = 2 if groups is None else 3
    row_partials = scale.new_empty(planes, walk.splits, N)
    col_partials = scale.new_empty(planes, walk.groups, M) if symmetric else row_partials
    parts = scale.new_empty(walk.groups * walk.splits * tile.block_m // 16 * tile.block_n if symmetric else 0)

    flags = {"SYMMETRIC": symmetric, "BIAS": bias is not None, "GROUPS": groups is not None}
    flags_of_device = slot_flags(tile, family_of(queries.device))
    launcher(forward_kernel, tile, PRECISION=precision, **flags, **flags_of_device)(
        (walk.groups * walk.splits,),
        queries, keys, scale, scale if bias is None else bias,
        row_ids, key_ids, positives, row_partials, col_partials, parts,
        N, M, len(key_ids), queries.shape[1], queries.stride(0), keys.stride(0), *walk,
    )  # fmt: skip
    return finish_forward(of, targets, row_partials, col_partials, positives, walk.groups, walk.splits)


def finish_forward(
    of: CrossEntropy,
    targets: Tensor,  # [N]
    row_partials: Tensor,  # [planes, num_splits, N]
    col_partials: Tensor,  # [planes, num_groups, M]
    positives: Tensor,  # [N]
    num_groups: int,
    num_splits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and log-sum-exps, as cross_entropy_forward returns them, from the statistics of parts of rows and columns:
    see finish_forward_kernel."""
    queries, keys, scale, bias, _, groups, symmetric, label_smoothing = of
    N, M = queries.shape[0], keys.shape[0]
    smoothed = label_smoothing > 0
    losses = scale.new_empty(N)
    row_lse, col_lse = scale.new_empty(2, N), scale.new_empty(2, M if symmetric else 0)
    of_query, of_key = (targets, targets) if groups is None else groups[2:]
    query_sum = queries.sum(0, dtype=torch.float32) if smoothed and symmetric else scale
    key_sum = keys.sum(0, dtype=torch.float32) if smoothed else scale
    bias_sum = scale if bias is None or not smoothed else bias.sum()
    flags = {"SYMMETRIC": symmetric, "BIAS": bias is not None, "GROUPS": groups is not None}
    launcher(finish_forward_kernel, SMOOTHED=smoothed, STEP=MERGE_STEP, BLOCK=MERGE_BLOCK, **flags)(
        (cdiv(N, MERGE_BLOCK) + (cdiv(M, MERGE_BLOCK) if symmetric else 0),),
        row_partials, col_partials, positives, targets, of_query, of_key, losses, row_lse, col_lse,
        queries, keys, query_sum, key_sum, bias_sum, scale,
        N, M, queries.shape[1], queries.stride(0), keys.stride(0), num_groups, num_splits, float(label_smoothing),
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
    of = CrossEntropy(queries, keys, scale, None, targets, groups, symmetric, label_smoothing)
    return cross_entropy_backward(of, grad_losses, row_lse, col_lse, [*output_mask, False], num_grad_keys)[:3]


def cross_entropy_backward(
    of: CrossEntropy,
    grad_losses: Tensor,  # [N], 0 where there is no target
    row_lse: Tensor,  # [2, N]
    col_lse: Tensor,  # [2, M]
    output_mask: list[bool],
    num_grad_keys: int | None = None,  # None: all
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of queries, keys, scale and bias; an empty tensor for each false entry of output_mask."""
    queries, keys, scale, _, targets, _, symmetric, label_smoothing = of
    N, M = queries.shape[0], keys.shape[0]
    num_grad_keys = M if num_grad_keys is None else num_grad_keys
    grad_queries = queries.new_empty(queries.shape if output_mask[0] else 0)
    grad_keys = keys.new_empty((num_grad_keys, keys.shape[1]) if output_mask[1] else 0)
    grad_bias = scale.new_empty(M if output_mask[3] else 0)
    identity = targets is None
    targets = target_indices(targets, N, queries.device)
    weights = grad_losses.float() * (0.5 if symmetric else 1.0)  # [N]: a g_i
    with on_device(queries.device):
        col_weights = column_weights(weights, targets, M, identity) if symmetric else weights
        grad_scale, grad_bias = _differentiate(
            of, targets, weights, col_weights, row_lse, col_lse, label_smoothing > 0,
            grad_queries if output_mask[0] else None, grad_keys if output_mask[1] else None, output_mask[2],
            grad_bias if output_mask[3] else None,
        )  # fmt: skip
    return grad_queries, grad_keys, grad_scale, grad_bias


def info_nce_block_backward(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    targets: Tensor,  # [N], -1: none
    row_lse: Tensor,  # [2, N], over all blocks
    col_lse: Tensor,  # [2, M]; empty unless symmetric
    row_weights: Tensor,  # [N]
    col_weights: Tensor,  # [M]; empty unless symmetric
    label_smoothing: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and scale of one block of several, float32; see _BLOCK_BACKWARD in ops.py."""
    symmetric = col_lse.numel() > 0
    grad_queries = scale.new_empty(queries.shape if output_mask[0] else 0)
    grad_keys = scale.new_empty(keys.shape if output_mask[1] else 0)
    of = CrossEntropy(queries, keys, scale, None, targets, None, symmetric, label_smoothing)
    row_weights = row_weights.contiguous()
    col_weights = col_weights.contiguous() if symmetric else row_weights
    with on_device(queries.device):
        grad_scale, _ = _differentiate(
            of, targets.contiguous(), row_weights, col_weights, row_lse, col_lse, False,
            grad_queries if output_mask[0] else None, grad_keys if output_mask[1] else None, output_mask[2], None,
        )  # fmt: skip
    return grad_queries, grad_keys, grad_scale


def _differentiate(
    of: CrossEntropy,
    targets: Tensor,  # [N]
    weights: Tensor,  # [N], the gradient of the cross-entropy of each row
    col_weights: Tensor,  # [M], of each column
    row_lse: Tensor,  # [2, N]
    col_lse: Tensor,  # [2, M]
    spread: bool,  # take off what label smoothing spreads evenly
    grad_queries: Tensor | None,
    grad_keys: Tensor | None,
    of_scale: bool,
    grad_bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Fill the gradients; returns those of the scale and the bias."""
    config, precision = choose(of.queries)
    tile = config.of_grad_logits(of.groups is not None, spread)
    of = of._replace(queries=aligned(of.queries), keys=aligned(of.keys), targets=targets)
    logits = _Logits(of, row_lse, col_lse, weights_of_logits(of, weights, col_weights), spread, tile, precision)
    shares = replayed(_gradients, logits, config.product, grad_queries, grad_keys, of_scale, grad_bias)[0]
    grad_scale = shares.sum() if of_scale else shares
    grad_bias = of.scale.new_empty(0) if grad_bias is None else grad_bias
    unit = logits.weights.unit
    return (grad_scale, grad_bias) if unit is None else (grad_scale * unit, grad_bias * unit)


def _gradients(
    logits: "_Logits",
    product: Tile,
    grad_queries: Tensor | None,
    grad_keys: Tensor | None,
    of_scale: bool,
    grad_bias: Tensor | None,
) -> tuple[Tensor]:
    """Fill the gradients; returns the parts of the scale's."""
    factors = _factors(logits)
    shares = gradients_of_both(
        functools.partial(_fill, logits, factors), logits.of.queries, logits.of.keys, logits.tile, product,
        logits.precision, logits.weights.factor, grad_queries, grad_keys, of_scale, grad_bias,
    )  # fmt: skip
    return (shares,)


class WeightsOfLogits(NamedTuple):
    """What the gradient of the logits takes, in its unit."""

    of_rows: Tensor  # [N], the gradient of the cross-entropy of each row
    of_cols: Tensor  # [M], of each column
    row_shares: Tensor  # [N], with groups: what each positive of a row subtracts
    col_shares: Tensor  # [M], what each positive of a column subtracts
    factor: Tensor  # [], of the products of the gradient: the scale times the unit
    unit: Tensor | None  # [], of float16; None: 1


def weights_of_logits(of: CrossEntropy, of_rows: Tensor, of_cols: Tensor) -> WeightsOfLogits:
    queries, keys, scale, _, _, groups, symmetric, label_smoothing = of
    factor, unit = scale, None
    if queries.dtype == torch.float16:
        # |dS| <= 2.5 peak.
        unit = fp16_unit(torch.maximum(2 * of_rows.abs().amax(), of_cols.abs().amax()))
        factor = scale * unit
        of_rows, of_cols = of_rows / unit, of_cols / unit
    row_shares = col_shares = of_rows
    if groups is not None:
        row_shares = of_rows * (1 - label_smoothing) / groups.of_query
        if symmetric:
            # An unmatched key may belong to no query's group: its share is then 0 / 1.
            grouped = len(groups.keys)
            col_shares = of_cols[:grouped] * (1 - label_smoothing) / groups.of_key.clamp(min=1)
            col_shares = F.pad(col_shares, (0, keys.shape[0] - grouped))
    return WeightsOfLogits(of_rows, of_cols, row_shares, col_shares, factor, unit)


class _Logits(NamedTuple):
    """All that the gradient of the logits depends on."""

    of: CrossEntropy  # its features padded, its targets given
    row_lse: Tensor  # [2, N]
    col_lse: Tensor  # [2, M]
    weights: WeightsOfLogits
    spread: bool  # take off what label smoothing spreads evenly
    tile: Tile
    precision: str


def _fill(logits: _Logits, factors: tuple[Tensor, ...], strip: Tensor, first_row: int, first_col: int) -> None:
    """The part of dS that begins at first_row, first_col into the strip; see gradients_of_both."""
    queries, keys, scale, bias, targets, groups, symmetric, label_smoothing = logits.of
    assert targets is not None
    row_ids, key_ids = (targets, targets) if groups is None else groups[:2]
    tile, (height, width) = logits.tile, strip.shape
    flags = {"SYMMETRIC": symmetric, "BIAS": bias is not None, "GROUPS": groups is not None}
    flags["SMOOTHED"] = logits.spread
    of_family = grad_logits_flags(family_of(strip.device))
    tiles = height // tile.block_m * (width // tile.block_n)
    # Without groups a program takes several tiles, one after the other: two programs fill a multiprocessor.
    programs = tiles if groups is not None else min(tiles, 2 * chip_of(strip.device).multiprocessors)
    launcher(grad_logits_kernel, tile, PRECISION=logits.precision, **flags, **of_family)(
        (programs,),
        queries, keys, scale, scale if bias is None else bias,
        row_ids, key_ids, logits.row_lse, logits.col_lse, *logits.weights[:4], *factors, strip,
        first_row, first_col, height, width, len(queries), len(keys), len(key_ids),
        queries.shape[1], queries.stride(0), keys.stride(0), float(label_smoothing),
    )  # fmt: skip


def grad_logits_flags(family: str) -> dict[str, int]:
    """grad_logits_kernel's FLAT: not on gfx942, where it takes 96 KB of shared memory."""
    return {"FLAT": int(family != "gfx942")}


def _factors(logits: _Logits) -> tuple[Tensor, ...]:
    """What softmax_factors_kernel stores: the factors of rows [N] and columns [M], the bounds of their blocks, and the
    tiles with a positive."""
    of, row_lse, col_lse, (weights, col_weights, *_), _, tile, _ = logits
    if of.groups is not None:
        return (weights,) * 5  # no tile is plain
    N, M = len(of.queries), len(of.keys)
    row_blocks, col_blocks = cdiv(N, tile.block_m), cdiv(M, tile.block_n)
    positives_in = weights.new_empty(row_blocks * cdiv(col_blocks, 32), dtype=torch.int32)
    col_blocks = col_blocks if of.symmetric else 0
    row_factors, row_bounds = weights.new_empty(N), weights.new_empty(2, row_blocks)
    col_factors, col_bounds = weights.new_empty(M if of.symmetric else 0), weights.new_empty(2, col_blocks)
    block = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    launcher(softmax_factors_kernel, SYMMETRIC=of.symmetric, **block)(
        (row_blocks + col_blocks,),
        of.targets, row_lse, col_lse, weights, col_weights, row_factors, col_factors, row_bounds, col_bounds,
        positives_in, N, M,
    )  # fmt: skip
    return row_factors, col_factors, row_bounds, col_bounds, positives_in


def column_weights(weights: Tensor, targets: Tensor, num_keys: int, identity: bool) -> Tensor:
    """[M]: the sum of the weights of the queries whose target is the key."""
    if identity and num_keys == weights.shape[0]:
        return weights
    if identity:
        return F.pad(weights, (0, num_keys - weights.shape[0]))
    col_weights = weights.new_empty(num_keys)
    launcher(column_weights_kernel, STEP=MERGE_STEP, BLOCK=MERGE_BLOCK)(
        (cdiv(num_keys, MERGE_BLOCK),),
        targets, weights, col_weights, weights.shape[0], num_keys,
    )  # fmt: skip
    return col_weights


def target_indices(targets: Tensor | None, num_queries: int, device: torch.device) -> Tensor:
    return torch.arange(num_queries, device=device) if targets is None else targets.contiguous()
