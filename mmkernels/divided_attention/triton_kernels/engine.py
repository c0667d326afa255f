"""What the kernels of divided attention share: where a program works, which tokens a tile holds, scores, dropout.

A sequence is a run of *items*: the class token first, where it takes part, then the patches. A *group* is `pack`
sequences end to end: several short ones, so that they fill a tile together, or one that is streamed. Every kernel takes
the geometry of a call as plain numbers, so that one compiled form serves all axes, modes and orders. Those of the
layout are as in layout.py: num_sequences, has_cls, cls, sequence_step, patch_step, frame_step, num_frames. The others:

    num_heads, units    H, and D in units of 8 features: the compiler then knows that rows are whole vectors
    items, pack         of a sequence; sequences of a group
"""

# mypy: disallow-untyped-defs=False, check-untyped-defs=False

import triton
import triton.language as tl

from mmkernels._tiles.triton import LN2, LOWEST
from mmkernels.divided_attention import layout

AVERAGED = tl.constexpr(layout.AVERAGED)
GLOBAL = tl.constexpr(layout.GLOBAL)
# Numbers that do not choose another compiled form when they happen to be 1 or a multiple of 16.
GEOMETRY = (
    "num_heads", "units", "num_sequences", "items", "pack", "has_cls", "cls",
    "sequence_step", "patch_step", "frame_step", "num_frames",
)  # fmt: skip
RUNTIME = (*GEOMETRY, "stride_b", "stride_t", "stride_ob", "stride_ot", "cls_weight", "threshold", "keep_scale")
UNIT = tl.constexpr(8)


@triton.jit
def place(program, num_heads, num_sequences, items, pack, BLOCK: tl.constexpr):
    """The clip, head, group and block of items of a program. Heads are neighbours in memory: they run side by side."""
    head = program % num_heads
    rest = program // num_heads
    blocks = tl.cdiv(pack * items, BLOCK)
    groups = tl.cdiv(num_sequences, pack)
    return rest // blocks // groups, head, rest // blocks % groups, rest % blocks


@triton.jit
def items_at(index, group, num_sequences, items, pack, PACKED: tl.constexpr):
    """The sequence and item at an index of a group, and whether there is one."""
    sequence = group + index * 0
    item = index
    inside = index < items
    if PACKED:
        sequence = group * pack + index // items
        item = index % items
        inside = (index < pack * items) & (sequence < num_sequences)
    return sequence, item, inside


@triton.jit
def tokens_at(sequence, item, has_cls, cls, sequence_step, patch_step):
    """The token of an item, and whether it is the class token."""
    own = tl.minimum(cls, 1)
    is_cls = item < own
    return tl.where(is_cls, 0, has_cls + sequence * sequence_step + (item - own) * patch_step), is_cls


@triton.jit
def present_at(frame_mask, clip, token, is_cls, inside, has_cls, frame_step, num_frames, MASKED: tl.constexpr):
    """Whether there is an item and its frame is real."""
    if MASKED:
        frame = (token - has_cls) // frame_step % num_frames
        real = tl.load(frame_mask + clip.to(tl.int64) * num_frames + frame, mask=inside & (is_cls == 0), other=1)
        inside &= real != 0
    return inside


@triton.jit
def load_rows(base, token, stride, present, D, HEAD: tl.constexpr):
    """The rows of a tile, [tokens, HEAD]; 0 for absent ones, which are not read, and past the end of a head."""
    features = tl.arange(0, HEAD)
    at = base + token.to(tl.int64)[:, None] * (stride.to(tl.int64) * UNIT) + features[None, :]
    return tl.load(at, mask=present[:, None] & (features < D)[None, :], other=0.0)


@triton.jit
def store_rows(base, token, stride, inside, D, value, HEAD: tl.constexpr):
    features = tl.arange(0, HEAD)
    at = base + token.to(tl.int64)[:, None] * stride + features[None, :]
    tl.store(at, value.to(base.dtype.element_ty), mask=inside[:, None] & (features < D)[None, :])


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
    return (x * tl.where(scale2 < 0, -1.0, 1.0)).to(x.dtype)


@triton.jit
def keys_seen(item, present):
    """The items as keys, -1 where they are none: a query sees those from `first_seen` on."""
    return tl.where(present, item, -1)


@triton.jit
def first_seen(sequence, is_cls, cls):
    """0; 1 for a global class token in all sequences but the first, so that it meets itself once."""
    return (is_cls & (cls == GLOBAL) & (sequence > 0)).to(tl.int32)


@triton.jit
def weights_at(cls_weights, cls_weight, clip, sequence, num_sequences, is_cls, present, cls, MASKED: tl.constexpr):
    """What a query's output counts: 0 if absent, 1, or the share of an averaged class token's sequence."""
    if MASKED:
        at = cls_weights + clip.to(tl.int64) * num_sequences + sequence
        # The mask compares no scalars: Triton 3.9's interpreter turns such a comparison into an integer.
        share = tl.where(cls == AVERAGED, tl.load(at, mask=present & is_cls, other=1.0), 1.0)
    else:
        share = tl.where(is_cls & (cls == AVERAGED), cls_weight, 1.0)
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
def first_row(clip, head, num_heads, num_sequences, items, cls):
    """The place of a head's log-sum-exps, and how many of them are the class token's."""
    cls_rows = tl.where(cls == AVERAGED, num_sequences, tl.minimum(cls, 1))
    rows = cls_rows + num_sequences * (items - tl.minimum(cls, 1))
    return (clip.to(tl.int64) * num_heads + head) * rows, cls_rows


@triton.jit
def row_at(sequence, token, is_cls, has_cls, cls, cls_rows):
    """The row of a query among the log-sum-exps of its head."""
    return tl.where(is_cls, tl.where(cls == AVERAGED, sequence, 0), cls_rows + token - has_cls)


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
