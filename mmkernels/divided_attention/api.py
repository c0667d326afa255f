"""The public calls: docstrings, validation, autocast, choice of implementation."""

from typing import Literal, overload

import torch
from torch import Tensor

from mmkernels import _backends
from mmkernels._checks import (
    check_choice,
    check_count,
    check_device,
    check_features,
    check_flag,
    check_int64,
    check_mask,
    check_share,
    in_autocast_dtype,
    without_autocast,
)
from mmkernels.divided_attention import ops, reference
from mmkernels.divided_attention.layout import AXES, CLS_MODES, TOKEN_ORDERS, Layout, layout_of

_LARGEST_HEAD = 256  # of the compiled kernels

Axis = Literal["time", "space", "joint"]
ClsMode = Literal["timesformer", "global_cls", "paper", "none"]
TokenOrder = Literal["nt", "tn"]
Impl = Literal["auto", "triton", "cpu", "reference"]


@overload
def divided_attention(
    qkv: Tensor, *, num_frames: int, num_heads: int, axis: Axis, cls_mode: ClsMode = ..., token_order: TokenOrder = ...,
    scale: float | None = ..., frame_mask: Tensor | None = ..., dropout_p: float = ...,
    dropout_seed: int | Tensor | None = ..., return_lse: Literal[False] = ..., impl: Impl = ...,
) -> Tensor: ...  # fmt: skip
@overload
def divided_attention(
    qkv: Tensor, *, num_frames: int, num_heads: int, axis: Axis, cls_mode: ClsMode = ..., token_order: TokenOrder = ...,
    scale: float | None = ..., frame_mask: Tensor | None = ..., dropout_p: float = ...,
    dropout_seed: int | Tensor | None = ..., return_lse: Literal[True], impl: Impl = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def divided_attention(
    qkv: Tensor, *, num_frames: int, num_heads: int, axis: Axis, cls_mode: ClsMode = ..., token_order: TokenOrder = ...,
    scale: float | None = ..., frame_mask: Tensor | None = ..., dropout_p: float = ...,
    dropout_seed: int | Tensor | None = ..., return_lse: bool, impl: Impl = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...  # fmt: skip
def divided_attention(
    qkv: Tensor,
    *,
    num_frames: int,
    num_heads: int,
    axis: Axis,
    cls_mode: ClsMode = "timesformer",
    token_order: TokenOrder = "nt",
    scale: float | None = None,
    frame_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
    impl: Impl = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Self-attention of video tokens along one axis: over time, over space, or over both jointly.

    Replaces (axis="space", cls_mode="timesformer", token_order="nt", as TimeSformer does it)::

        q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)          # [B, H, 1 + N T, D]
        def frames(x):                                                                  # [B T, H, 1 + N, D]
            cls, patches = x[:, :, :1], x[:, :, 1:].unflatten(2, (-1, num_frames))
            cls = cls.unsqueeze(3).expand(-1, -1, -1, num_frames, -1)
            return torch.cat([cls, patches], 2).permute(0, 3, 1, 2, 4).flatten(0, 1)
        y = F.scaled_dot_product_attention(frames(q), frames(k), frames(v)).unflatten(0, (-1, num_frames))
        cls, patches = y[:, :, :, :1].mean(1), y[:, :, :, 1:].permute(0, 2, 3, 1, 4).flatten(2, 3)
        out = torch.cat([cls, patches], 2).transpose(1, 2).flatten(2)                   # [B, 1 + N T, C]

    without a copy of the tokens: qkv is read where it lies, and the output is written where the projection reads it.

    Args:
        qkv: [B, L, 3 C], float32, bfloat16, float16 (accumulated in float32) or float64 (reference only). Each token
            holds query, key and value, each [num_heads, D]. L = 1 + N T tokens, the class token first; N T for
            cls_mode="none". Any strides; kernels read rows of contiguous features in place.
        num_frames: T. N, the patches of a frame, follows from L.
        num_heads: H; C = H D. The compiled kernels take D up to 256.
        axis: which patches meet: those of one position ("time"), those of one frame ("space"), or all ("joint").
        cls_mode: what the class token does.
            "timesformer": takes no part in time (its output there is 0); in space it is a member of every frame's
            sequence, and its T outputs are averaged (TimeSformer's code, Hugging Face).
            "global_cls": attends to all tokens, and is a key of every sequence (lucidrains).
            "paper": a member of every sequence along both axes, its outputs averaged (the paper's equation).
            "none": there is no class token.
            Along the joint axis it is a token like the others.
        token_order: how patches lie, "nt" (frames of a position side by side) or "tn" (positions of a frame).
        scale: of the scores; None is D ** -0.5.
        frame_mask: [B, T], bool, True for a real frame. Absent frames are no keys; their outputs and gradients are 0,
            and they do not count in the mean of the class token.
        dropout_p: the share of probabilities set to 0 while the others grow by 1 / (1 - p).
        dropout_seed: what decides which: the same seed drops the same entries on every implementation. An int, an
            int64 tensor of one element, or None to draw one from torch's generator.
        return_lse: return the log-sum-exps of the scaled scores, too.
        impl: "auto" picks the best implementation that can run; a name runs that one or raises.

    Returns:
        out: [B, L, C], the dtype of `qkv`. With return_lse also lse: [B, H, R], float32: the class token's rows (one
        per sequence it is averaged over, one where it attends globally, none in time for "timesformer"), then one per
        patch in the order of the tokens; -inf for absent frames. It is not differentiable.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: wrong shapes, devices or values.
        RuntimeError: the `impl` asked for cannot run here; the text lists every implementation with its reason.

    What is kept for the backward pass: qkv, out, and one float32 per row. Results are the same bits from run to run.
    The gradient is itself not differentiable (impl="reference" is). NaN in, NaN out. Under autocast qkv is cast to its
    dtype; scores and sums stay float32.

    Source: Bertasius et al. 2021, equations 5 to 9 (arXiv:2102.05095).
    """
    layout, scale = _check(qkv, num_frames, num_heads, axis, cls_mode, token_order, scale, frame_mask)
    check_share("dropout_p", dropout_p)
    check_flag("return_lse", return_lse)
    seed = _seed(dropout_seed, qkv.device) if dropout_p > 0 else None
    qkv = in_autocast_dtype(qkv)
    chosen = _backends.choose("divided_attention", impl, qkv.device.type, qkv.dtype, _limit(qkv, num_heads))
    if chosen == "reference":
        with without_autocast(qkv):  # which would multiply in half precision
            out, lse = reference.divided_attention(qkv, frame_mask, seed, layout, num_heads, scale, dropout_p)
        lse = lse.detach()
    else:
        out, lse = ops.divided_attention(qkv, frame_mask, seed, layout, num_heads, scale, dropout_p, chosen)
    return (out, lse) if return_lse else out


def divided_attention_maps(
    qkv: Tensor,
    tokens: Tensor,
    *,
    num_frames: int,
    num_heads: int,
    axis: Axis,
    cls_mode: ClsMode = "timesformer",
    token_order: TokenOrder = "nt",
    scale: float | None = None,
    frame_mask: Tensor | None = None,
) -> Tensor:
    """How much chosen tokens attend to every token: for pictures and attention rollout.

    Replaces (joint attention)::

        q, k, _ = qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
        maps = (scale * q[:, :, tokens] @ k.transpose(-1, -2)).softmax(-1)      # [B, H, Q, L]

    Computed on demand, eagerly and differentiably, from the same qkv as :func:`divided_attention`, whose rows it
    explains: `maps @ v` is the output at `tokens`. The class token's map is the mean over the sequences that its output
    is averaged over.

    Args:
        tokens: [Q], int64, the query tokens by their index among the L tokens.
        qkv, num_frames, num_heads, axis, cls_mode, token_order, scale, frame_mask: see :func:`divided_attention`.

    Returns:
        [B, H, Q, L], float32 (float64 for float64 inputs). A row sums to 1, or is 0 where the token has no output.

    Raises:
        TypeError, ValueError: as :func:`divided_attention`; `tokens` out of range.
    """
    layout, scale = _check(qkv, num_frames, num_heads, axis, cls_mode, token_order, scale, frame_mask)
    check_int64("tokens", tokens)
    if tokens.ndim != 1:
        raise ValueError(f"tokens: expected shape [Q], got {tuple(tokens.shape)}; use tokens.flatten()")
    check_device("tokens", tokens, "qkv", qkv)
    if tokens.numel() and not tokens.is_meta:
        low, high = (int(bound) for bound in tokens.aminmax())
        if low < 0 or high >= layout.num_tokens:
            last = layout.num_tokens - 1
            raise ValueError(f"tokens: expected indices of the tokens, 0 to {last}, got {low} to {high}")
    qkv = in_autocast_dtype(qkv)
    with without_autocast(qkv):
        return reference.attention_maps(qkv, tokens, frame_mask, layout, num_heads, scale)


def _limit(qkv: Tensor, num_heads: int) -> str | None:
    """Why the compiled kernels refuse the shape; None if they take it."""
    head = qkv.shape[2] // (3 * num_heads)
    return f"it takes heads of up to {_LARGEST_HEAD}, and these are {head}" if head > _LARGEST_HEAD else None


def _seed(seed: int | Tensor | None, device: torch.device) -> Tensor:
    if seed is None:
        return torch.randint(2**62, (1,), device=device)
    if isinstance(seed, bool) or not isinstance(seed, (int, Tensor)):
        raise TypeError(f"dropout_seed: expected an int or an int64 tensor, got {type(seed).__name__}")
    if isinstance(seed, int):
        if not -(2**63) <= seed < 2**63:
            raise ValueError(f"dropout_seed: expected a value of 64 bits, got {seed}")
        return torch.full((1,), seed, dtype=torch.int64, device=device)
    if seed.dtype != torch.int64:
        raise TypeError(f"dropout_seed: expected an int64 tensor, got {seed.dtype}")
    if seed.numel() != 1:
        raise ValueError(f"dropout_seed: expected one element, got shape {tuple(seed.shape)}")
    return seed.detach().reshape(1).to(device)


def _check(
    qkv: Tensor,
    num_frames: int,
    num_heads: int,
    axis: str,
    cls_mode: str,
    token_order: str,
    scale: float | None,
    frame_mask: Tensor | None,
) -> tuple[Layout, float]:
    """The layout and the scale of a call whose arguments fit together; raises otherwise."""
    check_features("qkv", qkv, 3, "[B, L, 3 C]")
    check_choice("axis", axis, AXES)
    check_choice("cls_mode", cls_mode, CLS_MODES)
    check_choice("token_order", token_order, TOKEN_ORDERS)
    check_count("num_frames", num_frames, 1)
    check_count("num_heads", num_heads, 1)
    B, L, width = qkv.shape
    if width == 0 or width % (3 * num_heads):
        raise ValueError(
            f"qkv: expected a last dimension of 3 * num_heads * D = {3 * num_heads} D, got {width} "
            f"for num_heads={num_heads}"
        )
    patches = L - int(cls_mode != "none")
    if patches < 1 or patches % num_frames:
        what = f"{L} tokens" + (", the class token among them," if patches < L else "")
        raise ValueError(
            f"num_frames: {what} are not a whole number of patches for each of {num_frames} frames; "
            "pass the frames of this clip, or cls_mode='none' if there is no class token"
        )
    if scale is None:
        scale = (width // (3 * num_heads)) ** -0.5
    elif not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a float, got {type(scale).__name__}")
    if frame_mask is not None:
        check_mask("frame_mask", frame_mask, {"[B, T]": (B, num_frames)}, "True for a real frame")
        check_device("frame_mask", frame_mask, "qkv", qkv)
    return layout_of(L, num_frames, axis, cls_mode, token_order), float(scale)
