"""Ranks and best keys in Triton: epilogues of the tiles of similarities of mmkernels._tiles.

Ranks, 1 G = 2 N M D FLOP: positives_kernel computes the score of each query's target in a tile like all
others, so that it has the same bits; ranks_kernel counts, a program for each block of queries and each split of the
keys. Best keys, 1 G: a program of topk_kernel keeps the k best of its split in one list per row, and exchanges the
list's last while the tile has a key that beats it. torch.topk merges the splits' lists as entries: a score and its key
as one int64 in the written order, of which no two are equal.

Lists past _MOST_KEPT do not fit in registers: then strips of entries are stored, and each goes through torch.topk
with the best so far.

Memory beyond inputs and outputs, in bytes:
    ranks   4 N for the targets' scores, and counts, 4 for each query and split: 4 N + 256 Ki at most
    topk    lists, 8 k for each query and split: k (8 N + 256 Ki) at most; and what torch.topk takes
    strips  64 Mi, or a block of queries times 2 k entries of 8; the best so far; and what torch.topk takes
and a padded copy of the features where D or the row stride is no multiple of 16 or the address none of 16 bytes.

No atomics: counts are whole numbers and the order of entries is total, so that results are the same from run to run.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._checks import require_targets
from mmkernels._tiles import overrides
from mmkernels._tiles.configs import tile_on
from mmkernels._tiles.engine import program_tile, similarities
from mmkernels._tiles.launch import aligned, launch_options
from mmkernels._tiles.triton import OLDER_TRITON, Tile, family_of, on_device, ordered

# Ordered scores: NOTHING is below all of them, HIGHEST stands for NaN, which comes before all.
NOTHING = tl.constexpr(-(2**31))
HIGHEST = tl.constexpr(2**31 - 1)

_PROGRAMS = 512  # the aim: a few for each multiprocessor, 3.9 on the 132 of an H100
_MOST_KEPT = 128  # the longest list in registers
_STRIP_BYTES = 64 << 20

# The tiles of topk_kernel, lower than the others because the lists take registers, too.
TOPK: dict[str, dict[str, Tile]] = {
    "sm_80": {"half": Tile(64, 64, 32, 8, 3), "ieee": Tile(64, 64, 16, 8, 2)},
    "sm_90": {"half": Tile(64, 128, 64, 8, 3), "ieee": Tile(64, 64, 16, 8, 1)},
    "sm_100": {"half": Tile(64, 128, 64, 8, 3), "ieee": Tile(64, 32, 16, 8, 2)},
    "gfx942": {"half": Tile(64, 128, 64, 8, 2), "ieee": Tile(64, 64, 32, 8, 2)},
    # Small, so that few rows reach every edge.
    "interpreter": {"half": Tile(32, 32, 32, 4, 1), "ieee": Tile(32, 32, 32, 4, 1)},
}
# Those of lists of at most _SHORT places, which fit into half as many warps: fewer take part in each reduction.
SHORT_TOPK: dict[tuple[str, str], Tile] = {
    # Left alone, ptxas aims at four blocks of 128 registers, and a list of one place spills.
    ("sm_80", "half"): Tile(64, 64, 32, 4, 3, max_registers=168),
    ("sm_90", "half"): Tile(64, 128, 64, 4, 3),
    ("sm_100", "half"): Tile(64, 128, 64, 4, 3),
}
_SHORT = 16
if OLDER_TRITON:  # under which the longer lists would spill, and the short ones may
    TOPK["sm_80"]["half"] = Tile(32, 32, 32, 8, 3)
    SHORT_TOPK.clear()


def topk_tile(family: str, precision: str, kept: int) -> tuple[str, Tile]:
    """Which line of the tables serves lists of so many places, and its tile."""
    plain = TOPK[family][precision]
    return ("topk", SHORT_TOPK.get((family, precision), plain)) if kept <= _SHORT else ("long_topk", plain)


@triton.jit(do_not_specialize=["N", "M"])
def positives_kernel(
    queries, keys, targets, positives,
    N, M, D, stride_q, stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """positives[i] = <q_i, key of target i>, [N]: the diagonal of a tile of queries and their targets."""
    SIDE: tl.constexpr = BLOCK_M if BLOCK_M < BLOCK_N else BLOCK_N  # as long as the diagonal is
    first = tl.program_id(0) * SIDE
    in_rows = tl.arange(0, BLOCK_M)
    own = tl.arange(0, BLOCK_N)
    ok = (own < SIDE) & (first + own < N)
    target = tl.load(targets + first + own, mask=ok, other=0).to(tl.int32)
    tile = similarities(
        queries, keys, first + in_rows, target, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    positive = tl.sum(tl.where(in_rows[:, None] == own[None, :], tile, 0.0), 0)
    tl.store(positives + first + own, positive, mask=ok)


@triton.jit(do_not_specialize=["N", "M", "tiles_per_split", "num_splits"])
def ranks_kernel(
    queries, keys, targets, positives, counts,
    N, M, D, stride_q, stride_k, tiles_per_split, num_splits,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """counts [num_splits, N]: the keys of a split that come before the target of the query."""
    row_tile, split = program_tile(tl.program_id(0), tl.cdiv(N, BLOCK_M), num_splits)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < N
    target = tl.load(targets + rows, mask=row_ok, other=0).to(tl.int32)
    positive = tl.load(positives + rows, mask=row_ok, other=0.0)
    count = tl.zeros((BLOCK_M,), tl.int32)
    first_col = split * tiles_per_split * BLOCK_N
    end_col = tl.minimum(first_col + tiles_per_split * BLOCK_N, M)
    for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
        cols = col_start + tl.arange(0, BLOCK_N)
        tile = similarities(
            queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        # These come before the target: higher scores, NaN, and equal scores at a lower index.
        before = (tile <= positive[:, None]) == 0
        before = before | ((tile == positive[:, None]) & (cols[None, :] < target[:, None]))
        count += tl.sum((before & (cols < M)[None, :]).to(tl.int32), 1)
    tl.store(counts + split.to(tl.int64) * N + rows, count, mask=row_ok)


@triton.jit
def _ordered_scores(tile, cols, M):
    """The scores of a tile as int32 in their order, NaN first; NOTHING past the last key."""
    scores = tl.where(tile == tile, ordered(tile), HIGHEST)
    return tl.where((cols < M)[None, :], scores, NOTHING)


@triton.jit
def _entries(scores, keys):
    """Ordered scores and their keys as one int64: the higher comes first, of equal scores the lower key."""
    return (scores.to(tl.int64) << 32) - keys + HIGHEST


@triton.jit(do_not_specialize=["N", "M", "k", "tiles_per_split", "num_splits"])
def topk_kernel(
    queries, keys, entries,
    N, M, D, stride_q, stride_k, k, tiles_per_split, num_splits,
    KEPT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """entries [N, num_splits, k]: the k best keys of a split, in no order; below all others where it has fewer."""
    row_tile, split = program_tile(tl.program_id(0), tl.cdiv(N, BLOCK_M), num_splits)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    # The lists. Places past the k-th hold a score that nothing beats; free ones NOTHING, each with a key of its own.
    places = tl.arange(0, KEPT)
    best = tl.zeros((BLOCK_M, KEPT), tl.int32) + tl.where(places < k, NOTHING, HIGHEST)[None, :]
    found = tl.zeros((BLOCK_M, KEPT), tl.int32) - 1 - places[None, :]
    level = tl.full((BLOCK_M,), NOTHING, tl.int32)  # the lowest of the list, which a key must beat
    first_col = split * tiles_per_split * BLOCK_N
    end_col = tl.minimum(first_col + tiles_per_split * BLOCK_N, M)
    for col_start in tl.range(first_col, end_col, BLOCK_N, disable_licm=True):
        cols = col_start + tl.arange(0, BLOCK_N)
        tile = similarities(
            queries, keys, rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
        )  # fmt: skip
        scores = _ordered_scores(tile, cols, M)
        top = tl.max(scores, 1)
        left = tl.max((top > level).to(tl.int32), 0)
        while left > 0:
            col = tl.min(tl.where(scores == top[:, None], cols[None, :], HIGHEST), 1)
            # It takes the place of the last: the lowest, of equal ones the latest.
            lowest = best == level[:, None]
            last = tl.max(tl.where(lowest, found, NOTHING), 1)
            place = lowest & (found == last[:, None]) & (top > level)[:, None]
            best = tl.where(place, top[:, None], best)
            found = tl.where(place, col[:, None], found)
            level = tl.min(best, 1)
            scores = tl.where(cols[None, :] == col[:, None], NOTHING, scores)
            top = tl.max(scores, 1)
            left = tl.max((top > level).to(tl.int32), 0)
    out = entries + (rows.to(tl.int64)[:, None] * num_splits + split) * k + places[None, :]
    tl.store(out, _entries(best, found), mask=(rows < N)[:, None] & (places < k)[None, :])


@triton.jit(do_not_specialize=["first_row", "first_col", "height", "width", "N", "M"])
def entries_kernel(
    queries, keys, entries,
    first_row, first_col, height, width, N, M, D, stride_q, stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """entries [height, width] of the queries first_row and following with the keys first_col and following."""
    row_tile, col_tile = program_tile(tl.program_id(0), tl.cdiv(height, BLOCK_M), tl.cdiv(width, BLOCK_N))
    in_rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = first_col + in_cols
    tile = similarities(
        queries, keys, first_row + in_rows, cols, N, M, D, stride_q, stride_k, BLOCK_M, BLOCK_N, BLOCK_K, PRECISION,
    )  # fmt: skip
    out = entries + in_rows.to(tl.int64)[:, None] * width + in_cols[None, :]
    values = _entries(_ordered_scores(tile, cols, M), tl.broadcast_to(cols[None, :], (BLOCK_M, BLOCK_N)))
    tl.store(out, values, mask=(in_rows < height)[:, None] & (in_cols < width)[None, :])


def retrieval_ranks(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    targets: Tensor | None,  # [N]
) -> Tensor:  # [N]
    """How many keys come before each query's target, int64; M where the target's score is NaN."""
    N, M = len(queries), len(keys)
    if targets is None:
        targets = torch.arange(N, device=queries.device)
    else:
        require_targets("retrieval_ranks", targets, M, "keys")
        targets = targets.contiguous()
    tile = tile_on("retrieval", queries.device, precision_of(queries))
    queries, keys = aligned(queries), aligned(keys)
    tiles_per_split, splits = _split(N, M, tile)
    positives = queries.new_empty(N, dtype=torch.float32)
    counts = targets.new_empty(splits, N, dtype=torch.int32)
    sizes = (N, M, queries.shape[1], queries.stride(0), keys.stride(0))
    options = {"PRECISION": "ieee", **launch_options(tile)}
    with on_device(queries.device):
        positives_kernel[(triton.cdiv(N, min(tile.block_m, tile.block_n)),)](
            queries, keys, targets, positives, *sizes, **options
        )
        ranks_kernel[(triton.cdiv(N, tile.block_m) * splits,)](
            queries, keys, targets, positives, counts, *sizes, tiles_per_split, splits, **options
        )
    return counts.sum(0).masked_fill_(positives.isnan(), M)


def retrieval_topk(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    k: int,
) -> tuple[Tensor, Tensor]:  # [N, k] and [N, k]
    """The k first of each query's scores, float32, and their keys, int64."""
    queries, keys = aligned(queries), aligned(keys)
    kept = _kept(queries, keys, k) if k <= _MOST_KEPT else _kept_of_strips(queries, keys, k)
    scores = (kept >> 32).int()
    scores = (scores ^ (scores >> 31 & 0x7FFFFFFF)).view(torch.float32)
    return scores, (0x7FFFFFFF - (kept & 0xFFFFFFFF)).masked_fill_(scores.isnan(), -1)


