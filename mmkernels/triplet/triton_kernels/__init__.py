"""The triplet loss in Triton, on the tiles and strips of mmkernels._tiles.

The positives come first, from the tiles on the diagonal. Then, with G = 2 N M D FLOP:

"all" takes 1 G without a gradient: every tile adds its hinges to sums of rows and columns. It takes 3 G with one: for a
strip of queries the gradient of the similarities, one number for each hinge above 0, is stored in the dtype of the
features (exactly, if the rows have no weights of their own); dQ of the strip is a plain product dS K, and dS^T Q is
added to dK. The positives' part depends on every hinge, and is added last.

"hardest" and "semi_hard" take 1 G, which finds the worst negative of every row and column. The gradient of the
similarities then has at most three entries per row: dQ and dK are sparse products, O(N D).

Memory beyond inputs and outputs, in bytes, e = bytes of an element:
    all, loss        8 min(32, N / tile) N, and 4 MiB at most
    all, gradients   16 min(32, N / tile) N; one strip and partial products, as info_nce's
    worst, loss      16 min(32, N / tile) N
    worst, gradients 100 N
    and a padded copy of the features where D or the row stride is no multiple of 16 or the address none of 16 bytes.

No atomics: results are the same bits from run to run.
"""

import torch
from torch import Tensor

from mmkernels._tiles.configs import choose, choose_tile
from mmkernels._tiles.launch import MERGE_BLOCK, MERGE_STEP, Walk, aligned, launcher, walk_down_columns
from mmkernels._tiles.products import MERGE_FEATURES, MERGE_ROWS, fp16_unit, gradients_of_both
from mmkernels._tiles.triton import Tile, cdiv, on_device, round_up
from mmkernels.triplet.triton_kernels.kernels import (
    PADDING,
    finish_gradients_kernel,
    finish_hinges_kernel,
    finish_worst_kernel,
    hinges_kernel,
    positives_kernel,
    sparse_product_kernel,
    worst_kernel,
)


