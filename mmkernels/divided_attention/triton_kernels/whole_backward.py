"""The backward pass over sequences that fit shared memory whole: a kernel for the queries and one for the keys.

As in whole.py a program owns a sequence and a head, holds one side of it in shared memory in pieces, and walks over
blocks of the other side: the kernel of the queries holds keys and values, that of the keys holds queries and gradients.
They hand over what the streamed kernels do (backward.py).

In the kernel of the keys the scores lie transposed, and what belongs to a query is a number for each column: a thread
would need 16 of them for each of norm, factor and delta in every piece. They are rows of the products instead: each is
the sum of three bfloat16 numbers, exactly, and sixteen ones beside the features of a key add them up in float32.
"""

# Tuples of pieces grow in loops that the compiler unrolls.
# mypy: disallow-untyped-defs=False, check-untyped-defs=False, disable-error-code="misc,assignment"
# ruff: noqa: RUF005

import triton
import triton.language as tl

from mmkernels._tiles.triton import LOG2E, dot
from mmkernels.divided_attention.triton_kernels.engine import (
    APART,
    AVERAGED,
    GLOBAL,
    RUNTIME,
    UNIT,
    first_row,
    load_rows,
    magnitude,
    patches_of,
    place,
    row_at,
    store_partial,
    store_rows,
    tokens_at,
    weights_at,
)
from mmkernels.divided_attention.triton_kernels.whole import load_pairs, scores_of, unpaired, weights_of

DEPTH = tl.constexpr(16)  # of the smallest product


@triton.jit
def class_delta(q, grad, k, v, norm, item, items, size):
    """Sums over a piece of keys of the probabilities of the class token and of their products with dP, of an AVERAGED
    one: out holds only the mean of its outputs over the sequences."""
    s = tl.where(item < items, tl.sum(k.to(tl.float32) * q[None, :], 1), float("-inf"))
    p = tl.exp2((s - norm) * size)
    return tl.sum(p, 0), tl.sum(p * tl.sum(v.to(tl.float32) * grad[None, :], 1), 0)


