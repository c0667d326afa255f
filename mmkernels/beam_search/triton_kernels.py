"""The step of beam search in Triton: the rows are split along V, and the parts' candidates merged.

scan_kernel reads the logits once from memory, for each part's largest and its best entries; sum_kernel reads them again
for the softmax's sum, which is exact only around the row's own largest, while they lie in L2 (the launcher goes through
the rows in groups that fit there); merge_kernel puts the parts' candidates into the written order. A row that is one
part is summed by scan_kernel itself. All arithmetic follows reference.py, one rounding an operation: the kernels are
compiled without contraction.

Memory beyond the outputs: 8 bytes for each candidate of a part, 12 for each part.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mmkernels._tiles import overrides
from mmkernels._tiles.triton import OLDER_TRITON, family_of, on_device, ordered
from mmkernels.beam_search import specification

LOG2E = tl.constexpr(specification.LOG2E)
LN2 = tl.constexpr(specification.LN2)
SQRT_HALF = tl.constexpr(specification.SQRT_HALF)
EXP2 = tl.constexpr(specification.EXP2)
LOG = tl.constexpr(specification.LOG)
LOWEST = tl.constexpr(specification.LOWEST)
WHOLE = tl.constexpr(specification.WHOLE)
ROWS = tl.constexpr(specification.ROWS)
COLUMNS = tl.constexpr(specification.COLUMNS)
NO_INDEX = tl.constexpr(2**31 - 1)
NO_KEY = tl.constexpr(-(2**63))
INF = tl.constexpr(float("inf"))


class Tile(NamedTuple):
    """How the kernels are compiled: entries of a step, the most steps of a part, and the launch."""

    block: int
    max_steps: int
    num_warps: int
    programs: int  # wanted at once on a multiprocessor


TILES = {
    "sm_80": Tile(2048, 16, 4, 4),
    "sm_90": Tile(2048, 16, 4, 4),
    "sm_100": Tile(2048, 16, 4, 4),
    "gfx942": Tile(2048, 16, 4, 4),
    # A small tile: small inputs have several parts and steps, too.
    "interpreter": Tile(256, 8, 4, 8),
}
# Bytes of logits between one read of them and the next: less than the L2 of any GPU named.
_GROUP_BYTES = 16 << 20
# Warps of the merge's largest tiles, as a multiple of the other kernels': with two, Triton 3.6 spills on sm_80.
_WIDE = 4 if OLDER_TRITON else 2


@triton.jit
def exact_exp(x):
    """e^x for x <= 0: exponentials() in reference.py."""
    y = x * LOG2E
    y = tl.where(y < LOWEST, LOWEST, y)
    whole = y + WHOLE
    f = y - (whole - WHOLE)
    p = f * EXP2[0] + EXP2[1]
    for i in tl.static_range(2, 5):
        p = p * f + EXP2[i]
    p = p * f + 1.0
    return p * (whole.to(tl.int32, bitcast=True) << 23).to(tl.float32, bitcast=True)


@triton.jit
def log_of_sum(total):
    """The logarithm of float64 values >= 1: log_sums() in reference.py."""
    bits = total.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) - 1022).to(tl.float64)
    mantissa = ((bits & 0x000FFFFFFFFFFFFF) | (1022 << 52)).to(tl.float64, bitcast=True)
    small = mantissa < SQRT_HALF
    mantissa = tl.where(small, mantissa + mantissa, mantissa)
    exponent = tl.where(small, exponent - 1.0, exponent)
    z = (mantissa - 1.0) / (mantissa + 1.0)
    w = z * z
    p = w * LOG[0] + LOG[1]
    for i in tl.static_range(2, 8):
        p = p * w + LOG[i]
    return (exponent * LN2 + (z + z) * p).to(tl.float32)


@triton.jit
def load_entries(logits, forbidden, offsets, inside, MASK_FIRST: tl.constexpr):
    """A row's logits as the softmax takes them, and as candidates: -inf where there is none."""
    x = tl.load(logits + offsets, mask=inside, other=-INF).to(tl.float32)
    candidates = x
    if forbidden is not None:
        candidates = tl.where(tl.load(forbidden + offsets, mask=inside, other=1) != 0, -INF, x)
        if MASK_FIRST:
            x = candidates
    return x, candidates


