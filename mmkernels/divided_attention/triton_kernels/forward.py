"""The forward pass."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.triton import LN2, LOWEST, dot
from mmkernels.divided_attention.triton_kernels.engine import (
    GLOBAL,
    RUNTIME,
    UNIT,
    first_row,
    first_seen,
    items_at,
    kept,
    keys_seen,
    load_rows,
    magnitude,
    place,
    present_at,
    row_at,
    signed,
    store_partial,
    store_rows,
    tokens_at,
    weights_at,
)


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    qkv, frame_mask, cls_weights, seed, out, lse, partials, partial_tops, partial_sums,
    num_heads, units, num_sequences, items, pack, has_cls, cls, sequence_step, patch_step, frame_step, num_frames,
    stride_b, stride_t, scale2, cls_weight, threshold, keep_scale,
    PACKED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, L, H D] and lse [B, H, rows] of a block of the queries of a group against its keys.

    PACKED: the group is one tile, and a query sees the keys of its own sequence. What a class token takes from the
    group goes to partials [B, groups, H D] (AVERAGED: its outputs times their shares; GLOBAL: sums of values, and to
    partial_tops and partial_sums [B, H, groups] the largest product and the sum of the weights).
    """
    clip, head, group, block = place(tl.program_id(0), num_heads, num_sequences, items, pack, BLOCK_M)
    D = units * UNIT
    C = num_heads * D
    queries = qkv + clip.to(tl.int64) * (stride_b.to(tl.int64) * UNIT) + head * D
    index = block * BLOCK_M + tl.arange(0, BLOCK_M)
    sequence, item, inside = items_at(index, group, num_sequences, items, pack, PACKED)
    token, is_cls = tokens_at(sequence, item, has_cls, cls, sequence_step, patch_step)
    present = present_at(frame_mask, clip, token, is_cls, inside, has_cls, frame_step, num_frames, MASKED)
    first = first_seen(sequence, is_cls, cls)
    # Products are subtracted before they are scaled: near the maximum that rounds nothing.
    size = magnitude(scale2)
    q = signed(load_rows(queries, token, stride_t, present, D, BLOCK_K), scale2)  # [BM, BK]

    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    end = items
    if PACKED:
        end = BLOCK_N
    for start in range(0, end, BLOCK_N):
        key_index = start + tl.arange(0, BLOCK_N)
        key_sequence, key_item, key_inside = items_at(key_index, group, num_sequences, items, pack, PACKED)
        key_token, key_is_cls = tokens_at(key_sequence, key_item, has_cls, cls, sequence_step, patch_step)
        key_present = present_at(
            frame_mask, clip, key_token, key_is_cls, key_inside, has_cls, frame_step, num_frames, MASKED
        )
        k = load_rows(queries + C, key_token, stride_t, key_present, D, BLOCK_K)
        v = load_rows(queries + 2 * C, key_token, stride_t, key_present, D, BLOCK_K)
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), "ieee")  # [BM, BN]
        seen = keys_seen(key_item, key_present)[None, :] >= first[:, None]
        if PACKED:
            seen &= sequence[:, None] == key_sequence[None, :]
        s = tl.where(seen, s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2((s - top[:, None]) * size)
        rescale = tl.exp2((m - top) * size)
        z = z * rescale + tl.sum(p, 1)
        acc *= rescale[:, None]
        if MASKED and threshold != 0:
            query_sequence = tl.where(is_cls & (cls == GLOBAL), 0, sequence)
            keep = kept(
                seed, threshold, key_token[None, :], token[:, None], clip * num_heads + head,
                query_sequence[:, None],
            )  # fmt: skip
            p = tl.where(keep, p * keep_scale, 0.0)
        acc = dot(p.to(v.dtype), v, acc, "ieee")
        m = top

    is_global = is_cls & (cls == GLOBAL)
    acc /= tl.where(is_global, 1.0, z)[:, None]
    lse2 = m * size + tl.log2(z)
    weight = weights_at(cls_weights, cls_weight, clip, sequence, num_sequences, is_cls, present, cls, MASKED)
    absent = weight == 0
    acc = tl.where(absent[:, None], 0.0, acc)
    lse2 = tl.where(absent, float("-inf"), lse2)

    L = has_cls + num_sequences * (items - tl.minimum(cls, 1))
    head_out = out + clip.to(tl.int64) * L * C + head * D
    store_rows(head_out, token, C, inside & (is_cls == 0), D, acc, BLOCK_K)
    first_lse, cls_rows = first_row(clip, head, num_heads, num_sequences, items, cls)
    row = row_at(sequence, token, is_cls, has_cls, cls, cls_rows)
    tl.store(lse + first_lse + row, lse2 * LN2, mask=inside & (is_global == 0))
    if (cls != 0) & (block == 0):
        chosen = inside & is_cls
        groups = tl.cdiv(num_sequences, pack)
        if cls == GLOBAL:
            peak = tl.max(tl.where(chosen, m, LOWEST), 0)
            weight = tl.exp2((m - peak) * size)
            at = (clip.to(tl.int64) * num_heads + head) * groups + group
            tl.store(partial_tops + at, peak)
            tl.store(partial_sums + at, tl.sum(tl.where(chosen, z * weight, 0.0), 0))
        at = partials + (clip.to(tl.int64) * groups + group) * C + head * D
        store_partial(at, chosen, acc * weight[:, None], D, BLOCK_K)