def _kept(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """The k best entries of each query, best first, from lists in registers."""
    N, M = len(queries), len(keys)
    family, precision = family_of(queries.device), precision_of(queries)
    kept = triton.next_power_of_2(k)
    kernel, tile = topk_tile(family, precision, kept)
    tile = overrides.tile_in_use(tile, "retrieval", kernel, precision, family, queries.device)
    tiles_per_split, splits = _split(N, M, tile)
    entries = queries.new_empty(N, splits * k, dtype=torch.int64)
    with on_device(queries.device):
        topk_kernel[(triton.cdiv(N, tile.block_m) * splits,)](
            queries, keys, entries,
            N, M, queries.shape[1], queries.stride(0), keys.stride(0), k, tiles_per_split, splits,
            KEPT=kept, PRECISION="ieee", **launch_options(tile),
        )  # fmt: skip
    return entries.topk(k, dim=1).values


def _kept_of_strips(queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """The k best entries of each query, best first, from strips of all entries."""
    N, M = len(queries), len(keys)
    tile = tile_on("retrieval", queries.device, precision_of(queries))
    width = min(M, max(2 * k, _STRIP_BYTES // (8 * tile.block_m)))
    height = min(N, max(tile.block_m, _STRIP_BYTES // (8 * width) // tile.block_m * tile.block_m))
    parts = []
    for row in range(0, N, height):
        rows = min(height, N - row)
        best = queries.new_empty(rows, 0, dtype=torch.int64)
        for col in range(0, M, width):
            cols = min(width, M - col)
            strip = queries.new_empty(rows, cols, dtype=torch.int64)
            with on_device(queries.device):
                entries_kernel[(triton.cdiv(rows, tile.block_m) * triton.cdiv(cols, tile.block_n),)](
                    queries, keys, strip,
                    row, col, rows, cols, N, M, queries.shape[1], queries.stride(0), keys.stride(0),
                    PRECISION="ieee", **launch_options(tile),
                )  # fmt: skip
            strip = torch.cat([best, strip], 1) if col else strip
            best = strip.topk(min(k, strip.shape[1]), dim=1).values
        parts.append(best)
    return torch.cat(parts)


def precision_of(features: Tensor) -> str:
    """float32 is multiplied as IEEE asks, whatever torch may do in its own products: a rank is a comparison."""
    return "ieee" if features.dtype == torch.float32 else "half"


def _split(N: int, M: int, tile: Tile) -> tuple[int, int]:
    """Tiles of a split of the keys, and how many splits: as many as the GPU needs to be busy."""
    col_tiles = triton.cdiv(M, tile.block_n)
    wanted = triton.cdiv(_PROGRAMS, triton.cdiv(N, tile.block_m))
    tiles_per_split = triton.cdiv(col_tiles, min(wanted, col_tiles))
    return tiles_per_split, triton.cdiv(col_tiles, tiles_per_split)
