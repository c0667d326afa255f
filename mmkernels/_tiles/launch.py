"""How the kernels over pairs are launched: the features as they read them, their options, and the blocks they walk."""

import functools
from typing import NamedTuple

import triton
from torch import Tensor

from mmkernels._tiles.triton import Tile, round_up

# The compiler must round scale * q.k before a maximum is subtracted from it. Fused into one operation, the largest
# logit minus itself would not be zero, and a loss near zero at a large scale would be noise. Dots stay fused.
NO_FUSION = {"enable_fp_fusion": False}
MERGE_STEP = 16  # depth of a step of the kernels without a dot product
MERGE_BLOCK = 128  # entries that one of their programs takes
MAX_PARTIALS = 32  # partial results of a row or a column


@functools.cache
def launch_options(tile: Tile) -> dict[str, int]:
    """What every kernel of a tile is launched with. The dictionary is shared: nobody may change it."""
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **NO_FUSION,
    }


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


class Walk(NamedTuple):
    """Which tiles of the logits a program owns: those of a group of rows and a split of the columns."""

    tiles_per_group: int
    tiles_per_split: int
    groups: int
    splits: int


def walk_over(num_rows: int, num_cols: int, tile: Tile) -> Walk:
    """Blocks as small as MAX_PARTIALS partial results of each row and each column allow."""
    row_tiles, col_tiles = triton.cdiv(num_rows, tile.block_m), triton.cdiv(num_cols, tile.block_n)
    tiles_per_group, tiles_per_split = triton.cdiv(row_tiles, MAX_PARTIALS), triton.cdiv(col_tiles, MAX_PARTIALS)
    return Walk(
        tiles_per_group,
        tiles_per_split,
        triton.cdiv(row_tiles, tiles_per_group),
        triton.cdiv(col_tiles, tiles_per_split),
    )
