"""Which tiles each GPU, dtype and head size takes: a table, every line of which the compile check covers."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._triton import Tile, family_of


class Config(NamedTuple):
    """The tiles of the kernels with dot products. block_k is the padded size of a head.

    block_m counts the rows that a program owns, block_n those of a step over the other side. A packed tile is square.
    """

    packed_forward: Tile
    packed_backward: Tile
    forward: Tile
    grad_queries: Tile
    grad_keys: Tile


HEADS = (32, 64, 128, 256)  # sizes that heads are padded to


def _square(block: int, head: int, num_warps: int) -> Tile:
    return Tile(block, block, head, num_warps, 1)


def _spread(table: dict[int, Config], num_warps: int) -> dict[int, Config]:
    """The same tiles over so many warps."""
    return {head: Config(*(tile._replace(num_warps=num_warps) for tile in tiles)) for head, tiles in table.items()}


_HALF = {
    32: Config(
        _square(64, 32, 4), _square(64, 32, 4), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 2), Tile(64, 32, 32, 4, 2)
    ),
    64: Config(
        _square(64, 64, 4), _square(64, 64, 4), Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 4, 2), Tile(64, 32, 64, 4, 2)
    ),
    128: Config(
        _square(64, 128, 8), _square(64, 128, 8), Tile(64, 64, 128, 8, 2), Tile(64, 32, 128, 8, 2),
        Tile(64, 32, 128, 8, 2),
    ),
    256: Config(
        _square(32, 256, 8), _square(32, 256, 8), Tile(64, 32, 256, 8, 1), Tile(32, 32, 256, 8, 1),
        Tile(32, 32, 256, 8, 1),
    ),
}  # fmt: skip
# Without matrix units for it, float32 takes small tiles.
_SINGLE = {
    32: Config(
        _square(32, 32, 4), _square(32, 32, 4), Tile(64, 32, 32, 4, 2), Tile(64, 32, 32, 4, 2), Tile(64, 32, 32, 4, 2)
    ),
    64: Config(
        _square(32, 64, 4), _square(32, 64, 4), Tile(64, 32, 64, 4, 2), Tile(32, 32, 64, 4, 2), Tile(32, 32, 64, 4, 2)
    ),
    128: Config(
        _square(32, 128, 8), _square(32, 128, 8), Tile(32, 32, 128, 8, 1), Tile(32, 32, 128, 8, 1),
        Tile(32, 32, 128, 8, 1),
    ),
    256: Config(
        _square(16, 256, 8), _square(16, 256, 8), Tile(16, 16, 256, 8, 1), Tile(16, 16, 256, 8, 1),
        Tile(16, 16, 256, 8, 1),
    ),
}  # fmt: skip
# Small, so that few rows reach every edge.
_INTERPRETED = {
    head: Config(*[_square(16, head, 4)] * 2, *[Tile(32, 32, head, 4, 1)] * 3) for head in HEADS
}  # fmt: skip
_NVIDIA = {
    ("half", False): _HALF,
    ("half", True): _spread(_HALF, 8),
    ("ieee", False): _SINGLE,
    ("ieee", True): _spread(_SINGLE, 8),
}

# Chosen from the compile check: large tiles without a spill. By precision ("half" is bf16 and fp16) and whether there
# is a mask or dropout, which take registers.
CONFIGS: dict[str, dict[tuple[str, bool], dict[int, Config]]] = {
    "sm_80": _NVIDIA,
    "sm_90": _NVIDIA,
    "sm_100": _NVIDIA,
    # Four warps of 64 lanes may take 512 registers each.
    "gfx942": {
        (precision, masked): _spread(table, 4)
        for precision, table in (("half", _HALF), ("ieee", _SINGLE))
        for masked in (False, True)
    },
    "interpreter": {(precision, masked): _INTERPRETED for precision in ("half", "ieee") for masked in (False, True)},
}


def choose(qkv: Tensor, head_size: int, masked: bool) -> Config:
    """The tiles for the device, dtype and head size.

    float32 is multiplied as IEEE asks even where TF32 is allowed: short sequences are bound by memory, and three TF32
    products of whole heads do not fit the registers.
    """
    precision = "ieee" if qkv.dtype == torch.float32 else "half"
    head = next(head for head in HEADS if head >= head_size)
    return CONFIGS[family_of(qkv.device)][precision, masked][head]


def launch_options(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
