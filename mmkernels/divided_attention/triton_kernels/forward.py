"""The forward pass: one kernel over packed sequences, one for those that are streamed."""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.triton import LN2, LOWEST, dot
from mmkernels.divided_attention.triton_kernels.engine import (
    APART,
    GLOBAL,
    RUNTIME,
    UNIT,
    first_row,
    first_seen,
    kept,
    keys_seen,
    load_rows,
    magnitude,
    packed_items,
    packed_seen,
    patches_of,
    place,
    present_at,
    row_at,
    signed,
    store_partial,
    store_rows,
    tokens_at,
    weights_at,
)


@triton.jit
def store_queries(
    out, lse, cls_weights, cls_weight,
    acc, m, z, clip, head, sequence, token, is_cls, inside, present,
    num_heads, units, num_sequences, items, has_cls, size,
    CLS: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Write the outputs and log-sum-exps of a tile of queries: acc are sums of values by 2^(size (s - m)), z the sums
    of these weights. Returned: the outputs (the sums as they are, of a GLOBAL class token), and what each counts."""
    D = units * UNIT
    C = num_heads * D
    patch = inside & (is_cls == 0)
    factor = 1.0 / z
    lse2 = m * size + tl.log2(z)
    weight = weights_at(cls_weights, cls_weight, clip, sequence, num_sequences, is_cls, present, CLS, MASKED)
    if CLS == GLOBAL:
        factor = tl.where(is_cls, 1.0, factor)
    acc *= factor[:, None]
    if MASKED:
        absent = weight == 0
        acc = tl.where(absent[:, None], 0.0, acc)
        lse2 = tl.where(absent, float("-inf"), lse2)

    L = has_cls + patches_of(num_sequences, items, CLS)
    head_out = out + clip.to(tl.int64) * L * C + head * D
    store_rows(head_out, token, C, patch, D, acc, HEAD, WIDE)
    first_lse, cls_rows = first_row(clip, head, num_heads, num_sequences, items, CLS)
    row = row_at(sequence, token, is_cls, has_cls, cls_rows, CLS)
    if CLS == GLOBAL:
        tl.store(lse + first_lse + row, lse2 * LN2, mask=patch)
    else:
        tl.store(lse + first_lse + row, lse2 * LN2, mask=inside)
    return acc, weight


@triton.jit
def store_class_token(
    partials, partial_tops, partial_sums,
    acc, m, z, weight, chosen, clip, head, group, num_heads, units, groups, size,
    CLS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Write what the class token takes from a group to partials [B, groups, H D]. AVERAGED: its outputs times their
    shares; GLOBAL: sums of values, and to partial_tops and partial_sums [B, H, groups] the largest product and the sum
    of the weights."""
    D = units * UNIT
    if CLS == GLOBAL:
        peak = tl.max(tl.where(chosen, m, LOWEST), 0)
        weight = tl.exp2((m - peak) * size)
        at = (clip.to(tl.int64) * num_heads + head) * groups + group
        tl.store(partial_tops + at, peak)
        tl.store(partial_sums + at, tl.sum(tl.where(chosen, z * weight, 0.0), 0))
    at = partials + (clip.to(tl.int64) * groups + group) * (num_heads * D) + head * D
    store_partial(at, chosen, acc * weight[:, None], D, HEAD)


@triton.jit
def store_results(
    out, lse, partials, partial_tops, partial_sums, cls_weights, cls_weight,
    acc, m, z, clip, head, group, sequence, token, is_cls, inside, present, owns_cls,
    num_heads, units, num_sequences, items, groups, has_cls, size,
    CLS: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Write what a tile of queries gives, and what the class token takes from the group if the tile holds it."""
    acc, weight = store_queries(
        out, lse, cls_weights, cls_weight,
        acc, m, z, clip, head, sequence, token, is_cls, inside, present,
        num_heads, units, num_sequences, items, has_cls, size, CLS, MASKED, WIDE, HEAD,
    )  # fmt: skip
    if CLS != APART and owns_cls:
        store_class_token(
            partials, partial_tops, partial_sums,
            acc, m, z, weight, inside & is_cls, clip, head, group, num_heads, units, groups, size, CLS, HEAD,
        )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def packed_forward_kernel(
    qkv, frame_mask, cls_weights, seed, out, lse, partials, partial_tops, partial_sums,
    num_heads, units, num_sequences, items, pack, groups, reciprocal, has_cls,
    sequence_step, patch_step, frame_step, num_frames,
    stride_b, stride_t, scale2, cls_weight, threshold, keep_scale,
    CLS: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, L, H D] and lse [B, H, rows] of a group that is one tile: a query sees the keys of its own sequence."""
    clip, head, group, _ = place(tl.program_id(0), num_heads, groups, 1)
    D = units * UNIT
    C = num_heads * D
    queries = qkv + clip.to(tl.int64) * (stride_b.to(tl.int64) * UNIT) + head * D
    index = tl.arange(0, BLOCK_M)
    sequence, item, inside = packed_items(index, group, num_sequences, items, pack, reciprocal)
    token, is_cls = tokens_at(sequence, item, has_cls, sequence_step, patch_step, CLS)
    present = present_at(frame_mask, clip, token, is_cls, inside, has_cls, frame_step, num_frames, MASKED)
    # Products are subtracted before they are scaled: near the maximum that rounds nothing.
    size = magnitude(scale2)
    q = load_rows(queries, token, stride_t, present, D, BLOCK_K, WIDE)
    k = load_rows(queries + C, token, stride_t, present, D, BLOCK_K, WIDE)
    v = load_rows(queries + 2 * C, token, stride_t, present, D, BLOCK_K, WIDE)
    q = signed(q, scale2)

    s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), "ieee")
    s = tl.where(packed_seen(sequence, item, is_cls, present, items, BLOCK_N, CLS, MASKED), s, float("-inf"))
    m = tl.max(s, 1)
    if MASKED or CLS == GLOBAL:  # a row may see nothing: an absent one, the class token past the last sequence
        m = tl.maximum(m, LOWEST)
    p = tl.exp2((s - m[:, None]) * size)
    z = tl.sum(p, 1)
    if MASKED and threshold != 0:
        query_sequence = sequence
        if CLS == GLOBAL:
            query_sequence = tl.where(is_cls, 0, sequence)
        keep = kept(
            seed, threshold, token[None, :], token[:, None], clip * num_heads + head, query_sequence[:, None]
        )  # fmt: skip
        p = tl.where(keep, p * keep_scale, 0.0)
    acc = dot(p.to(v.dtype), v, tl.zeros((BLOCK_M, BLOCK_K), tl.float32), "ieee")
    store_results(
        out, lse, partials, partial_tops, partial_sums, cls_weights, cls_weight,
        acc, m, z, clip, head, group, sequence, token, is_cls, inside, present, True,
        num_heads, units, num_sequences, items, groups, has_cls, size, CLS, MASKED, WIDE, BLOCK_K,
    )  # fmt: skip


