"""Fused kernels for multimodal models, behind plain PyTorch calls."""

from mmkernels.contrastive import info_nce
from mmkernels.divided_attention import divided_attention, divided_attention_maps
from mmkernels.integrations.open_clip import ClipLoss

__all__ = ["ClipLoss", "divided_attention", "divided_attention_maps", "info_nce"]
__version__ = "0.1.0"
