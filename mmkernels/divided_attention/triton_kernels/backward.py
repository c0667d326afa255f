"""The backward pass: one kernel over packed sequences; for streamed ones, one for the queries and one for the keys.

With weights g of the queries (the share of an averaged class token, 1 for all others) and dropout's factors f:
    dP = f (dO V^T)    delta = rowsum(P dP) = rowsum(dO O)    dS = g P (dP - delta)
    dV = (f g P)^T dO    dK = scale dS^T Q    dQ = scale dS K
Probabilities are divided by their sum once more: what a log-sum-exp lost when it was rounded, a thousandth at scores of
10,000, is in both.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.triton import LOG2E, LOWEST, dot
from mmkernels.divided_attention.triton_kernels.engine import (
    APART,
    AVERAGED,
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
def cls_norm(lse, clip, head, num_heads, num_sequences, items, size):
    """The log-sum-exp of a GLOBAL class token in units of products."""
    row, _ = first_row(clip, head, num_heads, num_sequences, items, GLOBAL)
    return tl.load(lse + row) * LOG2E / size


@triton.jit(do_not_specialize=RUNTIME)
def cls_sums_kernel(
    qkv, lse, frame_mask, sums,
    num_heads, units, num_sequences, items, pack, groups, reciprocal, has_cls,
    sequence_step, patch_step, frame_step, num_frames,
    stride_b, stride_t, scale2,
    MASKED: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """What the probabilities of a GLOBAL class token sum to over the keys of a group: sums [B, H, groups]."""
    clip, head, group, _ = place(tl.program_id(0), num_heads, groups, 1)
    D = units * UNIT
    queries = qkv + clip.to(tl.int64) * (stride_b.to(tl.int64) * UNIT) + head * D
    features = tl.arange(0, HEAD)
    size = magnitude(scale2)
    q = signed(tl.load(queries + features, mask=features < D, other=0.0).to(tl.float32), scale2)
    norm = cls_norm(lse, clip, head, num_heads, num_sequences, items, size)
    z = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, pack * items, BLOCK):
        index = start + tl.arange(0, BLOCK)
        sequence = group * pack + index // items  # a group may be longer than a reciprocal is exact
        inside = (index < pack * items) & (sequence < num_sequences)
        token, is_cls = tokens_at(sequence, index % items, has_cls, sequence_step, patch_step, GLOBAL)
        present = present_at(frame_mask, clip, token, is_cls, inside, has_cls, frame_step, num_frames, MASKED)
        present &= tl.where(is_cls, sequence, 0) == 0
        k = load_rows(queries + num_heads * D, token, stride_t, present, D, HEAD, WIDE).to(tl.float32)
        s = tl.where(present, tl.sum(k * q[None, :], 1), float("-inf"))
        z += tl.exp2((s - norm) * size)
    tl.store(sums + (clip.to(tl.int64) * num_heads + head) * groups + group, tl.sum(z, 0))


@triton.jit(do_not_specialize=RUNTIME)
def packed_backward_kernel(
    grad_out, qkv, out, lse, cls_sums, frame_mask, cls_weights, seed, grad_qkv, partials,
    num_heads, units, num_sequences, items, pack, groups, reciprocal, has_cls,
    sequence_step, patch_step, frame_step, num_frames,
    stride_ob, stride_ot, stride_b, stride_t, scale2, scale, cls_weight, threshold, keep_scale,
    CLS: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """grad_qkv [B, L, 3 H D] of a group that is one tile; the class token's part to partials [B, groups, 3 H D].

    The tile holds whole rows: their maxima, sums and deltas are made anew, and neither out nor lse is read but for the
    row of a GLOBAL class token, which spans all groups: cls_sums [B, H] are the sums of its probabilities.
    """
    clip, head, group, _ = place(tl.program_id(0), num_heads, groups, 1)
    D = units * UNIT
    C = num_heads * D
    queries = qkv + clip.to(tl.int64) * (stride_b.to(tl.int64) * UNIT) + head * D
    grads = grad_out + clip.to(tl.int64) * (stride_ob.to(tl.int64) * UNIT) + head * D
    index = tl.arange(0, BLOCK_M)
    sequence, item, inside = packed_items(index, group, num_sequences, items, pack, reciprocal)
    token, is_cls = tokens_at(sequence, item, has_cls, sequence_step, patch_step, CLS)
    present = present_at(frame_mask, clip, token, is_cls, inside, has_cls, frame_step, num_frames, MASKED)
    size = magnitude(scale2)
    q = load_rows(queries, token, stride_t, present, D, BLOCK_K, WIDE)
    k = load_rows(queries + C, token, stride_t, present, D, BLOCK_K, WIDE)
    v = load_rows(queries + 2 * C, token, stride_t, present, D, BLOCK_K, WIDE)
    grad = load_rows(grads, token, stride_ot, present, D, BLOCK_K, WIDE)
    q = signed(q, scale2)

    zeros = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    s = dot(q, tl.trans(k), zeros, "ieee")
    s = tl.where(packed_seen(sequence, item, is_cls, present, items, BLOCK_M, CLS, MASKED), s, float("-inf"))
    m = tl.max(s, 1)
    if MASKED or CLS == GLOBAL:  # a row may see nothing: an absent one, the class token past the last sequence
        m = tl.maximum(m, LOWEST)
    L = has_cls + patches_of(num_sequences, items, CLS)
    if CLS == GLOBAL:
        m = tl.where(is_cls & inside, cls_norm(lse, clip, head, num_heads, num_sequences, items, size), m)
    p = tl.exp2((s - m[:, None]) * size)
    z = tl.sum(p, 1)
    if CLS == GLOBAL:
        z = tl.where(is_cls, tl.load(cls_sums + clip * num_heads + head), z)

    dp = dot(grad, tl.trans(v), zeros, "ieee")
    weight = weights_at(cls_weights, cls_weight, clip, sequence, num_sequences, is_cls, present, CLS, MASKED)
    normal = 1.0 / z
    if MASKED:
        normal = tl.where(weight == 0, 0.0, normal)
    if MASKED and threshold != 0:
        query_sequence = sequence
        if CLS == GLOBAL:
            query_sequence = tl.where(is_cls, 0, sequence)
        keep = kept(seed, threshold, token[None, :], token[:, None], clip * num_heads + head, query_sequence[:, None])
        dp = tl.where(keep, dp * keep_scale, 0.0)
        delta = tl.sum(p * dp, 1) * normal
        p *= (normal * weight)[:, None]
        dropped = tl.where(keep, p * keep_scale, 0.0).to(q.dtype)
    else:
        delta = tl.sum(p * dp, 1) * normal
        p *= (normal * weight)[:, None]
        dropped = p.to(q.dtype)
    if CLS == GLOBAL:
        features = tl.arange(0, BLOCK_K)
        cls_out = tl.load(out + clip.to(tl.int64) * L * C + head * D + features, mask=features < D, other=0.0)
        cls_grad = tl.load(grads + features, mask=features < D, other=0.0)
        delta = tl.where(is_cls, tl.sum(cls_out.to(tl.float32) * cls_grad.to(tl.float32), 0), delta)
    ds = (p * (dp - delta[:, None])).to(q.dtype)

    zeros = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    stride = 3 * C
    to = grad_qkv + clip.to(tl.int64) * L * stride + head * D
    part = partials + (clip.to(tl.int64) * groups + group) * stride + head * D
    chosen = inside & is_cls
    patch = inside & (is_cls == 0)
    dv = dot(tl.trans(dropped), grad, zeros, "ieee")
    store_rows(to + 2 * C, token, stride, patch, D, dv, BLOCK_K, WIDE)
    if CLS != APART:
        store_partial(part + 2 * C, chosen, dv, D, BLOCK_K)
    dk = signed(dot(tl.trans(ds), q, zeros, "ieee"), scale2) * scale
    store_rows(to + C, token, stride, patch, D, dk, BLOCK_K, WIDE)
    if CLS != APART:
        store_partial(part + C, chosen, dk, D, BLOCK_K)
    dq = dot(ds, k, zeros, "ieee") * scale
    store_rows(to, token, stride, patch, D, dq, BLOCK_K, WIDE)
    if CLS != APART:
        store_partial(part, chosen, dq, D, BLOCK_K)


@triton.jit(do_not_specialize=RUNTIME)
def grad_queries_kernel(
    grad_out, qkv, out, lse, cls_sums, frame_mask, cls_weights, seed, grad_qkv, partials, statistics,
    num_heads, units, num_sequences, items, pack, groups, reciprocal, has_cls,
    sequence_step, patch_step, frame_step, num_frames,
    stride_ob, stride_ot, stride_b, stride_t, scale2, scale, cls_weight, threshold, keep_scale,
    CLS: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries, and what the keys' kernel needs of them: statistics [3, B H S, items], in float32.

    These are the log-sum-exp in units of products, the factor that makes 2^(size (s - lse)) the weighted
    probability, and delta.
    """
    clip, head, sequence, block = place(tl.program_id(0), num_heads, groups, tl.cdiv(items, BLOCK_M))
    D = units * UNIT
    C = num_heads * D
    L = has_cls + patches_of(num_sequences, items, CLS)
    queries = qkv + clip.to(tl.int64) * (stride_b.to(tl.int64) * UNIT) + head * D
    grads = grad_out + clip.to(tl.int64) * (stride_ob.to(tl.int64) * UNIT) + head * D
    item = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = item < items
    token, is_cls = tokens_at(sequence, item, has_cls, sequence_step, patch_step, CLS)
    present = present_at(frame_mask, clip, token, is_cls, inside, has_cls, frame_step, num_frames, MASKED)
    first = first_seen(sequence, is_cls, CLS)
    weight = weights_at(cls_weights, cls_weight, clip, sequence + item * 0, num_sequences, is_cls, present, CLS, MASKED)
    first_lse, cls_rows = first_row(clip, head, num_heads, num_sequences, items, CLS)
    row = row_at(sequence, token, is_cls, has_cls, cls_rows, CLS)
    size = magnitude(scale2)
    # A row without an output has a log-sum-exp of -inf, but no probability.
    norm = tl.load(lse + first_lse + row, mask=weight != 0, other=float("inf")) * LOG2E / size
    q = signed(load_rows(queries, token, stride_t, present, D, BLOCK_K, WIDE), scale2)
    grad = load_rows(grads, token, stride_ot, present, D, BLOCK_K, WIDE)
    o = load_rows(out + clip.to(tl.int64) * L * C + head * D, token, num_heads * units, present, D, BLOCK_K, WIDE)
    delta = tl.sum(grad.to(tl.float32) * o.to(tl.float32), 1)

    if CLS == AVERAGED and block == 0:
        # out holds only the mean of an averaged class token: its delta in this sequence takes a pass of its own.
        features = tl.arange(0, BLOCK_K)
        cls_q = signed(tl.load(queries + features, mask=features < D, other=0.0).to(tl.float32), scale2)
        cls_grad = tl.load(grads + features, mask=features < D, other=0.0).to(tl.float32)
        own_norm = tl.max(tl.where(is_cls, norm, float("-inf")), 0)
        cls_z = 0.0
        cls_delta = 0.0
        for start in range(0, items, BLOCK_N):
            key_item = start + tl.arange(0, BLOCK_N)
            key_token, key_is_cls = tokens_at(sequence, key_item, has_cls, sequence_step, patch_step, CLS)
            key_present = present_at(
                frame_mask, clip, key_token, key_is_cls, key_item < items, has_cls, frame_step, num_frames, MASKED
            )
            k = load_rows(queries + C, key_token, stride_t, key_present, D, BLOCK_K, WIDE).to(tl.float32)
            v = load_rows(queries + 2 * C, key_token, stride_t, key_present, D, BLOCK_K, WIDE).to(tl.float32)
            s = tl.where(key_present, tl.sum(k * cls_q[None, :], 1), float("-inf"))
            p = tl.exp2((s - own_norm) * size)
            dp = tl.sum(v * cls_grad[None, :], 1)
            if MASKED and threshold != 0:
                keep = kept(seed, threshold, key_token, 0, clip * num_heads + head, sequence)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            cls_z += tl.sum(p, 0)
            cls_delta += tl.sum(p * dp, 0)
        delta = tl.where(is_cls, cls_delta / tl.where(cls_z == 0, 1.0, cls_z), delta)

    z = tl.zeros((BLOCK_M,), tl.float32)
    dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, items, BLOCK_N):
        key_item = start + tl.arange(0, BLOCK_N)
        key_token, key_is_cls = tokens_at(sequence, key_item, has_cls, sequence_step, patch_step, CLS)
        key_present = present_at(
            frame_mask, clip, key_token, key_is_cls, key_item < items, has_cls, frame_step, num_frames, MASKED
        )
        k = load_rows(queries + C, key_token, stride_t, key_present, D, BLOCK_K, WIDE)
        v = load_rows(queries + 2 * C, key_token, stride_t, key_present, D, BLOCK_K, WIDE)
        s = dot(q, tl.trans(k), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), "ieee")
        seen = keys_seen(key_item, key_present)[None, :] >= first[:, None]
        p = tl.exp2((tl.where(seen, s, float("-inf")) - norm[:, None]) * size)
        z += tl.sum(p, 1)
        dp = dot(grad, tl.trans(v), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), "ieee")
        if MASKED and threshold != 0:
            query_sequence = tl.where(is_cls & (CLS == GLOBAL), 0, sequence)
            keep = kept(
                seed, threshold, key_token[None, :], token[:, None], clip * num_heads + head,
                query_sequence[:, None],
            )  # fmt: skip
            dp = tl.where(keep, dp * keep_scale, 0.0)
        ds = p * (dp - delta[:, None])
        dq = dot(ds.to(k.dtype), k, dq, "ieee")

    if CLS == GLOBAL:  # of whose keys this is but a part
        z = tl.where(is_cls, tl.load(cls_sums + clip * num_heads + head), z)
    factor = weight / tl.where(weight == 0, 1.0, z)
    dq *= (factor * scale)[:, None]
    to = grad_qkv + clip.to(tl.int64) * L * (3 * C) + head * D
    store_rows(to, token, 3 * C, inside & (is_cls == 0), D, dq, BLOCK_K, WIDE)
    if CLS != APART and block == 0:
        at = partials + (clip.to(tl.int64) * num_sequences + sequence) * (3 * C) + head * D
        store_partial(at, inside & is_cls, dq, D, BLOCK_K)
    sequences = clip.to(tl.int64) * num_heads * num_sequences
    plane = (tl.num_programs(0) // tl.cdiv(items, BLOCK_M)).to(tl.int64) * items
    at = statistics + (sequences + head * num_sequences + sequence) * items + item
    tl.store(at, norm, mask=inside)
    tl.store(at + plane, factor, mask=inside)
    tl.store(at + 2 * plane, delta, mask=inside)


@triton.jit(do_not_specialize=RUNTIME)
def grad_keys_kernel(
    grad_out, qkv, frame_mask, seed, statistics, grad_qkv, partials,
    num_heads, units, num_sequences, items, pack, groups, reciprocal, has_cls,
    sequence_step, patch_step, frame_step, num_frames,
    stride_ob, stride_ot, stride_b, stride_t, scale2, scale, threshold, keep_scale,
    CLS: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of BLOCK_M keys, from tiles of scores that lie transposed: keys by queries."""
    clip, head, sequence, block = place(tl.program_id(0), num_heads, groups, tl.cdiv(items, BLOCK_M))
    D = units * UNIT
    C = num_heads * D
    L = has_cls + patches_of(num_sequences, items, CLS)
    queries = qkv + clip.to(tl.int64) * (stride_b.to(tl.int64) * UNIT) + head * D
    grads = grad_out + clip.to(tl.int64) * (stride_ob.to(tl.int64) * UNIT) + head * D
    item = block * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = item < items
    token, is_cls = tokens_at(sequence, item, has_cls, sequence_step, patch_step, CLS)
    present = present_at(frame_mask, clip, token, is_cls, inside, has_cls, frame_step, num_frames, MASKED)
    size = magnitude(scale2)
    k = signed(load_rows(queries + C, token, stride_t, present, D, BLOCK_K, WIDE), scale2)
    v = load_rows(queries + 2 * C, token, stride_t, present, D, BLOCK_K, WIDE)
    item_seen = keys_seen(item, present)

    sequences = clip.to(tl.int64) * num_heads * num_sequences
    plane = (tl.num_programs(0) // tl.cdiv(items, BLOCK_M)).to(tl.int64) * items
    of_sequence = statistics + (sequences + head * num_sequences + sequence) * items
    dk = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, items, BLOCK_N):
        query_item = start + tl.arange(0, BLOCK_N)
        query_inside = query_item < items
        query_token, query_is_cls = tokens_at(sequence, query_item, has_cls, sequence_step, patch_step, CLS)
        query_present = present_at(
            frame_mask, clip, query_token, query_is_cls, query_inside, has_cls, frame_step, num_frames, MASKED
        )
        norm = tl.load(of_sequence + query_item, mask=query_inside, other=float("inf"))
        factor = tl.load(of_sequence + plane + query_item, mask=query_inside, other=0.0)
        delta = tl.load(of_sequence + 2 * plane + query_item, mask=query_inside, other=0.0)
        q = load_rows(queries, query_token, stride_t, query_present, D, BLOCK_K, WIDE)
        grad = load_rows(grads, query_token, stride_ot, query_present, D, BLOCK_K, WIDE)
        s = dot(k, tl.trans(q), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), "ieee")
        seen = item_seen[:, None] >= first_seen(sequence, query_is_cls, CLS)[None, :]
        p = tl.exp2((tl.where(seen, s, float("-inf")) - norm[None, :]) * size) * factor[None, :]
        dp = dot(v, tl.trans(grad), tl.zeros((BLOCK_M, BLOCK_N), tl.float32), "ieee")
        dropped = p
        if MASKED and threshold != 0:
            query_sequence = tl.where(query_is_cls & (CLS == GLOBAL), 0, sequence)
            keep = kept(
                seed, threshold, token[:, None], query_token[None, :], clip * num_heads + head,
                query_sequence[None, :],
            )  # fmt: skip
            dropped = tl.where(keep, p * keep_scale, 0.0)
            dp = tl.where(keep, dp * keep_scale, 0.0)
        dv = dot(dropped.to(grad.dtype), grad, dv, "ieee")
        ds = p * (dp - delta[None, :])
        dk = dot(ds.to(q.dtype), q, dk, "ieee")

    dk *= scale
    stride = 3 * C
    to = grad_qkv + clip.to(tl.int64) * L * stride + head * D
    store_rows(to + C, token, stride, inside & (is_cls == 0), D, dk, BLOCK_K, WIDE)
    store_rows(to + 2 * C, token, stride, inside & (is_cls == 0), D, dv, BLOCK_K, WIDE)
    if CLS != APART and block == 0:
        at = partials + (clip.to(tl.int64) * num_sequences + sequence) * stride + head * D
        store_partial(at + C, inside & is_cls, dk, D, BLOCK_K)
        store_partial(at + 2 * C, inside & is_cls, dv, D, BLOCK_K)