@triton.jit(do_not_specialize=RUNTIME)
def forward_kernel(
    qkv, frame_mask, cls_weights, seed, out, lse, partials, partial_tops, partial_sums,
    num_heads, units, num_sequences, items, pack, groups, reciprocal, has_cls,
    sequence_step, patch_step, frame_step, num_frames,
    stride_b, stride_t, scale2, cls_weight, threshold, keep_scale,
    CLS: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out [B, L, H D] and lse [B, H, rows] of a block of the queries of a sequence against its keys."""
    clip, head, sequence, block = place(tl.program_id(0), num_heads, groups, tl.cdiv(items, BLOCK_M))
    D = units * UNIT
    C = num_heads * D
    queries = qkv + clip.to(tl.int64) * (stride_b.to(tl.int64) * UNIT) + head * D
    item = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = item < items
    token, is_cls = tokens_at(sequence, item, has_cls, sequence_step, patch_step, CLS)
    present = present_at(frame_mask, clip, token, is_cls, inside, has_cls, frame_step, num_frames, MASKED)
    first = first_seen(sequence, is_cls, CLS)
    # Products are subtracted before they are scaled: near the maximum that rounds nothing.
    size = magnitude(scale2)
    q = signed(load_rows(queries, token, stride_t, present, D, BLOCK_K, WIDE), scale2)  # [BM, BK]

    m = tl.full((BLOCK_M,), LOWEST, tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, items, BLOCK_N):
        key_item = start + tl.arange(0, BLOCK_N)
        key_token, key_is_cls = tokens_at(sequence, key_item, has_cls, sequence_step, patch_step, CLS)
        key_present = present_at(
            frame_mask, clip, key_token, key_is_cls, key_item < items, has_cls, frame_step, num_frames, MASKED
        )
        k = load_rows(queries + C, key_token, stride_t, key_present, D, BLOCK_K, WIDE)
        v = load_rows(queries + 2 * C, key_token, stride_t, key_present, D, BLOCK_K, WIDE)
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), "ieee")  # [BM, BN]
        s = tl.where(keys_seen(key_item, key_present)[None, :] >= first[:, None], s, float("-inf"))
        top = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2((s - top[:, None]) * size)
        rescale = tl.exp2((m - top) * size)
        z = z * rescale + tl.sum(p, 1)
        acc *= rescale[:, None]
        if MASKED and threshold != 0:
            query_sequence = tl.where(is_cls & (CLS == GLOBAL), 0, sequence)
            keep = kept(
                seed, threshold, key_token[None, :], token[:, None], clip * num_heads + head,
                query_sequence[:, None],
            )  # fmt: skip
            p = tl.where(keep, p * keep_scale, 0.0)
        acc = dot(p.to(v.dtype), v, acc, "ieee")
        m = top
    store_results(
        out, lse, partials, partial_tops, partial_sums, cls_weights, cls_weight,
        acc, m, z, clip, head, sequence, sequence + item * 0, token, is_cls, inside, present, block == 0,
        num_heads, units, num_sequences, items, groups, has_cls, size, CLS, MASKED, WIDE, BLOCK_K,
    )  # fmt: skip
