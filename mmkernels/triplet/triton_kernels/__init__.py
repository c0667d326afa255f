"""The triplet loss in Triton, on the tiles and strips of mmkernels._tiles.

The positives come first, from the tiles on the diagonal. Then, with G = 2 N M D FLOP:

"all" takes 1 G without a gradient: every tile adds its hinges to sums of rows and columns. It takes 3 G with one: for a
strip of queries the gradient of the similarities, one number for each hinge above 0, is stored in the dtype of the
features (exactly, if the rows have no weights of their own); dQ of the strip is a plain product dS K, and dS^T Q is
added to dK. The positives' part depends on every hinge, and is added last.

"hardest" and "semi_hard" take 1 G, which finds the worst negative of every row and column. The gradient of the
similarities then has at most three entries per row: dQ and dK are sparse products, O(N D).

Memory beyond inputs and outputs, in bytes, e = bytes of an element:
    all, loss        16 min(32, N / tile) N
    all, gradients   8 (min(64, M / tile) + strip / tile) N; one strip and partial products, as info_nce's
    worst, loss      16 min(32, N / tile) N
    worst, gradients 100 N
    and a padded copy of the features where D or the row stride is no multiple of 16 or the address none of 16 bytes.

No atomics: results are the same bits from run to run.
"""

import torch
from torch import Tensor

from mmkernels._tiles.configs import choose, choose_tile
from mmkernels._tiles.launch import MERGE_BLOCK, MERGE_STEP, aligned, launcher, walk_over
from mmkernels._tiles.products import MERGE_FEATURES, MERGE_ROWS, fp16_unit, gradients_of_both
from mmkernels._tiles.triton import cdiv, on_device
from mmkernels.triplet.triton_kernels.kernels import (
    finish_gradients_kernel,
    finish_worst_kernel,
    hinges_kernel,
    positives_kernel,
    sparse_product_kernel,
    worst_kernel,
)

_MAX_SPLITS = 64  # partial results of a row, where the rows of a launch are those of one strip


def triplet_forward(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    margin: float,
    mining: str,
    symmetric: bool,
) -> tuple[Tensor, Tensor]:
    """The losses [N], and where the worst negatives are, [2, N] ([1, N] unless symmetric; no columns for "all")."""
    N, M, directions = queries.shape[0], keys.shape[0], 2 if symmetric else 1
    tile, precision = choose_tile("triplet", queries)
    queries, keys = aligned(queries), aligned(keys)
    walk = walk_over(N, M, tile)
    groups, splits = walk.groups, walk.splits
    strides = (queries.shape[1], queries.stride(0), keys.stride(0))
    with on_device(queries.device):
        positives = _positives(queries, keys)
        if mining == "all":
            rows = positives.new_empty(2, splits, N)
            columns = positives.new_empty(2, groups, N) if symmetric else rows
            launcher(hinges_kernel, tile, SYMMETRIC=symmetric, GRADIENT=False, PRECISION=precision)(
                (groups * splits,),
                queries, keys, positives, positives, positives, rows, columns,
                0, N, M, N, M, *strides, *walk, groups, float(margin),
            )  # fmt: skip
            return _losses(rows, columns, symmetric), positives.new_empty(directions, 0, dtype=torch.int32)
        row_best, row_index = positives.new_empty(splits, N), positives.new_empty(splits, N, dtype=torch.int32)
        col_best, col_index = row_best, row_index
        if symmetric:
            col_best, col_index = positives.new_empty(groups, N), positives.new_empty(groups, N, dtype=torch.int32)
        launcher(worst_kernel, tile, SYMMETRIC=symmetric, SEMI_HARD=mining == "semi_hard", PRECISION=precision)(
            (groups * splits,),
            queries, keys, positives, row_best, row_index, col_best, col_index, N, M, *strides, *walk, float(margin),
        )  # fmt: skip
        losses, worst = positives.new_empty(N), positives.new_empty(directions, N, dtype=torch.int32)
        launcher(finish_worst_kernel, SYMMETRIC=symmetric, SEMI_HARD=mining == "semi_hard", BLOCK=MERGE_BLOCK)(
            (cdiv(N, MERGE_BLOCK),),
            row_best, row_index, col_best, col_index, positives, losses, worst, N, M, groups, splits, float(margin),
        )  # fmt: skip
    return losses, worst


