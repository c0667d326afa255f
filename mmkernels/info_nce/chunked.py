"""Cross-entropies with the products of torch: strips of logits in memory, one pass of Triton over each.

    forward    for each strip of rows:  S = Q K^T (torch.mm, float32)  ->  statistics of rows and columns
    backward   for each strip of rows:  S again  ->  dS, in the dtype of the features  ->  dQ = dS K, dK += dS^T Q

The fused kernels of `triton_kernels` store no logits; here each is written and read once in each direction, and the
products run at the rate of cuBLAS. Results are the same bits from run to run: each program owns what it writes, and
strips follow each other.

Memory beyond inputs and outputs, in bytes: a strip of float32 logits, min(logits, max(256 MiB, 64 rows)), and in the
backward pass half of that for dS and the float32 products of a strip and of all keys; statistics as the fused kernels.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._checks import require_targets
from mmkernels._tiles import overrides
from mmkernels._tiles.engine import clear_columns
from mmkernels._tiles.launch import MAX_PARTIALS, launcher
from mmkernels._tiles.triton import LOG2E, LOWEST, cdiv, family_of, on_device, round_up
from mmkernels.info_nce.groups import number_groups, require_groups
from mmkernels.info_nce.triton_kernels import (
    CrossEntropy,
    column_weights,
    finish_forward,
    target_indices,
    weights_of_logits,
)
from mmkernels.info_nce.triton_kernels.cross_entropy import exact_part, store_grad

_STRIP_BYTES = 256 << 20  # of float32 logits; in lower ones the sums of dK would take longer than their products
_LEAST_ROWS = 64
_ROW_GROUPS = 8  # programs below one another in a strip


class StripTile(NamedTuple):
    """A tile of both passes."""

    block_m: int
    block_n: int
    num_warps: int

    @property
    def options(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "num_warps": self.num_warps}


def tile_of(family: str) -> StripTile:
    """The tile on a family of GPUs."""
    return StripTile(32, 32 if family == "interpreter" else 128, 4)


def tile_on(device: torch.device) -> StripTile:
    """The same on a device, or what replaces it."""
    family = family_of(device)
    return overrides.tile_in_use(tile_of(family), "info_nce", "chunked", "all", family, device)


@triton.jit(do_not_specialize=["first_row", "num_rows", "N", "M", "num_grouped", "rows_per_group", "tiles_per_band"])
def strip_statistics_kernel(
    strip, scale, targets, key_groups, positives, row_partials, col_partials,
    first_row, num_rows, width, N, M, num_grouped, rows_per_group, tiles_per_band, num_groups, num_bands,
    SYMMETRIC: tl.constexpr, GROUPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Statistics of the logits from first_row on, of which `strip` [num_rows, width] has q.k, as forward_kernel's.

    A program takes a group of the strip's rows and a band of its columns: row_partials [.., num_bands, N] are whole,
    and col_partials [.., num_groups, M] grow from strip to strip.
    """
    group = tl.program_id(0) // num_bands
    band = tl.program_id(0) % num_bands
    scale2 = tl.load(scale) * LOG2E
    row_plane = tl.cast(num_bands, tl.int64) * N
    col_plane = tl.cast(num_groups, tl.int64) * M
    row_out = row_partials + band.to(tl.int64) * N
    col_out = col_partials + group.to(tl.int64) * M
    first_col = band * tiles_per_band * BLOCK_N
    end_col = tl.minimum(first_col + tiles_per_band * BLOCK_N, M)
    begin = group * rows_per_group
    end = tl.minimum(begin + rows_per_group, num_rows)
    if SYMMETRIC:  # noqa: SIM102, a constant beside a value
        if first_row == 0:
            for col_start in range(first_col, end_col, BLOCK_N):
                cols = col_start + tl.arange(0, BLOCK_N)
                clear_columns(col_out, col_plane, cols, cols < M, GROUPS)
    for row_start in range(begin, end, BLOCK_M):
        in_rows = row_start + tl.arange(0, BLOCK_M)
        rows = tl.where(in_rows < end, first_row + in_rows, N)  # a group's last tile may reach into the next
        m = tl.full((BLOCK_M,), LOWEST, tl.float32)
        z = tl.zeros((BLOCK_M,), tl.float32)
        p = tl.zeros((BLOCK_M,), tl.float32)
        for col_start in range(first_col, end_col, BLOCK_N):
            cols = col_start + tl.arange(0, BLOCK_N)
            inside = (rows < N)[:, None] & (cols < M)[None, :]
            at = strip + in_rows.to(tl.int64)[:, None] * width + cols[None, :]
            s = scale2 * tl.load(at, mask=inside, other=0.0)
            m, z, p = exact_part(
                s, scale, m, z, p, rows, targets, key_groups, positives, col_out, col_plane, col_start,
                N, M, num_grouped, SYMMETRIC, False, GROUPS, BLOCK_N,
            )  # fmt: skip
        tl.store(row_out + rows, m, mask=rows < N)
        tl.store(row_out + row_plane + rows, z, mask=rows < N)
        if GROUPS:
            tl.store(row_out + 2 * row_plane + rows, p, mask=rows < N)


