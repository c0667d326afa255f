"""The two kernels that most is published about: attention with an online softmax, and a matrix product.

Sizes are multiples of the tiles: no masks. They are compiled and never run.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl


@triton.jit
def attention_kernel(
    queries, keys, values, out, length, scale2,
    HEAD: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """FlashAttention-2 forward without a mask: one block of queries of one head, [heads, length, HEAD]."""
    head = tl.program_id(1).to(tl.int64) * length
    rows = head + tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = tl.arange(0, HEAD)
    columns = tl.arange(0, BLOCK_N)
    q = tl.load(queries + rows[:, None] * HEAD + features[None, :])
    k_ptrs = keys + (head + columns)[None, :] * HEAD + features[:, None]
    v_ptrs = values + (head + columns)[:, None] * HEAD + features[None, :]
    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    z = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, HEAD), tl.float32)
    for _ in range(0, length, BLOCK_N):
        s = tl.dot(q, tl.load(k_ptrs))
        top = tl.maximum(m, tl.max(s, 1) * scale2)
        p = tl.exp2(s * scale2 - top[:, None])
        shrink = tl.exp2(m - top)
        z = z * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(queries.dtype.element_ty), tl.load(v_ptrs), acc * shrink[:, None])
        m = top
        k_ptrs += BLOCK_N * HEAD
        v_ptrs += BLOCK_N * HEAD
    tl.store(out + rows[:, None] * HEAD + features[None, :], (acc / z[:, None]).to(out.dtype.element_ty))


@triton.jit
def product_kernel(
    x, y, out, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BAND: tl.constexpr,
):  # fmt: skip
    """out = x y^T, one tile a program, read through pointers: the naive kernel of Triton's tutorial 09."""
    tiles = tl.cdiv(columns, BLOCK_N)
    band = tl.program_id(0) // (BAND * tiles)
    within = tl.program_id(0) % (BAND * tiles)
    row = (band * BAND + within % BAND) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = within // BAND * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x + row[:, None] * depth + k[None, :]
    y_ptrs = y + column[None, :] * depth + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start in range(0, depth, BLOCK_K):
        inside = k < depth - start
        x_tile = tl.load(x_ptrs, mask=inside[None, :], other=0.0)
        y_tile = tl.load(y_ptrs, mask=inside[:, None], other=0.0)
        acc = tl.dot(x_tile, y_tile, acc)
        x_ptrs += BLOCK_K
        y_ptrs += BLOCK_K
    inside_out = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(out + row[:, None] * columns + column[None, :], acc.to(out.dtype.element_ty), mask=inside_out)
