"""Which tiles each GPU and dtype takes: tables whose every line the compile check covers."""

from typing import NamedTuple

import torch
from torch import Tensor

from mmkernels._tiles import overrides
from mmkernels._tiles.triton import NEWER_TRITON, OLDER_TRITON, Tile, family_of


class Config(NamedTuple):
    """The tiles of the three kernels with a dot product."""

    forward: Tile
    grad_logits: Tile
    product: Tile
    # Tiles for groups, and grad_logits' for label smoothing, where the plain tile would spill.
    heavier_grad_logits: Tile | None = None
    grouped_forward: Tile | None = None
    # The tile for both directions without groups, which holds the columns' sums beside the products.
    symmetric_forward: Tile | None = None

    def of_forward(self, groups: bool, symmetric: bool) -> Tile:
        if groups:
            return self.grouped_forward or self.forward
        return (self.symmetric_forward if symmetric else None) or self.forward

    def of_grad_logits(self, groups: bool, smoothed: bool) -> Tile:
        return (self.heavier_grad_logits if groups or smoothed else None) or self.grad_logits


# The largest tiles tried that spill under neither Triton 3.8 nor 3.9; those for older ones follow below. The inner key
# "half" stands for bf16 and fp16.
CONFIGS: dict[str, dict[str, Config]] = {
    # Shared memory stays below 99 KB: chips of compute capability 8.6, 8.9 and 12.0 have no more.
    "sm_80": {
        "half": Config(
            Tile(128, 128, 32, 8, 4),
            Tile(128, 128, 32, 8, 4),
            Tile(128, 256, 32, 8, 4),
            Tile(64, 128, 32, 8, 4),
            symmetric_forward=Tile(128, 64, 32, 8, 4),
        ),
        "tf32x3": Config(Tile(128, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3)),
        "ieee": Config(
            Tile(64, 64, 16, 8, 2),
            Tile(64, 64, 16, 4, 2),
            Tile(64, 64, 32, 8, 2),
            grouped_forward=Tile(64, 64, 16, 8, 1),
        ),
    },
    "sm_90": {
        "half": Config(
            Tile(128, 128, 64, 8, 4),
            Tile(128, 128, 64, 4, 3),
            Tile(128, 256, 64, 8, 4),
            heavier_grad_logits=Tile(128, 128, 64, 8, 4),
            grouped_forward=Tile(128, 64, 64, 8, 4),
        ),
        "tf32x3": Config(Tile(128, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3)),
        "ieee": Config(
            Tile(64, 64, 16, 4, 2),
            Tile(64, 64, 16, 4, 2),
            Tile(64, 64, 32, 8, 2),
            grouped_forward=Tile(64, 32, 16, 4, 2),
        ),
    },
    "sm_100": {
        "half": Config(
            Tile(128, 128, 64, 8, 4),
            Tile(128, 128, 64, 8, 4),
            Tile(128, 256, 64, 8, 4),
            symmetric_forward=Tile(128, 64, 64, 8, 4),
        ),
        "tf32x3": Config(Tile(128, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3), Tile(128, 64, 32, 8, 3)),
        "ieee": Config(Tile(64, 64, 16, 4, 2), Tile(64, 64, 16, 4, 2), Tile(64, 64, 32, 8, 2)),
    },
    # The matrix cores of gfx942 multiply fp32 as IEEE asks.
    "gfx942": {
        "half": Config(Tile(128, 128, 64, 8, 2), Tile(128, 128, 64, 8, 2), Tile(128, 128, 64, 8, 2)),
        "ieee": Config(Tile(128, 128, 32, 8, 2), Tile(128, 128, 32, 8, 2), Tile(128, 128, 32, 8, 2)),
    },
    # Small tiles: few rows reach every edge.
    "interpreter": {
        "half": Config(Tile(32, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1)),
        "ieee": Config(Tile(32, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1)),
    },
}


class DistillationConfig(NamedTuple):
    """The tiles of the kernels that make two products for each tile of logits."""

    forward: Tile
    grad_logits: Tile


