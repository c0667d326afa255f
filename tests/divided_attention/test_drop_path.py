"""drop_frames and drop_positions by their definitions; the integrations' tests hold them to Hugging Face's numbers."""

import torch

from mmkernels.divided_attention import drop_frames, drop_positions


def test_a_frame_dropped_is_a_residual_of_zero():
    """drop_frames against the reference's own order: drop each frame's output, then average the class token."""
    torch.manual_seed(0)
    B, T, N, C, p = 8, 4, 6, 8, 0.7
    per_frame = torch.randn(B, T, 1 + N, C, dtype=torch.float64)  # the class token first
    torch.manual_seed(3)
    kept, weights = drop_frames(torch.empty(B, 1 + N * T, C, dtype=torch.float64), T, p)
    assert kept.sum(1).min() == 0, "the draw has a clip without any frame"
    dropped = per_frame * (kept / (1 - p))[:, :, None, None]
    expected = torch.cat([dropped[:, :, 0].mean(1, keepdim=True), dropped[:, :, 1:].transpose(1, 2).flatten(1, 2)], 1)
    masked = per_frame * kept[:, :, None, None]
    mean_of_kept = masked[:, :, 0].sum(1, keepdim=True) / kept.sum(1).clamp(min=1)[:, None, None]
    given = torch.cat([mean_of_kept, masked[:, :, 1:].transpose(1, 2).flatten(1, 2)], 1)
    torch.testing.assert_close(given * weights, expected)


def test_a_position_is_dropped_in_all_frames():
    torch.manual_seed(0)
    B, T, N, p = 8, 4, 6, 0.4
    weights = drop_positions(torch.empty(B, 1 + N * T, 8, dtype=torch.float64), T, p)
    assert weights.shape == (B, 1 + N * T, 1)
    assert (weights[:, 0] == 1).all(), "the class token has no residual in time"
    of_patches = weights[:, 1:].view(B, N, T)
    assert (of_patches == of_patches[:, :, :1]).all()
    values, counts = of_patches[:, :, 0].unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / (1 - p)], dtype=torch.float64))
    assert abs(counts[0].item() - p * B * N) < 3 * (p * (1 - p) * B * N) ** 0.5, "dropped as often as asked"