@triton.jit(do_not_specialize=RUNTIME)
def whole_grad_queries_kernel(
    grad_out, qkv, out, lse, cls_sums, grad_qkv, partials, statistics,
    num_heads, units, num_sequences, items, pack, groups, reciprocal, has_cls,
    sequence_step, patch_step, frame_step, num_frames,
    stride_ob, stride_ot, stride_b, stride_t, scale2, scale, cls_weight,
    CLS: tl.constexpr, WIDE: tl.constexpr,
    KEYS: tl.constexpr, PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dQ of a sequence of KEYS - 15 to KEYS items, and of each query what the keys' kernel needs: statistics [3, B H S,
    items], in float32. These are the log-sum-exp in units of products, log2 of the factor that makes 2^(size (s - lse))
    the weighted probability over size, and delta."""
    clip, head, sequence, block = place(tl.program_id(0), num_heads, groups, 1)
    D = units * UNIT
    C = num_heads * D
    L = has_cls + patches_of(num_sequences, items, CLS)
    queries = qkv + clip.to(tl.int64) * (stride_b.to(tl.int64) * UNIT) + head * D
    grads = grad_out + clip.to(tl.int64) * (stride_ob.to(tl.int64) * UNIT) + head * D
    outs = out + clip.to(tl.int64) * L * C + head * D
    first_lse, cls_rows = first_row(clip, head, num_heads, num_sequences, items, CLS)
    size = magnitude(scale2)
    cls_z, cls_delta = 0.0, 0.0
    if CLS == AVERAGED:
        features = tl.arange(0, BLOCK_K)
        cls_q = tl.load(queries + features, mask=features < D, other=0.0).to(tl.float32)
        cls_grad = tl.load(grads + features, mask=features < D, other=0.0).to(tl.float32)
        own_norm = tl.load(lse + first_lse + sequence) * LOG2E / size
    k, v, first = (), (), ()
    for bit in tl.static_range(4):
        for i in tl.static_range(KEYS // PIECE if bit == 0 else KEYS // (PIECE >> bit) % 2):
            key = (KEYS - KEYS % (PIECE >> bit << 1) if bit else i * PIECE) + tl.arange(0, PIECE >> bit)
            token, is_cls = tokens_at(sequence, key, has_cls, sequence_step, patch_step, CLS)
            one_k = load_rows(queries + C, token, stride_t, key < items, D, BLOCK_K, WIDE)
            one_v = load_rows(queries + 2 * C, token, stride_t, key < items, D, BLOCK_K, WIDE)
            if CLS == AVERAGED:
                part, part_delta = class_delta(cls_q, cls_grad, one_k, one_v, own_norm, key, items, size)
                cls_z += part
                cls_delta += part_delta
            k, v = k + (one_k,), v + (one_v,)
            first = first + (KEYS - KEYS % (PIECE >> bit << 1) if bit else i * PIECE,)
    PIECES: tl.constexpr = len(first)

    BLOCKS: tl.constexpr = (KEYS + BLOCK_M - 1) // BLOCK_M
    start = items * 0
    item = BLOCK_M % (BLOCKS * BLOCK_M) + tl.arange(0, BLOCK_M)
    token, is_cls = tokens_at(sequence, item, has_cls, sequence_step, patch_step, CLS)
    q_pairs = load_pairs(queries, token, stride_t, item < items, D, BLOCK_K, WIDE)
    grad_pairs = load_pairs(grads, token, stride_ot, item < items, D, BLOCK_K, WIDE)
    out_pairs = load_pairs(outs, token, num_heads * units, item < items, D, BLOCK_K, WIDE)
    plane = tl.num_programs(0).to(tl.int64) * items
    at = statistics + ((clip.to(tl.int64) * num_heads + head) * num_sequences + sequence) * items
    dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for block in range(1, BLOCKS + 1):
        start = tl.where(block < BLOCKS, block * BLOCK_M, 0)
        # No start is past the items: see whole.py.
        step = tl.where(start > items, 0, patch_step)
        item = start + tl.arange(0, BLOCK_M)
        inside = item < items
        token, is_cls = tokens_at(sequence, item, has_cls, sequence_step, step, CLS)
        weight = weights_at(
            None, cls_weight, clip, sequence + item * 0, num_sequences, is_cls, inside, CLS, False
        )  # fmt: skip
        row = row_at(sequence, token, is_cls, has_cls, cls_rows, CLS)
        norm = tl.load(lse + first_lse + row, mask=inside, other=float("inf")) * LOG2E / size
        grad = unpaired(grad_pairs, qkv.dtype.element_ty)
        delta = tl.sum(grad.to(tl.float32) * unpaired(out_pairs, qkv.dtype.element_ty).to(tl.float32), 1)
        if CLS == AVERAGED:
            delta = tl.where(is_cls, cls_delta / cls_z, delta)
        q = unpaired(q_pairs, qkv.dtype.element_ty)
        top = norm * size
        z = tl.zeros((BLOCK_M,), tl.float32)
        dq = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for i in tl.static_range(PIECES):
            p = weights_of(scores_of(q, k[i], item, sequence, items, first[i], i == PIECES - 1, CLS), top, size)
            z += tl.sum(p, 1)
            dp = dot(grad, tl.trans(v[i]), tl.zeros((BLOCK_M, v[i].shape[0]), tl.float32), "ieee")
            dq = dot((p * (dp - delta[:, None])).to(k[i].dtype), k[i], dq, "ieee")

        following = tl.where(block + 1 < BLOCKS, (block + 1) * BLOCK_M, 0) + tl.arange(0, BLOCK_M)
        next_token, _next_is_cls = tokens_at(sequence, following, has_cls, sequence_step, step, CLS)
        q_pairs = load_pairs(queries, next_token, stride_t, following < items, D, BLOCK_K, WIDE)
        grad_pairs = load_pairs(grads, next_token, stride_ot, following < items, D, BLOCK_K, WIDE)
        out_pairs = load_pairs(outs, next_token, num_heads * units, following < items, D, BLOCK_K, WIDE)
        if CLS == GLOBAL:  # of whose keys this is but a part
            z = tl.where(is_cls, tl.load(cls_sums + clip * num_heads + head), z)
        factor = weight / tl.where(inside, z, 1.0)
        dq *= (factor * scale)[:, None]
        to = grad_qkv + clip.to(tl.int64) * L * (3 * C) + head * D
        store_rows(to, token, 3 * C, inside & (is_cls == 0), D, dq, BLOCK_K, WIDE)
        # The keys' kernel subtracts norm before it scales: factor takes what the rounding of top adds to weights here.
        rounding = tl.fma(norm, tl.zeros_like(norm) + size, -top)
        tl.store(at + item, norm, mask=inside)
        tl.store(at + plane + item, (tl.log2(factor) + rounding) / size, mask=inside)
        tl.store(at + 2 * plane + item, delta, mask=inside)
    if CLS != APART:
        # The same place again: to the compiler another one, for which it holds nothing throughout the loop.
        other = (start > items).to(tl.int32)
        clip, head, sequence, block = place(tl.program_id(0) + other, num_heads, groups, 1)
        part = partials + (clip.to(tl.int64) * (num_sequences + other) + sequence) * (3 * C + other) + head * D
        store_partial(part, tl.arange(0, BLOCK_M) == 0, dq, D, BLOCK_K)


@triton.jit
def parted(x):
    """Three bfloat16 numbers whose sum is x."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def as_rows(x, y):
    """[DEPTH, n]: the parts of the vectors x and y; sixteen ones times a column are x + y."""
    row = tl.arange(0, DEPTH)[:, None]
    x0, x1, x2 = parted(x)
    y0, y1, y2 = parted(y)
    low = tl.where(row == 0, x0[None, :], tl.where(row == 1, x1[None, :], x2[None, :]))
    high = tl.where(row == 3, y0[None, :], tl.where(row == 4, y1[None, :], y2[None, :]))
    return tl.where(row < 3, low, tl.where(row < 6, high, 0.0)).to(tl.bfloat16)