DISTILLATION_CONFIGS: dict[str, dict[str, DistillationConfig]] = {
    "sm_80": {
        "half": DistillationConfig(Tile(64, 32, 32, 4, 4), Tile(128, 64, 32, 8, 4)),
        "tf32x3": DistillationConfig(Tile(64, 32, 16, 8, 3), Tile(64, 32, 32, 8, 3)),
        "ieee": DistillationConfig(Tile(64, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2)),
    },
    "sm_90": {
        "half": DistillationConfig(Tile(128, 64, 32, 8, 4), Tile(128, 128, 32, 8, 3)),
        "tf32x3": DistillationConfig(Tile(64, 64, 32, 8, 3), Tile(64, 64, 32, 8, 3)),
        "ieee": DistillationConfig(Tile(64, 64, 16, 8, 2), Tile(64, 64, 16, 8, 2)),
    },
    "sm_100": {
        "half": DistillationConfig(Tile(64, 64, 64, 8, 4), Tile(128, 64, 64, 8, 4)),
        "tf32x3": DistillationConfig(Tile(64, 64, 32, 8, 3), Tile(64, 64, 32, 4, 3)),
        "ieee": DistillationConfig(Tile(32, 32, 16, 4, 2), Tile(64, 64, 16, 4, 2)),
    },
    "gfx942": {
        "half": DistillationConfig(Tile(64, 32, 64, 8, 2), Tile(128, 64, 64, 8, 2)),
        "ieee": DistillationConfig(Tile(64, 32, 32, 4, 2), Tile(128, 64, 32, 8, 2)),
    },
    "interpreter": {
        "half": DistillationConfig(Tile(32, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1)),
        "ieee": DistillationConfig(Tile(32, 32, 32, 4, 1), Tile(32, 32, 32, 4, 1)),
    },
}


# An op with an epilogue of its own takes one tile for all its kernels over pairs: forward's, or this where that spills.
_OWN_TILES: dict[str, dict[tuple[str, str], Tile]] = {
    "siglip": {
        ("sm_80", "half"): Tile(128, 64, 32, 8, 4),
        ("sm_90", "half"): Tile(128, 64, 64, 4, 4),
        ("sm_100", "half"): Tile(128, 64, 64, 8, 4),
        ("sm_80", "ieee"): Tile(64, 64, 16, 8, 2),
        ("sm_100", "ieee"): Tile(64, 64, 16, 8, 2),
        ("sm_100", "tf32x3"): Tile(64, 64, 32, 8, 3),
    },
    "triplet": {
        ("sm_80", "half"): Tile(64, 64, 32, 8, 3, max_registers=255),
        ("sm_80", "tf32x3"): Tile(32, 64, 16, 4, 3, max_registers=255),
        ("sm_90", "tf32x3"): Tile(64, 64, 32, 8, 3),
        ("sm_100", "half"): Tile(64, 64, 32, 8, 4),
        ("sm_100", "tf32x3"): Tile(64, 64, 32, 8, 3),
        ("sm_100", "ieee"): Tile(32, 64, 16, 8, 1),
        ("gfx942", "half"): Tile(128, 64, 64, 8, 2),
        ("gfx942", "ieee"): Tile(128, 64, 32, 8, 2),
    },
    "retrieval": {
        ("sm_80", "half"): Tile(64, 128, 32, 4, 3),
        ("sm_90", "half"): Tile(128, 256, 32, 8, 4),
        ("sm_100", "half"): Tile(128, 128, 64, 8, 3),
        ("sm_100", "ieee"): Tile(64, 64, 16, 8, 2),
    },
}

if NEWER_TRITON:  # under which seven of the tiles above would spill
    for _gpu, _tiles in (
        ("sm_80", {"symmetric_forward": Tile(64, 64, 32, 8, 4)}),
        ("sm_90", {"grad_logits": Tile(128, 128, 64, 8, 3)}),
    ):
        CONFIGS[_gpu]["half"] = CONFIGS[_gpu]["half"]._replace(**_tiles)
    _OWN_TILES["triplet"]["sm_90", "half"] = Tile(128, 64, 64, 8, 4)
    _OWN_TILES["triplet"]["sm_100", "half"] = Tile(64, 64, 64, 8, 3)
    _OWN_TILES["siglip"]["sm_90", "half"] = Tile(64, 128, 64, 4, 4)
    DISTILLATION_CONFIGS["sm_90"]["half"] = DistillationConfig(Tile(64, 64, 32, 8, 4), Tile(128, 64, 64, 8, 3))