def gradient_tile(tile: Tile, is_float16: bool) -> Tile:
    """The tile of hinges with gradients: in float16 they spill in tiles of 128 x 128 on sm_90."""
    return tile._replace(block_n=64) if is_float16 and tile.block_n > 64 else tile


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
    strides = (queries.shape[1], queries.stride(0), keys.stride(0))
    with on_device(queries.device):
        positives, peaks = _positives(queries, keys, tile, precision)
        if mining == "all":
            hinges = _Hinges(queries, keys, positives, peaks, tile, precision, None, margin, symmetric)
            hinges.add(None, 0, N, M)
            return hinges.finish()[0], queries.new_empty(directions, 0, dtype=torch.int32)
        walk = walk_down_columns(N, M, tile, queries.device)
        groups, splits = walk.groups, walk.splits
        row_best, row_index = positives.new_empty(splits, N), positives.new_empty(splits, N, dtype=torch.int32)
        col_best, col_index = row_best, row_index
        if symmetric:
            col_best, col_index = positives.new_empty(groups, N), positives.new_empty(groups, N, dtype=torch.int32)
        of_parts = groups * splits * 2 * (tile.block_m // 16) * tile.block_n if symmetric else 0
        parts = positives.new_empty(of_parts, dtype=torch.int32)
        launcher(worst_kernel, tile, SYMMETRIC=symmetric, SEMI_HARD=mining == "semi_hard", PRECISION=precision)(
            (groups * splits,),
            queries, keys, positives, peaks, row_best, row_index, col_best, col_index, parts,
            N, M, *strides, *walk, float(margin),
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
    config, dtype = choose(queries)[0], queries.dtype
    tile, precision = choose_tile("triplet", queries)
    tile = gradient_tile(tile, dtype == torch.float16)
    queries, keys = aligned(queries), aligned(keys)
    with on_device(queries.device):
        positives, peaks = _positives(queries, keys, tile, precision)
        one = positives.new_ones(())
        factor = one * 0.5 if symmetric else one
        if weights is not None:
            given = weights.float()
            if dtype == torch.float16:
                unit = fp16_unit(given.abs().amax())  # |dS| <= 2 of the largest weight
                given, factor = given / unit, factor * unit
            weights = torch.zeros_like(positives)
            weights[:N] = given
        grad_queries = positives.new_empty((N, num_features) if output_mask[0] else 0)
        grad_keys = positives.new_empty((M, num_features) if output_mask[1] else 0)
        hinges = _Hinges(queries, keys, positives, peaks, tile, precision, weights, margin, symmetric, gradient=True)
        of_both = (grad_queries if output_mask[0] else None, grad_keys if output_mask[1] else None)
        gradients_of_both(
            hinges.fill, queries, keys, hinges.tile, config.product, precision, one, *of_both, of_rows=True
        )
        losses, of_positives = hinges.finish()
        for grad, x in ((grad_queries, keys), (grad_keys, queries)):
            if grad.numel() == 0:
                continue
            launcher(finish_gradients_kernel, BLOCK_M=MERGE_ROWS, BLOCK_N=MERGE_FEATURES)(
                (cdiv(len(grad), MERGE_ROWS) * cdiv(num_features, MERGE_FEATURES),),
                grad, x, of_positives, factor, len(grad), N, num_features, x.stride(0),
            )  # fmt: skip
    return losses, grad_queries, grad_keys


class _Hinges:
    """The sums of the hinges, all rows at once or strip by strip with the gradient of the similarities."""

    def __init__(
        self,
        queries: Tensor,  # [N, D]
        keys: Tensor,  # [M, D]
        positives: Tensor,  # [M rounded up]
        peaks: Tensor,  # [2, blocks]
        tile: Tile,
        precision: str,
        weights: Tensor | None,  # [M rounded up]
        margin: float,
        symmetric: bool,
        gradient: bool = False,
    ) -> None:
        self.queries, self.keys, self.positives, self.peaks, self.weights = queries, keys, positives, peaks, weights
        self.tile, self.precision, self.margin = tile, precision, float(margin)
        self.flags = {"SYMMETRIC": symmetric, "GRADIENT": gradient, "WEIGHTED": weights is not None}
        # Allocated for the first rows, whose walk the others share: sums, counts, and what is between two sums.
        self.walk = Walk(0, 0, 0, 0)
        self.rows = self.columns = self.parts = positives

    def fill(self, strip: Tensor, first_row: int, _: int) -> None:
        """Rows first_row and following of the gradient into the strip; see gradients_of_both."""
        self.add(strip, first_row, *strip.shape)

    def add(self, strip: Tensor | None, first_row: int, height: int, width: int) -> None:
        """The hinges of so many rows and columns."""
        queries, keys, positives, tile, flags = self.queries, self.keys, self.positives, self.tile, self.flags
        if first_row == 0:
            self.walk = walk = walk_down_columns(height, width, tile, queries.device)
            planes = 2 if flags["GRADIENT"] else 1
            self.rows = self.columns = positives.new_empty(planes, walk.splits, len(queries))
            if flags["SYMMETRIC"]:
                self.columns = positives.new_empty(planes, walk.groups, len(queries))
                of_parts = walk.groups * walk.splits * planes * (tile.block_m // 16) * tile.block_n
                self.parts = positives.new_empty(of_parts)
        walk = self.walk
        groups = cdiv(height, tile.block_m * walk.tiles_per_group)
        launcher(hinges_kernel, tile, PRECISION=self.precision, **flags)(
            (groups * walk.splits,),
            queries, keys, positives, self.peaks, positives if self.weights is None else self.weights,
            queries if strip is None else strip, self.rows, self.columns, self.parts,
            first_row, height, width, len(queries), len(keys), queries.shape[1], queries.stride(0), keys.stride(0),
            walk.tiles_per_group, walk.tiles_per_split, groups, walk.splits, walk.groups, self.margin,
        )  # fmt: skip

    def finish(self) -> tuple[Tensor, Tensor]:
        """The losses [N] and, with the gradient, the weight of each row times its hinges above 0 [N]."""
        N, positives = len(self.queries), self.positives
        losses = positives.new_empty(N)
        of_positives = positives.new_empty(N) if self.flags["GRADIENT"] else losses
        launcher(finish_hinges_kernel, BLOCK=MERGE_BLOCK, **self.flags)(
            (cdiv(N, MERGE_BLOCK),),
            self.rows, self.columns, positives if self.weights is None else self.weights, losses, of_positives,
            N, self.walk.splits, self.walk.groups,
        )  # fmt: skip
        return losses, of_positives


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


def _positives(queries: Tensor, keys: Tensor, tile: Tile, precision: str) -> tuple[Tensor, Tensor]:
    """The positives, infinity where a key has none, and the largest numbers of all blocks of rows, for the kernels."""
    rows = round_up(len(keys), PADDING.value)
    blocks = rows // tile.block_m
    positives = queries.new_empty(rows, dtype=torch.float32)
    peaks = queries.new_empty(2, blocks, dtype=torch.int32)
    launcher(positives_kernel, tile, PRECISION=precision)(
        (blocks,),
        queries, keys, positives, peaks, len(queries), len(keys), queries.shape[1], queries.stride(0), keys.stride(0),
    )  # fmt: skip
    return positives, peaks