@triton.jit(do_not_specialize=RUNTIME)
def whole_grad_keys_kernel(
    grad_out, qkv, statistics, grad_qkv, partials,
    num_heads, units, num_sequences, items, pack, groups, reciprocal, has_cls,
    sequence_step, patch_step, frame_step, num_frames,
    stride_ob, stride_ot, stride_b, stride_t, scale2, scale,
    CLS: tl.constexpr, WIDE: tl.constexpr,
    KEYS: tl.constexpr, PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dK and dV of a sequence of KEYS - 15 to KEYS items, from tiles of scores that lie transposed: keys by queries."""
    clip, head, sequence, block = place(tl.program_id(0), num_heads, groups, 1)
    D = units * UNIT
    C = num_heads * D
    L = has_cls + patches_of(num_sequences, items, CLS)
    queries = qkv + clip.to(tl.int64) * (stride_b.to(tl.int64) * UNIT) + head * D
    grads = grad_out + clip.to(tl.int64) * (stride_ob.to(tl.int64) * UNIT) + head * D
    size = magnitude(scale2)
    plane = tl.num_programs(0).to(tl.int64) * items
    at = statistics + ((clip.to(tl.int64) * num_heads + head) * num_sequences + sequence) * items
    q, grad, norms, deltas, first = (), (), (), (), ()
    for bit in tl.static_range(4):
        for i in tl.static_range(KEYS // PIECE if bit == 0 else KEYS // (PIECE >> bit) % 2):
            query = (KEYS - KEYS % (PIECE >> bit << 1) if bit else i * PIECE) + tl.arange(0, PIECE >> bit)
            real = query < items
            query_token, _ = tokens_at(sequence, query, has_cls, sequence_step, patch_step, CLS)
            q = q + (load_rows(queries, query_token, stride_t, real, D, BLOCK_K, WIDE),)
            grad = grad + (load_rows(grads, query_token, stride_ot, real, D, BLOCK_K, WIDE),)
            # Queries past the end are zeros, and so is all that they give: their weights may be any numbers.
            norm = tl.load(at + query, mask=real, other=0.0)
            factor = tl.load(at + plane + query, mask=real, other=0.0)
            delta = tl.load(at + 2 * plane + query, mask=real, other=0.0)
            norms = norms + (as_rows(-norm, factor),)
            deltas = deltas + (as_rows(-delta, tl.zeros_like(delta)),)
            first = first + (KEYS - KEYS % (PIECE >> bit << 1) if bit else i * PIECE,)
    PIECES: tl.constexpr = len(first)
    ones = tl.full((BLOCK_M, DEPTH), 1.0, tl.float32).to(tl.bfloat16)

    BLOCKS: tl.constexpr = (KEYS + BLOCK_M - 1) // BLOCK_M
    start = items * 0
    item = BLOCK_M % (BLOCKS * BLOCK_M) + tl.arange(0, BLOCK_M)
    token, is_cls = tokens_at(sequence, item, has_cls, sequence_step, patch_step, CLS)
    k_pairs = load_pairs(queries + C, token, stride_t, item < items, D, BLOCK_K, WIDE)
    v_pairs = load_pairs(queries + 2 * C, token, stride_t, item < items, D, BLOCK_K, WIDE)
    dk = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    dv = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for block in range(1, BLOCKS + 1):
        start = tl.where(block < BLOCKS, block * BLOCK_M, 0)
        step = tl.where(start > items, 0, patch_step)
        item = start + tl.arange(0, BLOCK_M)
        inside = item < items
        k = unpaired(k_pairs, qkv.dtype.element_ty)
        v = unpaired(v_pairs, qkv.dtype.element_ty)
        dk = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        dv = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
        for i in tl.static_range(PIECES):
            zeros = tl.zeros((BLOCK_M, q[i].shape[0]), tl.float32)
            s = dot(k, tl.trans(q[i]), dot(ones, norms[i], zeros, "ieee"), "ieee")
            if CLS == GLOBAL and first[i] == 0:  # the class token meets itself in the first sequence alone
                own = (tl.arange(0, q[i].shape[0])[None, :] == 0) & (item[:, None] == 0) & (sequence > 0)
                s = tl.where(own, float("-inf"), s)
            p = tl.exp2(s * size)
            dp = dot(v, tl.trans(grad[i]), dot(ones, deltas[i], zeros, "ieee"), "ieee")
            ds = (p * dp).to(q[i].dtype)
            dv = dot(p.to(grad[i].dtype), grad[i], dv, "ieee")
            dk = dot(ds, q[i], dk, "ieee")

        following = tl.where(block + 1 < BLOCKS, (block + 1) * BLOCK_M, 0) + tl.arange(0, BLOCK_M)
        token, is_cls = tokens_at(sequence, following, has_cls, sequence_step, step, CLS)
        k_pairs = load_pairs(queries + C, token, stride_t, following < items, D, BLOCK_K, WIDE)
        v_pairs = load_pairs(queries + 2 * C, token, stride_t, following < items, D, BLOCK_K, WIDE)
        token, is_cls = tokens_at(sequence, item, has_cls, sequence_step, step, CLS)
        dk *= scale
        to = grad_qkv + clip.to(tl.int64) * L * (3 * C) + head * D
        store_rows(to + C, token, 3 * C, inside & (is_cls == 0), D, dk, BLOCK_K, WIDE)
        store_rows(to + 2 * C, token, 3 * C, inside & (is_cls == 0), D, dv, BLOCK_K, WIDE)
    if CLS != APART:
        # The same place again: to the compiler another one, for which it holds nothing throughout the loop.
        other = (start > items).to(tl.int32)
        clip, head, sequence, block = place(tl.program_id(0) + other, num_heads, groups, 1)
        part = partials + (clip.to(tl.int64) * (num_sequences + other) + sequence) * (3 * C + other) + head * D
        store_partial(part + C, tl.arange(0, BLOCK_M) == 0, dk, D, BLOCK_K)
        store_partial(part + 2 * C, tl.arange(0, BLOCK_M) == 0, dv, D, BLOCK_K)
