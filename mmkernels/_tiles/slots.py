"""The columns' sums of a walk down columns of tiles, in registers: one for each slot of rows, until the column ends.

A slot is the rows of all tiles of the column that lie in one thread: rows i and i + 8 of the 16 of a warp, in HIGH
parts of the tile. HIGH = 0: row i alone.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.triton import Tile

# How far the largest logit of a row may lie below that of its slot, and the sum of a column below the largest logit of
# its block, in base 2. s - m of what counts is then rounded to at most 2^-18, and no exponential that counts to 0.
SPREAD = tl.constexpr(64.0)
LEAST = tl.constexpr(2.0**-64)


def slot_flags(tile: Tile, family: str) -> dict[str, int]:
    """SLOT_HIGH, by how a thread holds the rows of a tile; and FLAT: one loop over tiles and features."""
    # On sm_100 the compiler fails at sums over the rows of a thread, and at the columns' sums in a flat loop.
    rows_alone = family in ("sm_100", "gfx942")
    high = 0 if rows_alone else max(1, tile.block_m // (16 * tile.num_warps))
    return {"SLOT_HIGH": high, "FLAT": int(family != "sm_100")}


@triton.jit
def of_slots(rows, HIGH: tl.constexpr):
    """The largest of the rows of each slot, [BM] to [warps, 8]."""
    HEIGHT: tl.constexpr = rows.shape[0]
    if HIGH > 0:
        rows = tl.max(tl.max(tl.reshape(rows, (HIGH, HEIGHT // (16 * HIGH), 2, 8)), 2), 0)
    return rows


@triton.jit
def sum_of_slots(tile, HIGH: tl.constexpr):
    """The sums over the rows of each slot, [BM, BN] to [warps, 8, BN]."""
    HEIGHT: tl.constexpr = tile.shape[0]
    if HIGH > 0:
        tile = tl.sum(tl.sum(tl.reshape(tile, (HIGH, HEIGHT // (16 * HIGH), 2, 8, tile.shape[1])), 2), 0)
    return tile


@triton.jit
def of_rows(slots, HIGH: tl.constexpr):
    """What each slot has to each of its rows, [warps, 8] to [BM]."""
    if HIGH > 0:
        WARPS: tl.constexpr = slots.shape[0]
        rows = tl.broadcast_to(tl.expand_dims(tl.expand_dims(slots, 1), 0), (HIGH, WARPS, 2, 8))
        slots = tl.reshape(rows, (HIGH * WARPS * 16,))
    return slots


@triton.jit
def top_of_slots(m, HIGH: tl.constexpr):
    """The largest of all slots."""
    return tl.max(m if HIGH == 0 else tl.max(m, 1), 0)


@triton.jit
def sum_over_slots(sums, parts, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HIGH: tl.constexpr):
    """The columns' sums over all slots, [BN].

    Slots of one warp are added in registers. What the warps have goes through `parts` [warps, BN] in memory, for a sum
    over all in registers would be made by every warp, for all columns.
    """
    WARPS: tl.constexpr = BLOCK_M // (16 * (HIGH if HIGH > 0 else 1))
    if HIGH == 0:
        sums = tl.reshape(sums, (WARPS, 16, BLOCK_N))
    part = tl.arange(0, WARPS)
    col = tl.arange(0, BLOCK_N)
    tl.store(parts + part[:, None] * BLOCK_N + col[None, :], tl.sum(sums, 1))
    tl.debug_barrier()
    total = tl.load(parts + col)
    for index in tl.static_range(1, WARPS):
        total += tl.load(parts + index * BLOCK_N + col)
    return total
