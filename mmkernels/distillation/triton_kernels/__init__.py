"""Distillation in Triton: the cross-entropies of the student's softmaxes under the teacher's, over tiles of both.

Forward, G + G' = 2 N M (D + D') FLOP: a program owns a block of tiles and walks down its columns. It makes the
student's tile and the teacher's, and joins what rows and columns need of both: the maximum m and the sum z of
2^(s - m), the teacher's n and y of 2^(t - n), and a, the sum of 2^(t - n) (s - m). The loss of a row is log2 z - a / y.
Partial results, at most 32 for each row and each column, are merged in a fixed order.

Backward, 3 G + G': strips as in info_nce, with the gradient of the logits from both tiles.

No atomics: results are the same bits from run to run. Logits are in base 2 inside the kernels.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._tiles.configs import choose, choose_distillation, strip_flags
from mmkernels._tiles.launch import MERGE_BLOCK, aligned, launcher, walk_down_columns
from mmkernels._tiles.products import fp16_unit, gradients_of_both
from mmkernels._tiles.slots import slot_flags
from mmkernels._tiles.triton import Tile, cdiv, chip_of, family_of, on_device
from mmkernels.distillation.triton_kernels.forward import (
    COLUMN_SUMS,
    SUMS,
    distillation_forward_kernel,
    finish_distillation_kernel,
)
from mmkernels.distillation.triton_kernels.gradient import distillation_factors_kernel, distillation_grad_kernel


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

    walk = walk_down_columns(N, M, tile, queries.device)
    distilled, matched, positives = (scale.new_empty(N) for _ in range(3))
    row_lse, teacher_row_lse = (scale.new_empty(2, N) for _ in range(2))
    col_lse, teacher_col_lse = (scale.new_empty(2, M if symmetric else 0) for _ in range(2))
    row_partials = scale.new_empty(SUMS, walk.splits, N)
    col_partials = scale.new_empty(SUMS, walk.groups, M) if symmetric else row_partials
    of_parts = walk.groups * walk.splits * COLUMN_SUMS.value * (tile.block_m // 16) * tile.block_n
    parts = scale.new_empty(of_parts if symmetric else 0)
    with on_device(queries.device):
        flags = {"SYMMETRIC": symmetric, **forward_flags(tile, family_of(queries.device))}
        launcher(distillation_forward_kernel, tile, PRECISION=precision, **flags)(
            (walk.groups * walk.splits,),
            queries, keys, scale, teacher_queries, teacher_keys, teacher_scale, positives, row_partials, col_partials,
            parts, N, M, queries.shape[1], teacher_queries.shape[1],
            queries.stride(0), keys.stride(0), teacher_queries.stride(0), teacher_keys.stride(0), *walk,
        )  # fmt: skip
        launcher(finish_distillation_kernel, SYMMETRIC=symmetric, BLOCK=MERGE_BLOCK)(
            (cdiv(N, MERGE_BLOCK),),
            row_partials, col_partials, positives, distilled, matched,
            row_lse, col_lse, teacher_row_lse, teacher_col_lse, N, M, walk.groups, walk.splits,
        )  # fmt: skip
    return distilled, matched, row_lse, col_lse, teacher_row_lse, teacher_col_lse, scale.new_empty(0, M, N)


def forward_flags(tile: Tile, family: str) -> dict[str, int]:
    """distillation_forward_kernel's SLOT_HIGH and FLAT: on gfx942 a flat loop spills."""
    return slot_flags(tile, family) | ({"FLAT": 0} if family == "gfx942" else {})


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
    factors: tuple[Tensor, ...]  # of rows and columns, and the bounds of their blocks
    symmetric: bool
    tile: Tile
    precision: str

    def fill(self, strip: Tensor, first_row: int, first_col: int) -> None:
        """The part of dS that begins at first_row, first_col into the strip; see gradients_of_both."""
        queries, keys, teacher_queries, teacher_keys = self.queries, self.keys, self.teacher_queries, self.teacher_keys
        height, width = strip.shape
        # A program takes several tiles, one after the other: two programs fill a multiprocessor.
        programs = 2 * chip_of(strip.device).multiprocessors
        flags = {"SYMMETRIC": self.symmetric, **strip_flags(family_of(strip.device))}
        launcher(distillation_grad_kernel, self.tile, PRECISION=self.precision, **flags)(
            (min(height // self.tile.block_m * (width // self.tile.block_n), programs),),
            queries, keys, self.scale, teacher_queries, teacher_keys, self.teacher_scale,
            self.row_lse, self.col_lse, self.teacher_row_lse, self.teacher_col_lse,
            self.weights, self.teacher_weights, self.match_weights, *self.factors, strip,
            first_row, first_col, height, width, len(queries), len(keys), queries.shape[1], teacher_queries.shape[1],
            queries.stride(0), keys.stride(0), teacher_queries.stride(0), teacher_keys.stride(0),
        )  # fmt: skip


def _factors(
    statistics: tuple[Tensor, ...],  # the log-sum-exps [2, N or M] of rows and columns, the student's and the teacher's
    weights: Tensor,  # [N]
    teacher_weights: Tensor,  # [N]
    symmetric: bool,
    tile: Tile,
) -> tuple[Tensor, ...]:
    """What distillation_factors_kernel stores."""
    N, M = len(weights), statistics[1].shape[1]
    row_blocks, col_blocks = cdiv(N, tile.block_m), cdiv(M, tile.block_n)
    row_factors, row_bounds = weights.new_empty(2, N), weights.new_empty(2, 2, row_blocks)
    col_factors, col_bounds = weights.new_empty(2, M), weights.new_empty(2, 2, col_blocks)
    block = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    launcher(distillation_factors_kernel, SYMMETRIC=symmetric, **block)(
        (row_blocks + col_blocks, 2),
        *statistics, weights, teacher_weights, row_factors, col_factors, row_bounds, col_bounds, N, M,
    )  # fmt: skip
    return row_factors, col_factors, row_bounds, col_bounds


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
        tile = choose_distillation(queries).grad_logits
        statistics = (row_lse, col_lse, teacher_row_lse, teacher_col_lse)
        logits = _Logits(
            aligned(queries), aligned(keys), scale, aligned(teacher_queries), aligned(teacher_keys), teacher_scale,
            *statistics, weights, teacher_weights, match_weights.contiguous(),
            _factors(statistics, weights, teacher_weights, symmetric, tile), symmetric, tile, precision,
        )  # fmt: skip
        shares = gradients_of_both(
            logits.fill, logits.queries, logits.keys, logits.tile, config.product, precision, factor,
            grad_queries if output_mask[0] else None, grad_keys if output_mask[1] else None, output_mask[2],
        )  # fmt: skip
    grad_scale = shares.sum() if output_mask[2] else shares
    return grad_queries, grad_keys, grad_scale if unit is None or not output_mask[2] else grad_scale * unit
