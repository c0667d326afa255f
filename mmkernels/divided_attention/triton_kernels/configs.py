"""Which tiles each GPU, dtype and head size takes: a table, every line of which the compile check covers."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._tiles import overrides
from mmkernels._tiles.triton import NEWER_TRITON, OLDER_TRITON, Tile, family_of, round_up


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
# A tile is spread over more warps with a mask, or with dropout, whose generator takes registers.
_HALF_MASKED = {
    32: Config(
        _square(64, 32, 8), _square(64, 32, 8), Tile(64, 32, 32, 8, 3), Tile(64, 64, 32, 8, 2), Tile(64, 32, 32, 8, 2)
    ),
    64: Config(
        _square(64, 64, 8), _square(64, 64, 8), Tile(64, 32, 64, 8, 3), Tile(64, 64, 64, 8, 2), Tile(64, 32, 64, 8, 2)
    ),
    128: _HALF[128],
    256: _HALF[256],
}  # fmt: skip
# float32 has no matrix units on NVIDIA's chips: small tiles.
_SINGLE = {
    32: Config(
        _square(32, 32, 4), _square(32, 32, 4), Tile(32, 32, 32, 4, 2), Tile(32, 32, 32, 4, 2), Tile(32, 32, 32, 4, 2)
    ),
    64: Config(
        _square(32, 64, 4), _square(32, 64, 4), Tile(32, 32, 64, 4, 1), Tile(32, 32, 64, 4, 2), Tile(32, 16, 64, 4, 2)
    ),
    128: Config(*[_square(16, 128, 8)] * 5)._replace(forward=Tile(32, 16, 128, 8, 1)),
    256: Config(*[_square(16, 256, 8)] * 5),
}  # fmt: skip
# Small, so that few rows reach every edge.
_INTERPRETED = {
    head: Config(*[_square(16, head, 4)] * 2, *[Tile(32, 32, head, 4, 1)] * 3) for head in HEADS
}  # fmt: skip


def _table(
    half: dict[int, Config], half_masked: dict[int, Config], single: dict[int, Config], single_masked: dict[int, Config]
) -> dict[tuple[str, bool], dict[int, Config]]:
    return {
        ("half", False): half,
        ("half", True): half_masked,
        ("ieee", False): single,
        ("ieee", True): single_masked,
    }


# With a global class token steps of 64 keys would spill.
_SM_80_HALF = _HALF | {64: _HALF[64]._replace(grad_queries=Tile(64, 32, 64, 4, 2))}
_SINGLE_MASKED = _spread(_SINGLE, 8)
_SINGLE_MASKED[32] = _SINGLE_MASKED[32]._replace(grad_queries=Tile(32, 16, 32, 8, 2))
_SINGLE_MASKED[64] = _SINGLE_MASKED[64]._replace(forward=Tile(32, 16, 64, 8, 2), grad_queries=Tile(32, 16, 64, 8, 2))
_SINGLE_MASKED[128] = Config(*[_square(16, 128, 8)] * 5)._replace(grad_keys=Tile(32, 16, 128, 8, 1))
# Over eight warps its scores would spill, for ptxas aims at two blocks of 128 registers on a multiprocessor.
_SM_90_MASKED = _HALF_MASKED | {256: _HALF[256]._replace(packed_forward=_square(32, 256, 4))}
_SM_100_MASKED = _HALF_MASKED | {
    32: _HALF_MASKED[32]._replace(forward=Tile(64, 32, 32, 4, 3)),
    128: _HALF[128]._replace(grad_queries=Tile(64, 32, 128, 4, 2), grad_keys=Tile(64, 32, 128, 4, 2)),
}
_SM_100_SINGLE_MASKED = _SINGLE_MASKED | {32: _SINGLE_MASKED[32]._replace(forward=Tile(32, 16, 32, 8, 2))}
# Four warps of 64 lanes may take 512 registers each.
_GFX942_MASKED = _spread(_HALF, 4)
_GFX942_MASKED[64] = _GFX942_MASKED[64]._replace(packed_forward=_square(32, 64, 4), packed_backward=_square(32, 64, 4))
_GFX942_MASKED[128] = _GFX942_MASKED[128]._replace(grad_keys=Tile(64, 32, 128, 4, 1))
_GFX942_MASKED[256] = _GFX942_MASKED[256]._replace(grad_keys=Tile(32, 16, 256, 4, 1))

# The compile check chose these: the largest tiles without a spill, except that float32 spills a few registers in heads
# of more than 128. The inner keys are the precision ("half" is bf16 and fp16) and whether there is a mask or dropout.
CONFIGS: dict[str, dict[tuple[str, bool], dict[int, Config]]] = {
    "sm_80": _table(_SM_80_HALF, _HALF_MASKED, _SINGLE, _SINGLE_MASKED),
    "sm_90": _table(_HALF, _SM_90_MASKED, _SINGLE, _SINGLE_MASKED),
    "sm_100": _table(_HALF, _SM_100_MASKED, _SINGLE, _SM_100_SINGLE_MASKED),
    "gfx942": _table(_spread(_HALF, 4), _GFX942_MASKED, _spread(_SINGLE, 4), _spread(_SINGLE, 4)),
    "interpreter": _table(*[_INTERPRETED] * 4),
}
if OLDER_TRITON:  # under which these would spill
    for _gpu in ("sm_80", "sm_90"):
        for _masked in (False, True):
            _tiles = CONFIGS[_gpu]["half", _masked]
            _wide = _tiles[256]._replace(forward=Tile(32, 32, 256, 8, 1))
            CONFIGS[_gpu]["half", _masked] = _tiles | {256: _wide}
    CONFIGS["sm_80"]["half", False][64] = _HALF[64]._replace(
        grad_queries=Tile(64, 32, 64, 8, 2), grad_keys=Tile(64, 32, 64, 8, 2)
    )
    CONFIGS["gfx942"]["half", False][256] = CONFIGS["gfx942"]["half", True][256]
    _masked_64 = CONFIGS["gfx942"]["half", True][64]
    CONFIGS["gfx942"]["half", True][64] = _masked_64._replace(grad_queries=Tile(64, 32, 64, 4, 2))


# Of sequences that stay in shared memory whole: block_m rows of one side meet the other in pieces of at most block_n,
# the largest for which no form spills on an H100. A form of a global class token would on an A100; on a B200 a program
# takes all of the tensor memory; an MI300X has no room for the keys. Both kernels of the backward pass have one tile.
WHOLE: dict[str, dict[str, dict[int, Tile]]] = {
    "whole_forward": {
        "sm_90": {head: Tile(64, 64, head, 4, 1) for head in (32, 64)},
        "interpreter": {head: Tile(32, 32, head, 4, 1) for head in HEADS},
    },
    "whole_backward": {
        "sm_90": {64: Tile(64, 64, 64, 4, 1)},
        "interpreter": {head: Tile(32, 32, head, 4, 1) for head in HEADS},
    },
}
if OLDER_TRITON or NEWER_TRITON:  # under which the kernel of the queries would spill
    del WHOLE["whole_backward"]["sm_90"]
MOST_KEYS = 208


def choose_whole(kernel: str, qkv: Tensor, head_size: int, items: int, scale: float) -> dict[str, int] | None:
    """The launch options of the kernels that hold one side of a sequence whole; None where it is streamed. `kernel` is
    of WHOLE."""
    family = family_of(qkv.device)
    tiles = WHOLE[kernel].get(family, {})
    head = next(head for head in HEADS if head >= head_size)
    if qkv.dtype == torch.float32 or head not in tiles or items > MOST_KEYS or scale < 0:
        return None
    name = overrides.of_head(kernel, head, False)
    tile = overrides.tile_in_use(tiles[head], "divided_attention", name, "half", family, qkv.device)
    return whole_options(tile, items)


def whole_options(tile: Tile, items: int) -> dict[str, int]:
    options = launch_options(tile) | {"KEYS": round_up(items, 16), "PIECE": tile.block_n}
    del options["BLOCK_N"]
    return options


def choose(qkv: Tensor, head_size: int, masked: bool) -> Config:
    """The tiles for the device, dtype and head size.

    float32 is multiplied as IEEE asks even where TF32 is allowed: short sequences are bound by memory, and three TF32
    products of whole heads do not fit the registers.
    """
    precision = "ieee" if qkv.dtype == torch.float32 else "half"
    head = next(head for head in HEADS if head >= head_size)
    family = family_of(qkv.device)
    return in_use(CONFIGS[family][precision, masked][head], precision, masked, family, qkv.device)


def in_use(config: Config, precision: str, masked: bool, family: str, device: torch.device) -> Config:
    """The tiles of a line of the table, or what replaces them."""

    def tile_in_use(kernel: str, tile: Tile) -> Tile:
        name = overrides.of_head(kernel, tile.block_k, masked)
        return overrides.tile_in_use(tile, "divided_attention", name, precision, family, device)

    if not overrides.has_rows(device, family):
        return config
    return Config(*(tile_in_use(kernel, tile) for kernel, tile in config._asdict().items()))


def launch_options(tile: Tile) -> dict[str, int]:
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }
