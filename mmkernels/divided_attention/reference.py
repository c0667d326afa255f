"""Eager, obviously right, on any device: the oracle of the tests."""

import torch
from torch import Tensor

from mmkernels.divided_attention.layout import APART, GLOBAL, Layout

_MASK32 = 0xFFFFFFFF


def divided_attention(
    qkv: Tensor,  # [B, L, 3 * H * D]
    frame_mask: Tensor | None,  # [B, T]
    seed: Tensor | None,  # [1]
    layout: Layout,
    num_heads: int,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:  # [B, L, H * D], [B, H, rows]
    """Output and log-sum-exps, computed in float32 (float64 for float64 inputs)."""
    B, L = qkv.shape[:2]
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    tokens = torch.arange(L, device=qkv.device)
    patches, frames = sequences_of(layout, qkv.device)  # [S, R]
    sequences = torch.arange(len(patches), device=qkv.device)
    absent = torch.zeros(B, layout.num_frames, dtype=torch.bool, device=qkv.device)
    if frame_mask is not None:
        absent = ~frame_mask
    absent_patches = absent[:, frames]  # [B, S, R]
    absent_tokens = absent.new_zeros(B, L).index_copy(1, patches.flatten(), absent_patches.flatten(1))
    if layout.has_cls and layout.cls != GLOBAL:  # nor is the class token of a clip without frames read
        absent_tokens[:, 0] = absent.all(1)
    present = qkv.to(dtype).masked_fill(absent_tokens[..., None], 0.0)  # what fills an absent frame may be NaN
    q, k, v = present.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, L, D]

    def attend(queries: Tensor, keys: Tensor, hidden: Tensor, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Token indices [S, I] and [S, J], hidden keys [B, S, J] -> outputs [B, H, S, I, D] and lse [B, H, S, I]."""
        scores = scale * q[:, :, queries] @ k[:, :, keys].transpose(-1, -2)  # [B, H, S, I, J]
        scores = scores.masked_fill(hidden[:, None, :, None], float("-inf"))
        lse = scores.logsumexp(-1)
        # A row without a key has no output: 0, not the 0 / 0 of a softmax.
        nothing = hidden.all(-1)[:, None, :, None, None]
        probabilities = torch.where(nothing, 0.0, scores.masked_fill(nothing, 0.0).softmax(-1))
        if dropout_p > 0 and seed is not None:
            kept = keep_mask(seed, B, num_heads, queries, keys, sequences, dropout_p)
            probabilities = torch.where(kept, probabilities / (1 - dropout_p), 0.0)
        return probabilities @ v[:, :, keys], lse

    keys, absent_keys = patches, absent_patches
    if layout.cls != APART:
        keys = torch.cat([torch.zeros_like(patches[:, :1]), patches], 1)
        absent_keys = torch.cat([torch.zeros_like(absent_patches[:, :, :1]), absent_patches], 2)
    values, lse = attend(patches, keys, absent_keys, sequences)
    values = values.masked_fill(absent_patches[:, None, ..., None], 0.0)
    lse = lse.masked_fill(absent_patches[:, None], float("-inf"))

    out = values.new_zeros(B, num_heads, L, values.shape[-1])
    out = out.index_copy(2, patches.flatten(), values.flatten(2, 3))
    rows = lse.new_zeros(B, num_heads, L).index_copy(2, patches.flatten(), lse.flatten(2, 3))[:, :, layout.has_cls :]
    if layout.cls != APART:
        if layout.cls == GLOBAL:
            values, lse = attend(tokens[None, :1], tokens[None], absent_tokens[:, None], sequences[:1])
            values = values[:, :, 0]
        else:
            values, lse = attend(torch.zeros_like(patches[:, :1]), keys, absent_keys, sequences)
            # The mean over the sequences that hold a frame: all of them in time, the real frames in space.
            real = ~absent_patches.all(2)[:, None, :, None, None]  # [B, 1, S, 1, 1]
            values = torch.where(real, values, 0.0).sum(2) / real.sum(2).clamp(min=1)
            lse = lse.masked_fill(~real[..., 0], float("-inf"))
        out = out.index_copy(2, tokens[:1], values)
        rows = torch.cat([lse[..., 0], rows], 2)
    return out.transpose(1, 2).flatten(2).to(qkv.dtype), rows


def attention_maps(
    qkv: Tensor,  # [B, L, 3 * H * D]
    tokens: Tensor,  # [Q]
    frame_mask: Tensor | None,  # [B, T]
    layout: Layout,
    num_heads: int,
    scale: float,
) -> Tensor:  # [B, H, Q, L]
    """The probabilities with which the query tokens attend to every token: `maps @ v` are rows of the output."""
    B, L = qkv.shape[:2]
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    patches, frames = sequences_of(layout, qkv.device)  # [S, R]
    sequence_of = torch.full((L,), -1, device=qkv.device)
    sequence_of[patches] = torch.arange(len(patches), device=qkv.device)[:, None].expand_as(patches)
    present = torch.ones(B, L, dtype=torch.bool, device=qkv.device)
    if frame_mask is not None:
        present[:, patches] = frame_mask[:, frames]
    real = qkv.to(dtype).masked_fill(~present[..., None], 0.0)
    q, k, _ = real.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, L, D]
    scores = scale * q[:, :, tokens] @ k.transpose(-1, -2)  # [B, H, Q, L]
    is_cls = torch.arange(L, device=qkv.device) < layout.has_cls

    def softmax(visible: Tensor) -> Tensor:
        """The softmax over the visible tokens, 0 in a row that sees none."""
        hidden = ~visible
        nothing = hidden.all(-1, keepdim=True)
        return scores.masked_fill(hidden & ~nothing, float("-inf")).softmax(-1).masked_fill(nothing, 0.0)

    same = sequence_of[tokens, None] == sequence_of  # [Q, L]
    visible = (same | (is_cls & (layout.cls != APART))) & present[:, None]  # [B, Q, L]
    maps = softmax((visible & present[:, tokens, None] & ~is_cls[tokens, None])[:, None])
    if layout.cls == APART or not (tokens.is_meta or bool(is_cls[tokens].any())):
        return maps
    if layout.cls == GLOBAL:
        own = softmax(present[:, None, None])
    else:
        own, count = torch.zeros_like(maps), torch.zeros(B, 1, 1, 1, dtype=dtype, device=qkv.device)
        for sequence in range(len(patches)):
            members = present & (sequence_of == sequence)
            real = members.any(1)[:, None, None, None]
            own = own + torch.where(real, softmax((members | is_cls)[:, None, None]), 0.0)
            count = count + real
        own = own / count.clamp(min=1)
    return torch.where(is_cls[tokens, None], own, maps)


def sequences_of(layout: Layout, device: torch.device) -> tuple[Tensor, Tensor]:
    """The token index and the frame of every patch, by sequence: two of [sequences, length]."""
    sequences = torch.arange(layout.num_sequences, device=device) * layout.sequence_step
    patches = torch.arange(layout.length, device=device) * layout.patch_step
    # Gathered rows lie in memory as their index does, which decides in what order a matrix product adds. The frames of
    # a position are neighbours in the index, whatever the sequences.
    index = sequences[:, None] + patches if layout.mixes_frames else (patches[:, None] + sequences).T
    return layout.has_cls + index, index // layout.frame_step % layout.num_frames


def keep_mask(
    seed: Tensor, batch: int, num_heads: int, queries: Tensor, keys: Tensor, sequences: Tensor, dropout_p: float
) -> Tensor:
    """Which probabilities dropout keeps, [B, H, S, I, J]: the first word of Philox 4x32-10 at a counter of their own.

    The counter is (key token, query token, batch * heads + head, sequence), the key the two halves of the seed; an
    entry is dropped where the word is below p * 2^32.
    """
    S = len(sequences)
    clip_and_head = torch.arange(batch * num_heads, device=keys.device).view(batch, num_heads, 1, 1, 1)
    counter = [
        keys[None, None, :, None, :],
        queries[None, None, :, :, None],
        clip_and_head,
        sequences.view(1, 1, S, 1, 1),
    ]
    word = philox(seed.to(torch.int64), [c.to(torch.int64) for c in counter])
    return word >= int(dropout_p * 2**32)


def philox(seed: Tensor, counter: list[Tensor]) -> Tensor:
    """The first 32-bit word of Philox 4x32-10 (Salmon et al. 2011) at a 128-bit counter, as int64."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK32, (seed >> 32) & _MASK32
    for _ in range(10):
        # A product of two 32-bit words fills 64 bits; the sign does not matter once they are cut.
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & _MASK32) ^ c1 ^ k0, b & _MASK32, (a >> 32 & _MASK32) ^ c3 ^ k1, a & _MASK32
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return c0
