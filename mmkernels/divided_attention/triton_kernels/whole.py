"""The forward pass over sequences whose keys stay in shared memory, whole: neither packed nor streamed.

A program owns a sequence and a head. It loads the keys and values once, in pieces whose sizes are powers of two and add
up to the next multiple of 16, and walks over blocks of the queries, each of which meets all keys at once: no maximum
runs. 197 keys are 128 + 64 + 16, where steps of 64 take 256, and only the last piece is masked. This is for half
precision; frame masks and dropout are left to the streamed kernel.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.triton import dot
from mmkernels.divided_attention.triton_kernels.engine import (
    GLOBAL,
    RUNTIME,
    UNIT,
    load_rows,
    magnitude,
    place,
    signed,
    tokens_at,
)
from mmkernels.divided_attention.triton_kernels.forward import store_results


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


@triton.jit(do_not_specialize=RUNTIME)
def whole_forward_kernel(
    qkv, out, lse, partials, partial_tops, partial_sums,
    num_heads, units, num_sequences, items, pack, groups, reciprocal, has_cls,
    sequence_step, patch_step, frame_step, num_frames,
    stride_b, stride_t, scale2, cls_weight,
    CLS: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, L, H D] and lse [B, H, rows] of a sequence: each block of queries meets all keys at once."""
    clip, head, sequence, _ = place(tl.program_id(0), num_heads, groups, 1)
    D = units * UNIT
    C = num_heads * D
    queries = qkv + clip.to(tl.int64) * (stride_b.to(tl.int64) * UNIT) + head * D
    keys = queries + C
    size = magnitude(scale2)
    k0, v0 = load_piece(
        keys, C, stride_t, sequence, items, has_cls, sequence_step, patch_step, D,
        0, P0, CLS, WIDE, BLOCK_K,
    )  # fmt: skip
    if P1 > 0:
        k1, v1 = load_piece(
            keys, C, stride_t, sequence, items, has_cls, sequence_step, patch_step, D,
            P0, P1, CLS, WIDE, BLOCK_K,
        )  # fmt: skip
    if P2 > 0:
        k2, v2 = load_piece(
            keys, C, stride_t, sequence, items, has_cls, sequence_step, patch_step, D,
            P0 + P1, P2, CLS, WIDE, BLOCK_K,
        )  # fmt: skip
    k0 = signed(k0, scale2)
    if P1 > 0:
        k1 = signed(k1, scale2)
    if P2 > 0:
        k2 = signed(k2, scale2)
    for start in range(0, items, BLOCK_M):
        item = start + tl.arange(0, BLOCK_M)
        inside = item < items
        token, is_cls = tokens_at(sequence, item, has_cls, sequence_step, patch_step, CLS)
        q = load_rows(queries, token, stride_t, inside, D, BLOCK_K, WIDE)
        s0 = scores_of(q, k0, item, sequence, items, 0, P1 == 0, CLS)
        m = tl.max(s0, 1)
        if P1 > 0:
            s1 = scores_of(q, k1, item, sequence, items, P0, P2 == 0, CLS)
            m = tl.maximum(m, tl.max(s1, 1))
        if P2 > 0:
            s2 = scores_of(q, k2, item, sequence, items, P0 + P1, True, CLS)
            m = tl.maximum(m, tl.max(s2, 1))
        p0 = tl.exp2((s0 - m[:, None]) * size)
        z = tl.sum(p0, 1)
        acc = dot(p0.to(v0.dtype), v0, tl.zeros((BLOCK_M, BLOCK_K), tl.float32), "ieee")
        if P1 > 0:
            p1 = tl.exp2((s1 - m[:, None]) * size)
            z += tl.sum(p1, 1)
            acc = dot(p1.to(v0.dtype), v1, acc, "ieee")
        if P2 > 0:
            p2 = tl.exp2((s2 - m[:, None]) * size)
            z += tl.sum(p2, 1)
            acc = dot(p2.to(v0.dtype), v2, acc, "ieee")
        store_results(
            out, lse, partials, partial_tops, partial_sums, None, cls_weight,
            acc, m, z, clip, head, sequence, sequence + item * 0, token, is_cls, inside, inside, start == 0,
            num_heads, units, num_sequences, items, groups, has_cls, size, CLS, False, WIDE, BLOCK_K,
        )  # fmt: skip
