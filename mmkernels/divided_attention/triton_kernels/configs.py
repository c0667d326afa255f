"""Which tiles each GPU, dtype and head size takes: a table, every line of which the compile check covers."""

from typing import NamedTuple

from torch import Tensor

from mmkernels._triton import Tile, family_of, input_precision, precision_of


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


_HALF = {
    32: Config(
        _square(64, 32, 4), _square(64, 32, 4), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3), Tile(64, 64, 32, 4, 3)
    ),
    64: Config(
        _square(64, 64, 4), _square(64, 64, 4), Tile(64, 64, 64, 4, 3), Tile(64, 64, 64, 4, 2), Tile(64, 64, 64, 4, 2)
    ),
    128: Config(
        _square(64, 128, 4),
        _square(64, 128, 8),
        Tile(64, 64, 128, 4, 2),
        Tile(64, 64, 128, 8, 2),
        Tile(64, 64, 128, 8, 2),
    ),
    256: Config(
        _square(64, 256, 8),
        _square(64, 256, 8),
        Tile(64, 32, 256, 8, 1),
        Tile(64, 32, 256, 8, 1),
        Tile(64, 32, 256, 8, 1),
    ),
}
_SINGLE = {
    32: Config(
        _square(32, 32, 4), _square(32, 32, 4), Tile(32, 32, 32, 4, 2), Tile(32, 32, 32, 4, 2), Tile(32, 32, 32, 4, 2)
    ),
    64: Config(
        _square(32, 64, 4), _square(32, 64, 4), Tile(32, 32, 64, 4, 2), Tile(32, 32, 64, 4, 2), Tile(32, 32, 64, 4, 2)
    ),
    128: Config(
        _square(32, 128, 4),
        _square(32, 128, 8),
        Tile(32, 32, 128, 4, 1),
        Tile(32, 32, 128, 8, 1),
        Tile(32, 32, 128, 8, 1),
    ),
    256: Config(
        _square(16, 256, 4),
        _square(16, 256, 8),
        Tile(16, 16, 256, 4, 1),
        Tile(16, 16, 256, 8, 1),
        Tile(16, 16, 256, 8, 1),
    ),
}
# Small, so that few rows reach every edge.
_INTERPRETED = {head: Config(*[_square(16, head, 4)] * 2, *[Tile(32, 32, head, 4, 1)] * 3) for head in HEADS}

# Chosen from the compile check: the largest tiles without a spill. By precision: "half" is bf16 and fp16.
CONFIGS: dict[str, dict[str, dict[int, Config]]] = {
    "sm_80": {"half": _HALF, "tf32x3": _SINGLE, "ieee": _SINGLE},
    "sm_90": {"half": _HALF, "tf32x3": _SINGLE, "ieee": _SINGLE},
    "sm_100": {"half": _HALF, "tf32x3": _SINGLE, "ieee": _SINGLE},
    "gfx942": {"half": _HALF, "ieee": _SINGLE},
    "interpreter": {"half": _INTERPRETED, "ieee": _INTERPRETED},
}


def choose(qkv: Tensor, head_size: int) -> tuple[Config, str]:
    """The tiles for the device, dtype and head size, and how float32 is multiplied."""
    family = family_of(qkv.device)
    precision = precision_of(qkv.dtype, family)
    head = next(head for head in HEADS if head >= head_size)
    return CONFIGS[family][precision][head], input_precision(precision)
