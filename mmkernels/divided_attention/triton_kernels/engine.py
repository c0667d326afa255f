"""What the kernels of divided attention share: where a program works, which tokens a tile holds, scores, dropout.

A sequence is a run of *items*: the class token first, where it takes part, then the patches. A *group* is `pack`
sequences end to end: several short ones, so that they fill a tile together, or one that is streamed. Every kernel takes
the geometry of a call as plain numbers, so that one compiled form serves all axes and orders. Those of the layout are
as in layout.py: num_sequences, has_cls, sequence_step, patch_step, frame_step, num_frames. The others:

    num_heads, units    H, and D in units of 8 features: the compiler then knows that rows are whole vectors
    items, pack         of a sequence; sequences of a group
    groups              of a clip
    reciprocal          2^16 / items, rounded up: a runtime division takes twenty instructions, this takes two

CLS, what the class token does, is a compiled form: APART, AVERAGED or GLOBAL. So is WIDE: the features of one clip lie
further apart than 32 bits reach. Else only the first of them has a 64-bit address, and all others an offset to it.
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.triton import LN2, LOWEST
from mmkernels.divided_attention import layout

APART = tl.constexpr(layout.APART)
AVERAGED = tl.constexpr(layout.AVERAGED)
GLOBAL = tl.constexpr(layout.GLOBAL)
# Numbers that do not choose another compiled form when they happen to be 1 or a multiple of 16.
GEOMETRY = (
    "num_heads", "units", "num_sequences", "items", "pack", "groups", "reciprocal", "has_cls",
    "sequence_step", "patch_step", "frame_step", "num_frames",
)  # fmt: skip
RUNTIME = (*GEOMETRY, "stride_b", "stride_t", "stride_ob", "stride_ot", "cls_weight", "threshold", "keep_scale")
UNIT = tl.constexpr(8)
RECIPROCAL_BITS = tl.constexpr(16)


@triton.jit
def place(program, num_heads, groups, blocks):
    """The clip, head, group and block of items of a program. Heads are neighbours in memory: they run side by side."""
    rest = program // num_heads
    head = program - rest * num_heads
    of_group = rest // blocks
    clip = of_group // groups
    return clip, head, of_group - clip * groups, rest - of_group * blocks


@triton.jit
def packed_items(index, group, num_sequences, items, pack, reciprocal):
    """The sequence and item at an index of a tile, and whether there is one. Exact for tiles of up to 256 items."""
    of_group = (index * reciprocal) >> RECIPROCAL_BITS
    inside = index < tl.minimum(pack, num_sequences - group * pack) * items
    return group * pack + of_group, index - of_group * items, inside


@triton.jit
def tokens_at(sequence, item, has_cls, sequence_step, patch_step, CLS: tl.constexpr):
    """The token of an item, and whether it is the class token."""
    if CLS == APART:
        return has_cls + sequence * sequence_step + item * patch_step, tl.zeros_like(item) != 0
    is_cls = item == 0
    return tl.where(is_cls, 0, has_cls + sequence * sequence_step + (item - 1) * patch_step), is_cls


@triton.jit
def present_at(frame_mask, clip, token, is_cls, inside, has_cls, frame_step, num_frames, MASKED: tl.constexpr):
    """Whether there is an item and its frame is real."""
    if MASKED:
        frame = (token - has_cls) // frame_step % num_frames
        real = tl.load(frame_mask + clip.to(tl.int64) * num_frames + frame, mask=inside & (is_cls == 0), other=1)
        inside &= real != 0
    return inside


@triton.jit
def rows_at(token, stride, HEAD: tl.constexpr, WIDE: tl.constexpr):
    """The offsets of the rows of tokens, [tokens, HEAD], for a step of so many features from one to the next."""
    if WIDE:
        token = token.to(tl.int64)
    return token[:, None] * stride + tl.arange(0, HEAD)[None, :]


@triton.jit
def load_rows(base, token, stride, present, D, HEAD: tl.constexpr, WIDE: tl.constexpr):
    """The rows of a tile, [tokens, HEAD]; 0 for absent ones, which are not read, and past the end of a head.

    The stride is in units, which tells the compiler that rows are whole vectors.
    """
    if WIDE:
        stride = stride.to(tl.int64)
    at = base + rows_at(token, stride * UNIT, HEAD, WIDE)
    return tl.load(at, mask=present[:, None] & (tl.arange(0, HEAD) < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, token, stride, inside, D, value, HEAD: tl.constexpr, WIDE: tl.constexpr):
    at = base + rows_at(token, stride, HEAD, WIDE)
    tl.store(at, value.to(base.dtype.element_ty), mask=inside[:, None] & (tl.arange(0, HEAD) < D)[None, :])


@triton.jit
def store_partial(at, chosen, value, D, HEAD: tl.constexpr):
    """The sum of the rows that are chosen: what the class token takes from this tile."""
    features = tl.arange(0, HEAD)
    # A row that is not chosen may hold a NaN of its own.
    tl.store(at + features, tl.sum(tl.where(chosen[:, None], value, 0.0), 0), mask=features < D)


@triton.jit
def magnitude(scale2):
    """|scale2|, but never 0: the score of a hidden key is -inf times it."""
    return tl.maximum(tl.abs(scale2), 1e-30)


@triton.jit
def signed(x, scale2):
    """x with the sign of the scale, so that the largest product is the largest score."""
    if scale2 < 0:
        x = (-x.to(tl.float32)).to(x.dtype)  # the interpreter negates the bits of bfloat16 as integers
    return x


@triton.jit
def keys_seen(item, present):
    """The items as keys, -1 where they are none: a query sees those from `first_seen` on."""
    return tl.where(present, item, -1)


@triton.jit
def first_seen(sequence, is_cls, CLS: tl.constexpr):
    """0; 1 for a global class token in all sequences but the first, so that it meets itself once."""
    if CLS == GLOBAL:
        return (is_cls & (sequence > 0)).to(tl.int32)
    return tl.zeros_like(is_cls).to(tl.int32)


@triton.jit
def packed_seen(sequence, item, is_cls, present, items, BLOCK: tl.constexpr, CLS: tl.constexpr, MASKED: tl.constexpr):
    """Which keys of a tile a query sees, [BLOCK, BLOCK]: those of its own sequence.

    A distance to the first of them takes one comparison a pair, as an unsigned number; to know the sequence of each key
    would take a division.
    """
    first = first_seen(sequence, is_cls, CLS)
    distance = tl.arange(0, BLOCK)[None, :] - (tl.arange(0, BLOCK) - item + first)[:, None]
    seen = distance.to(tl.uint32, bitcast=True) < (items - first).to(tl.uint32, bitcast=True)[:, None]
    if MASKED:
        seen &= present[None, :]
    return seen


@triton.jit
def weights_at(
    cls_weights, cls_weight, clip, sequence, num_sequences, is_cls, present, CLS: tl.constexpr, MASKED: tl.constexpr
):
    """What a query's output counts: 0 if absent, 1, or the share of an averaged class token's sequence."""
    share = tl.full(present.shape, 1.0, tl.float32)
    if CLS == AVERAGED:
        if MASKED:
            at = cls_weights + clip.to(tl.int64) * num_sequences + sequence
            share = tl.load(at, mask=present & is_cls, other=1.0)
        else:
            share = tl.where(is_cls, cls_weight, 1.0)
    return tl.where(present, share, 0.0)


@triton.jit
def kept(seed, threshold, key_token, query_token, clip_and_head, sequence):
    """Which probabilities dropout keeps: the first word of Philox 4x32-10 at a counter of their own."""
    zero = tl.zeros_like(key_token + query_token)
    word, _, _, _ = tl.philox(
        tl.load(seed), zero + key_token, zero + query_token, zero + clip_and_head, zero + sequence
    )  # fmt: skip
    return word >= threshold.to(tl.uint32, bitcast=True)


@triton.jit
def patches_of(num_sequences, items, CLS: tl.constexpr):
    """The tokens of a clip but for the class token."""
    if CLS == APART:
        return num_sequences * items
    return num_sequences * (items - 1)


@triton.jit
def first_row(clip, head, num_heads, num_sequences, items, CLS: tl.constexpr):
    """The place of a head's log-sum-exps, and how many of them are the class token's."""
    cls_rows = num_sequences * 0
    if CLS == AVERAGED:
        cls_rows = num_sequences
    if CLS == GLOBAL:
        cls_rows += 1
    return (clip.to(tl.int64) * num_heads + head) * (cls_rows + patches_of(num_sequences, items, CLS)), cls_rows


@triton.jit
def row_at(sequence, token, is_cls, has_cls, cls_rows, CLS: tl.constexpr):
    """The row of a query among the log-sum-exps of its head."""
    row = cls_rows + token - has_cls
    if CLS == AVERAGED:
        row = tl.where(is_cls, sequence, row)
    if CLS == GLOBAL:
        row = tl.where(is_cls, 0, row)
    return row


@triton.jit(do_not_specialize=["parts", "num_heads", "units", "num_tokens", "rows", "weighted"])
def merge_kernel(
    partials, partial_tops, partial_sums, out, lse,
    parts, num_heads, units, num_tokens, rows, weighted, scale2,
    ROWS: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """out[b, 0] = the sum of partials [B, parts, H D] in their order; 0 without parts.

    `weighted`: partials are sums over parts of the keys, each relative to the largest product of its part; with those
    and the sums of the weights, both [B, H, parts], they meet as one softmax, whose log-sum-exp goes to row 0 of lse
    [B, H, rows]. Log-sum-exps of the parts would not do: rounded at scores of thousands they are off by 1e-4.
    """
    program = tl.program_id(0)
    head = program % num_heads
    clip = (program // num_heads).to(tl.int64)
    D = units * UNIT
    part = tl.arange(0, ROWS)
    features = tl.arange(0, HEAD)
    of_head = partials + clip * parts * num_heads * D + head * D
    tops = partial_tops + program.to(tl.int64) * parts
    sums = partial_sums + program.to(tl.int64) * parts
    size = magnitude(scale2)
    top = 0.0
    total = 1.0
    if weighted != 0:
        m = tl.full((ROWS,), LOWEST, tl.float32)
        z = tl.zeros((ROWS,), tl.float32)
        for start in range(0, parts, ROWS):
            m = tl.maximum(m, tl.load(tops + start + part, mask=start + part < parts, other=LOWEST))
        top = tl.max(m, 0)
        for start in range(0, parts, ROWS):
            inside = start + part < parts
            m = tl.load(tops + start + part, mask=inside, other=LOWEST)
            z += tl.load(sums + start + part, mask=inside, other=0.0) * tl.exp2((m - top) * size)
        total = tl.sum(z, 0)
        tl.store(lse + program.to(tl.int64) * rows, (top * size + tl.log2(total)) * LN2)
    acc = tl.zeros((ROWS, HEAD), tl.float32)
    for start in range(0, parts, ROWS):
        index = start + part
        inside = (index < parts)[:, None] & (features < D)[None, :]
        value = tl.load(of_head + index.to(tl.int64)[:, None] * (num_heads * D) + features[None, :], inside, other=0.0)
        m = tl.load(tops + index, mask=index < tl.where(weighted != 0, parts, 0), other=top)
        acc += value * (tl.exp2((m - top) * size) / total)[:, None]
    at = out + clip * num_tokens * num_heads * D + head * D + features
    tl.store(at, tl.sum(acc, 0).to(out.dtype.element_ty), mask=features < D)
