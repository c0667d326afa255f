"""The forward pass over sequences whose keys stay in shared memory, whole: neither packed nor streamed.

A program owns a sequence and a head. It loads the keys and values once, in pieces of PIECE keys and then of smaller
powers of two that add up to the next multiple of 16, and walks over blocks of the queries, each of which meets all keys
at once: no maximum runs. 197 keys are 64 + 64 + 64 + 16, where steps of 64 take 256, and only the last piece is masked.
This is for half precision and scales that are not negative; frame masks and dropout are left to the streamed kernel.

The block of the class token comes last, so that its row is at hand after the loop: inside, what its partial needs would
take registers from all blocks.
"""

# Tuples of pieces grow in loops that the compiler unrolls.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code="misc,assignment"
# ruff: noqa: RUF005

import triton
import triton.language as tl

from mmkernels._tiles.triton import dot
from mmkernels.divided_attention.triton_kernels.engine import (
    APART,
    GLOBAL,
    RUNTIME,
    UNIT,
    load_rows,
    magnitude,
    place,
    rows_at,
    tokens_at,
)
from mmkernels.divided_attention.triton_kernels.forward import store_class_token, store_queries


@triton.jit
def load_pairs(base, token, stride, present, D, HEAD: tl.constexpr, WIDE: tl.constexpr):
    """As load_rows, but two features in each 32-bit number. What a loop carries from one trip to the next takes a
    register for each number, however small: a row of halves would take twice what it fills."""
    HALF: tl.constexpr = HEAD // 2
    if WIDE:
        stride = stride.to(tl.int64)
    at = base.to(tl.pointer_type(tl.int32), bitcast=True) + rows_at(token, stride * (UNIT // 2), HALF, WIDE)
    return tl.load(at, mask=present[:, None] & (tl.arange(0, HALF) < D // 2)[None, :], other=0)


@triton.jit
def unpaired(pairs, DTYPE: tl.constexpr):
    """The features of load_pairs; the compiler makes no instruction of it."""
    low = (pairs & 0xFFFF).to(tl.int16).to(DTYPE, bitcast=True)
    high = (pairs >> 16).to(tl.int16).to(DTYPE, bitcast=True)
    return tl.reshape(tl.join(low, high), (pairs.shape[0], 2 * pairs.shape[1]))


@triton.jit
def load_piece(
    keys, C, stride, sequence, items, has_cls, sequence_step, patch_step, D,
    FIRST: tl.constexpr, SIZE: tl.constexpr, CLS: tl.constexpr, WIDE: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """The keys and values of SIZE items from FIRST on."""
    item = FIRST + tl.arange(0, SIZE)
    token, _ = tokens_at(sequence, item, has_cls, sequence_step, patch_step, CLS)
    k = load_rows(keys, token, stride, item < items, D, HEAD, WIDE)
    v = load_rows(keys + C, token, stride, item < items, D, HEAD, WIDE)
    return k, v


@triton.jit
def scores_of(q, k, item, sequence, items, FIRST: tl.constexpr, LAST: tl.constexpr, CLS: tl.constexpr):
    """Products of queries and a piece of keys; -inf where a key is none, or is not seen."""
    key = FIRST + tl.arange(0, k.shape[0])
    s = dot(q, tl.trans(k), tl.zeros((q.shape[0], k.shape[0]), tl.float32), "ieee")
    if LAST:
        s = tl.where((key < items)[None, :], s, float("-inf"))
    if CLS == GLOBAL and FIRST == 0:  # the class token meets itself in the first sequence alone
        s = tl.where((key[None, :] == 0) & (item[:, None] == 0) & (sequence > 0), float("-inf"), s)
    return s


@triton.jit
def weights_of(s, top, size):
    """2^(size s - top). The product is not rounded, and top is the same for a whole row, whose sum is made of the same
    weights: that top is rounded changes nothing."""
    return tl.exp2(tl.fma(s, tl.zeros_like(s) + size, tl.zeros_like(s) - top[:, None]))


@triton.jit(do_not_specialize=RUNTIME)
def whole_forward_kernel(
    qkv, out, lse, partials, partial_tops, partial_sums,
    num_heads, units, num_sequences, items, pack, groups, reciprocal, has_cls,
    sequence_step, patch_step, frame_step, num_frames,
    stride_b, stride_t, scale2, cls_weight,
    CLS: tl.constexpr, WIDE: tl.constexpr,
    KEYS: tl.constexpr, PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, L, H D] and lse [B, H, rows] of a sequence of KEYS - 15 to KEYS items: each block of queries meets all
    keys at once."""
    clip, head, sequence, block = place(tl.program_id(0), num_heads, groups, 1)
    D = units * UNIT
    C = num_heads * D
    queries = qkv + clip.to(tl.int64) * (stride_b.to(tl.int64) * UNIT) + head * D
    size = magnitude(scale2)
    k, v, first = (), (), ()
    for i in tl.static_range(KEYS // PIECE):
        piece = load_piece(
            queries + C, C, stride_t, sequence, items, has_cls, sequence_step, patch_step, D,
            i * PIECE, PIECE, CLS, WIDE, BLOCK_K,
        )  # fmt: skip
        k, v, first = k + (piece[0],), v + (piece[1],), first + (i * PIECE,)
    for bit in tl.static_range(1, 4):
        if KEYS & (PIECE >> bit):
            piece = load_piece(
                queries + C, C, stride_t, sequence, items, has_cls, sequence_step, patch_step, D,
                KEYS - KEYS % (PIECE >> bit << 1), PIECE >> bit, CLS, WIDE, BLOCK_K,
            )  # fmt: skip
            k, v, first = k + (piece[0],), v + (piece[1],), first + (KEYS - KEYS % (PIECE >> bit << 1),)
    PIECES: tl.constexpr = len(first)

    BLOCKS: tl.constexpr = (KEYS + BLOCK_M - 1) // BLOCK_M
    start = BLOCK_M % (BLOCKS * BLOCK_M)
    item = start + tl.arange(0, BLOCK_M)
    token, is_cls = tokens_at(sequence, item, has_cls, sequence_step, patch_step, CLS)
    pairs = load_pairs(queries, token, stride_t, item < items, D, BLOCK_K, WIDE)
    m = tl.zeros((BLOCK_M,), tl.float32)
    z, weight = m, m
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for block in range(1, BLOCKS + 1):
        start = tl.where(block < BLOCKS, block * BLOCK_M, 0)
        # No start is past the items. The compiler does not know it, and multiplies the rows by the step in each trip,
        # where it would keep all their products in registers throughout.
        step = tl.where(start > items, 0, patch_step)
        item = start + tl.arange(0, BLOCK_M)
        q = unpaired(pairs, qkv.dtype.element_ty)
        s = ()
        for i in tl.static_range(PIECES):
            s += (scores_of(q, k[i], item, sequence, items, first[i], i == PIECES - 1, CLS),)
        m = tl.max(s[0], 1)
        for i in tl.static_range(1, PIECES):
            m = tl.maximum(m, tl.max(s[i], 1))
        top = m * size
        z = tl.zeros((BLOCK_M,), tl.float32)
        p = ()
        for i in tl.static_range(PIECES):
            weights = weights_of(s[i], top, size)
            z += tl.sum(weights, 1)
            p += (weights.to(v[i].dtype),)
        # All weights before the first sum of values: its registers are those of the scores.
        acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for i in tl.static_range(PIECES):
            acc = dot(p[i], v[i], acc, "ieee")
        # Between the last product and its outputs few registers are taken.
        following = tl.where(block + 1 < BLOCKS, (block + 1) * BLOCK_M, 0) + tl.arange(0, BLOCK_M)
        token, is_cls = tokens_at(sequence, following, has_cls, sequence_step, step, CLS)
        pairs = load_pairs(queries, token, stride_t, following < items, D, BLOCK_K, WIDE)
        token, is_cls = tokens_at(sequence, item, has_cls, sequence_step, step, CLS)
        acc, weight = store_queries(
            out, lse, None, cls_weight,
            acc, m, z, clip, head, sequence + item * 0, token, is_cls, item < items, item < items,
            num_heads, units, num_sequences, items, has_cls, size, CLS, False, WIDE, BLOCK_K,
        )  # fmt: skip
    if CLS != APART:
        store_class_token(
            partials, partial_tops, partial_sums,
            acc, m, z, weight, tl.arange(0, BLOCK_M) == 0, clip, head, sequence, num_heads, units, groups, size,
            CLS, BLOCK_K,
        )  # fmt: skip