if OLDER_TRITON:  # under which the tiles above would spill
    _sm_80, _sm_90, _gfx942 = CONFIGS["sm_80"], CONFIGS["sm_90"], CONFIGS["gfx942"]
    _sm_80["half"] = _sm_80["half"]._replace(
        grouped_forward=Tile(64, 64, 32, 8, 4), heavier_grad_logits=Tile(64, 64, 32, 8, 4)
    )
    _sm_80["tf32x3"] = _sm_80["tf32x3"]._replace(forward=Tile(64, 64, 32, 8, 3), grouped_forward=Tile(64, 64, 32, 8, 3))
    _sm_90["half"] = _sm_90["half"]._replace(forward=Tile(128, 64, 64, 8, 4), grad_logits=Tile(128, 128, 64, 8, 3))
    _gfx942["half"] = _gfx942["half"]._replace(grad_logits=Tile(128, 64, 64, 8, 2))
    _gfx942["ieee"] = _gfx942["ieee"]._replace(grad_logits=Tile(128, 64, 32, 8, 2))
    _distillation = DISTILLATION_CONFIGS["sm_90"]
    _distillation["tf32x3"] = _distillation["tf32x3"]._replace(forward=Tile(64, 32, 32, 8, 3))
    for _op in ("siglip", "retrieval"):
        _OWN_TILES[_op]["sm_90", "half"] = Tile(128, 128, 64, 8, 4)
    _OWN_TILES["triplet"]["sm_90", "half"] = Tile(128, 64, 64, 8, 4)
    _OWN_TILES["retrieval"]["sm_80", "half"] = Tile(128, 64, 32, 8, 4)
    _OWN_TILES["siglip"]["sm_80", "half"] = Tile(64, 64, 32, 8, 4)
    _OWN_TILES["siglip"]["sm_80", "tf32x3"] = Tile(128, 64, 32, 8, 3)


def tile_of(op: str, family: str, precision: str) -> Tile:
    """The tile of an op of `_OWN_TILES`; precision: half, tf32x3 or ieee."""
    return _OWN_TILES[op].get((family, precision), CONFIGS[family][precision].forward)


def tile_on(op: str, device: torch.device, precision: str) -> Tile:
    """`tile_of` on a device, or what replaces it."""
    family = family_of(device)
    return overrides.tile_in_use(tile_of(op, family, precision), op, "pairs", precision, family, device)


def choose_tile(op: str, features: Tensor) -> tuple[Tile, str]:
    """The tile of an op of `_OWN_TILES` for the device and dtype, and how float32 is multiplied."""
    row, precision = _precision_of(features)
    return tile_on(op, features.device, row), precision


def choose(features: Tensor) -> tuple[Config, str]:
    """The tiles for the device and dtype, and how float32 is multiplied."""
    (row, precision), family = _precision_of(features), family_of(features.device)
    return overrides.tiles_in_use(CONFIGS[family][row], "info_nce", row, family, features.device), precision


def choose_distillation(features: Tensor) -> DistillationConfig:
    """The tiles of distillation for the device and dtype; the product over strips and the precision are `choose`'s."""
    (row, _), family = _precision_of(features), family_of(features.device)
    tiles = DISTILLATION_CONFIGS[family][row]
    return overrides.tiles_in_use(tiles, "distillation", row, family, features.device)


def strip_flags(family: str) -> dict[str, int]:
    """FLAT of the kernels that fill strips: not on gfx942, where one loop over tiles and features takes 96 KB of shared
    memory."""
    return {"FLAT": int(family != "gfx942")}


def _precision_of(features: Tensor) -> tuple[str, str]:
    """The precision that the tables have, and how float32 is multiplied."""
    if features.dtype != torch.float32:
        return "half", "ieee"
    # Never TF32 alone: a user who allows it for torch's own products gets three of them, almost as exact as float32.
    asked = "tf32x3" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    precision = asked if asked in CONFIGS[family_of(features.device)] else "ieee"
    return precision, precision