@triton.jit
def two_terms(logits, forbidden, offsets, end, largest, MASK_FIRST: tl.constexpr):
    """e^(x - largest) of the entries at `offsets`, each with its neighbour's in the next row of its block."""
    x, _ = load_entries(logits, forbidden, offsets, offsets < end, MASK_FIRST)
    y, _ = load_entries(logits, forbidden, offsets + COLUMNS, offsets + COLUMNS < end, MASK_FIRST)
    return exact_exp(x - largest) + exact_exp(y - largest)


@triton.jit
def exact_sum(logits, forbidden, begin, end, largest, shift, MASK_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of e^(x - largest) over a part of a row, float64: log_sums() in reference.py.

    The terms of a column of a block of ROWS x COLUMNS are added as the reference does it; the rest is exact, whatever
    the order.
    """
    lanes = tl.arange(0, BLOCK // ROWS)
    first = lanes // COLUMNS * (ROWS * COLUMNS) + lanes % COLUMNS
    total = tl.zeros([BLOCK // ROWS], tl.float64)
    for start in range(begin, end, BLOCK):
        at = start + first
        a = two_terms(logits, forbidden, at, end, largest, MASK_FIRST)
        a += two_terms(logits, forbidden, at + 2 * COLUMNS, end, largest, MASK_FIRST)
        b = two_terms(logits, forbidden, at + 4 * COLUMNS, end, largest, MASK_FIRST)
        b += two_terms(logits, forbidden, at + 6 * COLUMNS, end, largest, MASK_FIRST)
        total += (((a + b) + shift) - shift).to(tl.float64)
    # A row of -inf has no candidate and its sum no reader; 1 has a logarithm.
    return tl.where(largest == -INF, 1.0, tl.sum(total))


@triton.jit
def scan_kernel(
    logits,  # [B K, V]
    forbidden,  # [B K, V] uint8, or None
    valid,  # [B K] uint8, or None
    maxima,  # [B K, parts]: the part's largest as the softmax takes it; NaN if it has a NaN or +inf
    sums,  # [B K, parts] float64
    kept_logits,  # [B K, parts, keep]: the part's best, best first; -inf past the last
    kept_tokens,  # [B K, parts, keep] int32
    first_row,
    row_stride,
    forbidden_stride,
    vocabulary,
    part,  # entries of a part
    parts,
    keep,
    shift,
    SUM: tl.constexpr,  # the part is the row, whose sum can be formed at once
    MASK_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
    MAX_STEPS: tl.constexpr,
):
    """Program (row, part)."""
    row = first_row + tl.program_id(0).to(tl.int64)
    if valid is not None:  # noqa: SIM102, Triton knows no short circuit
        if tl.load(valid + row) == 0:
            return
    logits += row * row_stride
    if forbidden is not None:
        forbidden += row * forbidden_stride
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, vocabulary)
    at_part = row * parts + tl.program_id(1)

    # The best of each column of the tiles, and where it stands.
    columns = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -INF, tl.float32)
    wrong = tl.zeros([BLOCK], tl.int32)
    best = tl.full([BLOCK], -INF, tl.float32)
    tokens = tl.full([BLOCK], 0, tl.int32)
    for start in range(begin, end, BLOCK):
        offsets = start + columns
        x, candidates = load_entries(logits, forbidden, offsets, offsets < end, MASK_FIRST)
        top = tl.maximum(top, x)
        wrong = tl.where(x < INF, wrong, 1)
        better = candidates > best
        best = tl.where(better, candidates, best)
        tokens = tl.where(better, offsets, tokens)
    largest = tl.where(tl.max(wrong) != 0, float("nan"), tl.max(top))
    tl.store(maxima + at_part, largest)
    if SUM:
        tl.store(sums + at_part, exact_sum(logits, forbidden, begin, end, largest, shift, MASK_FIRST, BLOCK))

    # The best of all columns is taken `keep` times; its column then shows its next.
    steps = tl.arange(0, MAX_STEPS)
    for c in range(keep):
        x = tl.max(best)
        token = tl.min(tl.where(best == x, tokens, NO_INDEX))
        tl.store(kept_logits + at_part * keep + c, x)
        tl.store(kept_tokens + at_part * keep + c, token)
        column = (token - begin) % BLOCK
        offsets = begin + column + steps * BLOCK
        _, y = load_entries(logits, forbidden, offsets, offsets < tl.where(x > -INF, end, begin), MASK_FIRST)
        y = tl.where((y < x) | ((y == x) & (offsets > token)), y, -INF)
        following = tl.max(y)
        token = tl.min(tl.where(y == following, offsets, NO_INDEX))
        best = tl.where(columns == column, following, best)
        tokens = tl.where(columns == column, token, tokens)


@triton.jit
def sum_kernel(
    logits,
    forbidden,
    valid,
    maxima,
    sums,
    first_row,
    row_stride,
    forbidden_stride,
    vocabulary,
    part,
    parts,
    shift,
    MASK_FIRST: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (row, part): the part's share of the row's sum."""
    row = first_row + tl.program_id(0).to(tl.int64)
    if valid is not None:  # noqa: SIM102, Triton knows no short circuit
        if tl.load(valid + row) == 0:
            return
    logits += row * row_stride
    if forbidden is not None:
        forbidden += row * forbidden_stride
    others = tl.arange(0, PARTS)
    largest = tl.max(tl.load(maxima + row * parts + others, mask=others < parts, other=-INF))
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, vocabulary)
    total = exact_sum(logits, forbidden, begin, end, largest, shift, MASK_FIRST, BLOCK)
    tl.store(sums + row * parts + tl.program_id(1), total)