def triplet_hinge_gradients(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    weights: Tensor | None,  # [N]
    margin: float,
    symmetric: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The losses over all negatives [N] and the gradients of their weighted sum, in float32; empty where masked."""
    N, M, num_features = queries.shape[0], keys.shape[0], queries.shape[1]
    config, precision = choose(queries)
    dtype = queries.dtype
    queries, keys = aligned(queries), aligned(keys)
    with on_device(queries.device):
        positives = _positives(queries, keys)
        one = positives.new_ones(())
        factor = one * 0.5 if symmetric else one
        if weights is None:
            weights = torch.ones_like(positives)
        else:
            weights = weights.float().contiguous()
            if dtype == torch.float16:
                unit = fp16_unit(weights.abs().amax())  # |dS| <= 2 of the largest weight
                weights, factor = weights / unit, factor * unit
        grad_queries = positives.new_empty((N, num_features) if output_mask[0] else 0)
        grad_keys = positives.new_empty((M, num_features) if output_mask[1] else 0)
        strips = _Strips(queries, keys, positives, weights, margin, symmetric)
        of_both = (grad_queries if output_mask[0] else None, grad_keys if output_mask[1] else None)
        gradients_of_both(
            strips.fill, queries, keys, strips.tile, config.product, precision, one, *of_both, of_rows=True
        )
        rows, columns = strips.rows, strips.columns
        counts = rows[1].sum(0) + columns[1].sum(0) if symmetric else rows[1].sum(0)
        of_positives = weights * counts
        for grad, x in ((grad_queries, keys), (grad_keys, queries)):
            if grad.numel() == 0:
                continue
            launcher(finish_gradients_kernel, BLOCK_M=MERGE_ROWS, BLOCK_N=MERGE_FEATURES)(
                (cdiv(len(grad), MERGE_ROWS) * cdiv(num_features, MERGE_FEATURES),),
                grad, x, of_positives, factor, len(grad), N, num_features, x.stride(0),
            )  # fmt: skip
    return _losses(rows, columns, symmetric), grad_queries, grad_keys


class _Strips:
    """The gradient of the similarities, strip by strip, and all that is summed up on the way."""

    def __init__(
        self,
        queries: Tensor,  # [N, D]
        keys: Tensor,  # [M, D]
        positives: Tensor,  # [N]
        weights: Tensor,  # [N]
        margin: float,
        symmetric: bool,
    ) -> None:
        self.queries, self.keys, self.positives, self.weights = queries, keys, positives, weights
        self.margin, self.symmetric = float(margin), symmetric
        self.tile, self.precision = choose_tile("triplet", queries)
        # The sums of the hinges, and the counts of those above 0; allocated with the first strip.
        self.rows = self.columns = positives

    def fill(self, strip: Tensor, first_row: int, _: int) -> None:
        """Rows first_row and following of the gradient into the strip; see gradients_of_both."""
        tile = self.tile
        queries, keys, (height, width) = self.queries, self.keys, strip.shape
        groups, tiles = height // tile.block_m, width // tile.block_n
        tiles_per_split = cdiv(tiles, _MAX_SPLITS)
        splits = cdiv(tiles, tiles_per_split)
        if first_row == 0:
            self.rows = self.columns = self.positives.new_empty(2, splits, len(queries))
            if self.symmetric:
                self.columns = self.positives.new_empty(2, groups, len(queries))
        launcher(hinges_kernel, tile, SYMMETRIC=self.symmetric, GRADIENT=True, PRECISION=self.precision)(
            (groups * splits,),
            queries, keys, self.positives, self.weights, strip, self.rows, self.columns,
            first_row, height, width, len(queries), len(keys), queries.shape[1], queries.stride(0), keys.stride(0),
            1, tiles_per_split, groups, splits, self.columns.shape[1], self.margin,
        )  # fmt: skip


def triplet_worst_gradients(
    grad_losses: Tensor,  # [N]
    losses: Tensor,  # [N]
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    worst: Tensor,  # [2, N] or [1, N]
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """The gradients of queries and keys; an empty tensor for each false entry of output_mask."""
    N, M, directions = queries.shape[0], keys.shape[0], worst.shape[0]
    # 0 times a loss carries its NaN to the gradients.
    weights = grad_losses.float() / directions + 0.0 * losses
    own = torch.arange(N, device=worst.device, dtype=torch.int32)
    counts = worst >= 0  # [directions, N]
    # d loss / d similarities by its entries: (i, worst key of i), (worst query of i, i) and (i, i).
    rows, columns = torch.cat([own, own]), torch.cat([worst[0], own])
    values = torch.cat([weights, -weights * counts.sum(0)])
    there = torch.cat([counts[0], counts.any(0)])
    if directions == 2:
        rows, columns = torch.cat([rows, worst[1]]), torch.cat([columns, own])
        values, there = torch.cat([values, weights]), torch.cat([there, counts[1]])
    grad_queries, grad_keys = queries.new_empty(0), keys.new_empty(0)
    with on_device(queries.device):
        if output_mask[0]:
            grad_queries = _sparse_product(rows, columns, values, there, N, keys)
        if output_mask[1]:
            grad_keys = _sparse_product(columns, rows, values, there, M, queries)
    return grad_queries, grad_keys


def _sparse_product(
    rows: Tensor, columns: Tensor, values: Tensor, there: Tensor, num_rows: int, x: Tensor
) -> Tensor:  # [num_rows, D]
    """The product of a sparse matrix with x, from the entries that are there; a row's entries add in their order."""
    if x.stride(1) != 1:
        x = x.contiguous()
    rows, order = torch.where(there, rows, num_rows).sort(stable=True)
    starts = torch.searchsorted(rows, torch.arange(num_rows + 1, device=x.device, dtype=rows.dtype), out_int32=True)
    num_features = x.shape[1]
    out = x.new_empty(num_rows, num_features)
    launcher(sparse_product_kernel, BLOCK=MERGE_FEATURES, STEP=MERGE_STEP)(
        (num_rows * cdiv(num_features, MERGE_FEATURES),),
        starts, columns[order], values[order], x, out, num_features, x.stride(0),
    )  # fmt: skip
    return out


def _positives(queries: Tensor, keys: Tensor) -> Tensor:
    tile, precision = choose_tile("triplet", queries)
    positives = queries.new_empty(len(queries), dtype=torch.float32)
    launcher(positives_kernel, tile, PRECISION=precision)(
        (cdiv(len(queries), tile.block_m),),
        queries, keys, positives, len(queries), len(keys), queries.shape[1], queries.stride(0), keys.stride(0),
    )  # fmt: skip
    return positives


def _losses(rows: Tensor, columns: Tensor, symmetric: bool) -> Tensor:
    """The losses [N] from the partial sums of the hinges."""
    return (rows[0].sum(0) + columns[0].sum(0)) / 2 if symmetric else rows[0].sum(0)