@triton.jit(do_not_specialize=["first_row", "num_rows", "N", "M", "num_grouped", "label_smoothing"])
def strip_grad_kernel(
    logits, strip, scale, targets, key_groups, row_lse, col_lse, row_weights, col_weights, row_shares, col_shares,
    first_row, num_rows, width, N, M, num_grouped, label_smoothing,
    SYMMETRIC: tl.constexpr, SMOOTHED: tl.constexpr, GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """strip [.., width] = dS from first_row on, of which `logits` has q.k; 0 past its ends. See grad_logits_kernel."""
    col_tiles = tl.cdiv(width, BLOCK_N)
    row_in_strip = tl.program_id(0) // col_tiles * BLOCK_M
    col_in_strip = tl.program_id(0) % col_tiles * BLOCK_N
    in_rows = row_in_strip + tl.arange(0, BLOCK_M)
    cols = col_in_strip + tl.arange(0, BLOCK_N)
    inside = (in_rows < num_rows)[:, None] & (cols < M)[None, :]
    at = logits + in_rows.to(tl.int64)[:, None] * width + cols[None, :]
    s = tl.load(scale) * LOG2E * tl.load(at, mask=inside, other=0.0)
    store_grad(
        s, scale, targets, key_groups, row_lse, col_lse, row_weights, col_weights, row_shares, col_shares, strip,
        first_row, 0, row_in_strip, col_in_strip, width, N, M, num_grouped, label_smoothing,
        SYMMETRIC, SMOOTHED, False, GROUPS, BLOCK_M, BLOCK_N,
    )  # fmt: skip


class _Strips(NamedTuple):
    """Bands of whole rows of the logits; whole tiles, so that dS may be written without a mask."""

    height: int
    width: int

    @classmethod
    def of(cls, num_queries: int, num_keys: int, tile: StripTile) -> "_Strips":
        rows, cols, _ = tile
        width = round_up(num_keys, cols)
        most = round_up(max(_STRIP_BYTES // (4 * width), _LEAST_ROWS) - rows + 1, rows)
        return cls(min(most, round_up(num_queries, rows)), width)


def _product(x: Tensor, y: Tensor, out: Tensor) -> None:
    """out = x y in float32, of float32 sums: cuBLAS need not round them to the dtype of x and y."""
    if x.is_cuda:
        torch.mm(x, y, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x.float(), y.float(), out=out)


def _add_product(x: Tensor, y: Tensor, total: Tensor) -> None:
    """total += x y, float32 sums. torch.addmm's own total must be in the dtype of x in some releases of torch; this
    one's, which is the result, may not."""
    if x.is_cuda:
        torch.baddbmm(total[None], x[None], y[None], out_dtype=torch.float32, out=total[None])
    else:
        total.addmm_(x.float(), y.float())


def info_nce_forward(
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    targets: Tensor | None,  # [N]
    query_groups: Tensor | None,  # [N]
    key_groups: Tensor | None,  # [M] or fewer: the keys past its end are of no group
    symmetric: bool,
    label_smoothing: float,
    keep_products: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What info_nce_forward of the Triton kernels returns, in the same form."""
    if targets is not None:
        require_targets("info_nce", targets, keys.shape[0], "keys")
    groups = None
    if query_groups is not None and key_groups is not None:
        groups = number_groups(query_groups, key_groups)
        require_groups(groups, query_groups, key_groups, targets, symmetric)
    N, M = len(queries), len(keys)
    tile = tile_on(queries.device)
    strips = _Strips.of(N, M, tile)
    targets = target_indices(targets, N, queries.device)
    row_ids, key_ids = (targets, targets) if groups is None else groups[:2]
    of = CrossEntropy(queries, keys, scale, None, targets, groups, symmetric, label_smoothing)

    col_tiles = cdiv(M, tile.block_n)
    tiles_per_band = cdiv(col_tiles, MAX_PARTIALS)
    bands = cdiv(col_tiles, tiles_per_band)
    rows_per_group = round_up(cdiv(strips.height, _ROW_GROUPS), tile.block_m)
    row_groups = cdiv(strips.height, rows_per_group)
    planes = 2 if groups is None else 3
    positives = scale.new_empty(N)
    row_partials = scale.new_empty(planes, bands, N)
    col_partials = scale.new_empty(planes, row_groups, M) if symmetric else row_partials
    logits = scale.new_empty(strips)
    flags = {"SYMMETRIC": symmetric, "GROUPS": groups is not None}
    with on_device(queries.device):
        for first_row in range(0, N, strips.height):
            height = min(strips.height, N - first_row)
            _product(queries[first_row : first_row + height], keys.T, logits[:height, :M])
            launcher(strip_statistics_kernel, **flags, **tile.options)(
                (row_groups * bands,),
                logits, scale, row_ids, key_ids, positives, row_partials, col_partials,
                first_row, height, strips.width, N, M, len(key_ids), rows_per_group, tiles_per_band, row_groups, bands,
            )  # fmt: skip
        found = finish_forward(of, targets, row_partials, col_partials, positives, row_groups, bands)
    return *found, scale.new_empty(0, N)


def info_nce_backward(
    grad_losses: Tensor,  # [N]
    queries: Tensor,  # [N, D]
    keys: Tensor,  # [M, D]
    scale: Tensor,  # []
    targets: Tensor | None,  # [N]
    query_groups: Tensor | None,  # [N]
    key_groups: Tensor | None,  # [M] or fewer
    row_lse: Tensor,  # [2, N]
    col_lse: Tensor,  # [2, M]
    products: Tensor,  # none
    symmetric: bool,
    label_smoothing: float,
    num_grad_keys: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, the first num_grad_keys keys and scale; an empty tensor for each false entry of
    output_mask. d loss / d scale = <Q, dS K>, from the queries' product before it is scaled."""
    groups = None
    if query_groups is not None and key_groups is not None:
        groups = number_groups(query_groups, key_groups)
    (N, D), M = queries.shape, len(keys)
    of_queries, of_keys, of_scale = output_mask
    grad_queries = queries.new_empty(queries.shape if of_queries else 0)
    grad_keys = keys.new_empty((num_grad_keys, D) if of_keys else 0)
    identity = targets is None
    targets = target_indices(targets, N, queries.device)
    tile = tile_on(queries.device)
    strips = _Strips.of(N, M, tile)
    weights = grad_losses.float() * (0.5 if symmetric else 1.0)  # [N]
    with on_device(queries.device):
        col_weights = column_weights(weights, targets, M, identity) if symmetric else weights
        of = CrossEntropy(queries, keys, scale, None, targets, groups, symmetric, label_smoothing)
        weights, col_weights, row_shares, col_shares, factor, unit = weights_of_logits(of, weights, col_weights)
        row_ids, key_ids = (targets, targets) if groups is None else groups[:2]
        logits, grads = scale.new_empty(strips), queries.new_empty(strips)
        of_strip = scale.new_empty(strips.height, D) if of_queries or of_scale else scale
        of_all = scale.new_zeros(num_grad_keys, D) if of_keys else scale
        shares = scale.new_empty(cdiv(N, strips.height) if of_scale else 0)
        flags = {"SYMMETRIC": symmetric, "SMOOTHED": label_smoothing > 0, "GROUPS": groups is not None}
        for index, first_row in enumerate(range(0, N, strips.height)):
            height = min(strips.height, N - first_row)
            own = queries[first_row : first_row + height]
            _product(own, keys.T, logits[:height, :M])
            launcher(strip_grad_kernel, **flags, **tile.options)(
                (cdiv(height, tile.block_m) * (strips.width // tile.block_n),),
                logits, grads, scale, row_ids, key_ids, row_lse, col_lse, weights, col_weights, row_shares, col_shares,
                first_row, height, strips.width, N, M, len(key_ids), float(label_smoothing),
            )  # fmt: skip
            grad = grads[:height, :M]
            if of_queries or of_scale:
                _product(grad, keys, of_strip[:height])
            if of_queries:
                torch.mul(of_strip[:height], factor, out=grad_queries[first_row : first_row + height])
            if of_scale:
                torch.sum(of_strip[:height] * own, (0, 1), out=shares[index])
            if of_keys:
                _add_product(grad[:, :num_grad_keys].T, own, of_all)
        if of_keys:
            torch.mul(of_all, factor, out=grad_keys)
        grad_scale = shares.sum() if of_scale else shares
        if unit is not None and of_scale:
            grad_scale = grad_scale * unit
    return grad_queries, grad_keys, grad_scale