@triton.jit
def merge_kernel(
    scores,  # [B, K]
    valid,
    maxima,
    sums,
    kept_logits,
    kept_tokens,
    out_scores,  # [B, C]
    out_beams,  # [B, C] int64
    out_tokens,  # [B, C] int64
    out_valid,  # [B, C] uint8
    out_poisoned,  # [B] uint8
    beams,
    vocabulary,
    parts,
    keep,
    num_candidates,
    NORMALIZE: tl.constexpr,
    BEAMS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Program (item): takes the best of all parts' next candidates, C times."""
    item = tl.program_id(0).to(tl.int64)
    beam = tl.arange(0, BEAMS)[:, None]
    row = item * beams + beam
    counts = beam < beams
    if valid is not None:
        counts = counts & (tl.load(valid + row, mask=counts, other=0) != 0)
    score = tl.load(scores + row, mask=counts, other=-INF)
    index = tl.arange(0, PARTS)[None, :]
    at = row * parts + index
    counts = counts & (index < parts)
    top = tl.load(maxima + at, mask=counts, other=-INF)
    poisoned = tl.max(((top != top) | (score != score) | (score == INF)).to(tl.int32)) != 0
    tl.store(out_poisoned + item, poisoned.to(tl.uint8))
    if NORMALIZE:
        largest = tl.max(top, 1)[:, None]
        total = tl.sum(tl.load(sums + at, mask=counts, other=0.0), 1)[:, None]
        log_sum = log_of_sum(tl.where(counts, total, 1.0))

    at = at * keep
    position = tl.zeros([BEAMS, PARTS], tl.int32)
    counts = counts & (index < tl.where(poisoned, 0, parts))
    logit = tl.load(kept_logits + at, mask=counts, other=-INF)
    token = tl.load(kept_tokens + at, mask=counts, other=0)
    for c in range(num_candidates):
        if NORMALIZE:
            value = score + ((logit - largest) - log_sum)
        else:
            value = score + logit
        key = (ordered(value).to(tl.int64) << 32) + (ordered(logit).to(tl.int64) + 2**31)
        key = tl.where(logit > -INF, key, NO_KEY)
        best = tl.max(key)
        place = beam.to(tl.int64) * vocabulary + token
        first = tl.min(tl.where(key == best, place, 2**63 - 1))
        found = best != NO_KEY
        winner = (key == best) & (place == first) & (key != NO_KEY)
        to = item * num_candidates + c
        tl.store(out_scores + to, tl.max(tl.where(winner, value, -INF)))
        tl.store(out_beams + to, tl.where(found, first // vocabulary, 0))
        tl.store(out_tokens + to, tl.where(found, first % vocabulary, 0))
        tl.store(out_valid + to, found.to(tl.uint8))
        position += winner.to(tl.int32)
        left = winner & (position < keep)
        logit = tl.where(winner, tl.load(kept_logits + at + position, mask=left, other=-INF), logit)
        token = tl.where(winner, tl.load(kept_tokens + at + position, mask=left, other=0), token)


class Split(NamedTuple):
    """How rows are split."""

    part: int
    parts: int


def merge_warps(tile: Tile, beams: int, parts: int) -> int:
    """Warps of the merge: its largest tiles do not fit the registers of as many as the other kernels have."""
    return _WIDE * tile.num_warps if beams * parts > 1024 else tile.num_warps


def split_rows(rows: int, vocabulary: int, tile: Tile, multiprocessors: int) -> Split:
    """Parts as small as the GPU needs to be busy, and no smaller."""
    steps = triton.cdiv(vocabulary, tile.block)
    wanted = triton.cdiv(rows * steps, tile.programs * multiprocessors)
    part = min(max(wanted, 1), tile.max_steps) * tile.block
    return Split(part, triton.cdiv(vocabulary, part))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return 4 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


def beam_search_step(
    logits: Tensor,  # [B K, V]
    scores: Tensor,  # [B, K]
    valid: Tensor | None,  # [B, K]
    forbidden: Tensor | None,  # [B K, V]
    num_candidates: int,
    normalize: bool,
    mask_first: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores, beams, tokens and validity of the candidates [B, C]; which items are poisoned [B]."""
    B, K = scores.shape
    V, C = logits.shape[1], num_candidates
    rows, keep = B * K, min(C, V)
    out_scores, poisoned = scores.new_empty(B, C), scores.new_empty(B, dtype=torch.bool)
    out_beams, out_tokens = (scores.new_empty(B, C, dtype=torch.int64) for _ in range(2))
    out_valid = scores.new_empty(B, C, dtype=torch.bool)
    outputs = (out_scores, out_beams, out_tokens, out_valid, poisoned)
    if rows == 0:
        return outputs
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    scores = scores.contiguous()
    valid = None if valid is None else valid.contiguous().view(torch.uint8)
    if forbidden is not None:
        forbidden = (forbidden if forbidden.stride(1) == 1 else forbidden.contiguous()).view(torch.uint8)

    family = family_of(logits.device)
    tile = overrides.tile_in_use(TILES[family], "beam_search", "step", "all", family, logits.device)
    part, parts = split_rows(rows, V, tile, _multiprocessors(logits.device))
    maxima, sums = scores.new_empty(rows, parts), scores.new_empty(rows, parts, dtype=torch.float64)
    kept_logits = scores.new_empty(rows, parts, keep)
    kept_tokens = scores.new_empty(rows, parts, keep, dtype=torch.int32)
    shift = 1.5 * math.ldexp(1.0, 23 - specification.quantum_bits(V))
    group = max(1, _GROUP_BYTES // (V * logits.element_size())) if normalize and parts > 1 else rows
    shape = (logits.stride(0), 0 if forbidden is None else forbidden.stride(0), V, part, parts)
    options = {"BLOCK": tile.block, "num_warps": tile.num_warps, "enable_fp_fusion": False}
    beams, padded = triton.next_power_of_2(K), triton.next_power_of_2(parts)
    with on_device(logits.device):
        for first in range(0, rows, group):
            grid = (min(group, rows - first), parts)
            scan_kernel[grid](
                logits, forbidden, valid, maxima, sums, kept_logits, kept_tokens, first, *shape, keep, shift,
                SUM=normalize and parts == 1, MASK_FIRST=mask_first or not normalize, MAX_STEPS=tile.max_steps,
                **options,
            )  # fmt: skip
            if normalize and parts > 1:
                sum_kernel[grid](
                    logits, forbidden, valid, maxima, sums, first, *shape, shift, MASK_FIRST=mask_first, PARTS=padded,
                    **options,
                )  # fmt: skip
        merge_kernel[(B,)](
            scores, valid, maxima, sums, kept_logits, kept_tokens, out_scores, out_beams, out_tokens,
            out_valid.view(torch.uint8), poisoned.view(torch.uint8), K, V, parts, keep, C, NORMALIZE=normalize,
            BEAMS=beams, PARTS=padded, num_warps=merge_warps(tile, beams, padded), enable_fp_fusion=False,
        )  # fmt: skip
    return outputs
