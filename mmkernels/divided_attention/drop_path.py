"""TimeSformer's drop-path: what is drawn, and the weights that make it right around divided_attention."""

import torch
from torch import Tensor


def drop_positions(like: Tensor, num_frames: int, p: float) -> Tensor:
    """Drop-path of TimeSformer's temporal step: weights [B, 1 + N T, 1] that drop a position in all frames.

    `like` is the residual [B, 1 + N T, C]; the class token, which has none in time, keeps weight 1. The random numbers
    are those that Hugging Face's TimesformerDropPath draws.
    """
    B, L = like.shape[:2]
    N = (L - 1) // num_frames
    keep = _keep((B * N, 1, 1), like, p).view(B, N) / (1 - p)
    return torch.cat([keep.new_ones(B, 1), keep.repeat_interleave(num_frames, 1)], 1)[..., None]


def drop_frames(like: Tensor, num_frames: int, p: float) -> tuple[Tensor, Tensor]:
    """Drop-path of TimeSformer's spatial step: which frames are kept [B, T], and weights [B, 1 + N T, 1].

    The reference drops the residual of a frame, its row of the class token with it, before the class token is averaged
    over all T frames. With the kept frames as `frame_mask`, divided_attention gives the class token's mean over those;
    times kept / (T (1 - p)) it is the mean over all, the dropped ones counted as 0. The projection between is linear,
    so the weights may follow it.
    """
    B, L = like.shape[:2]
    keep = _keep((B * num_frames, 1, 1), like, p).view(B, num_frames)
    weights = keep / (1 - p)
    cls, patches = weights.mean(1, keepdim=True), weights.repeat(1, (L - 1) // num_frames)
    return keep.bool(), torch.cat([cls, patches], 1)[..., None]


def _keep(shape: tuple[int, ...], like: Tensor, p: float) -> Tensor:
    return torch.floor(torch.rand(shape, dtype=like.dtype, device=like.device) + (1 - p))
