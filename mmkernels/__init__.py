"""Fused kernels for multimodal models, behind plain PyTorch calls."""

from mmkernels.contrastive import info_nce
from mmkernels.divided_attention import divided_attention, divided_attention_maps
from mmkernels.integrations.open_clip import ClipLoss
from mmkernels.linear_cross_entropy import linear_cross_entropy

__all__ = ["ClipLoss", "divided_attention", "divided_attention_maps", "info_nce", "linear_cross_entropy"]
__version__ = "0.1.0"
